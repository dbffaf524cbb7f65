"""Data and options that a newcomer may well bring: one clear line, no traceback."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from kdcache import runs
from kdcache_cli.app import COMMANDS, app
from kdcache_stores import UsageError
from kdcache_stores.objects.files import LocalFiles
from tests.conftest import Result, Trained

Run = Callable[..., Result]


def arrays(folder: Path, **changes: Any) -> str:
    """17 grey images of 8x8 pixels and 5 classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (17, 8, 8), dtype=np.uint8), np.arange(17) % 5
    content = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels} | changes
    np.savez(folder / "data.npz", **content)
    return f"arrays:{folder / 'data.npz'}"


def train(dataset: str, out: Path, *more: object) -> list[object]:
    return ["train-teacher", "--dataset", dataset, "--model", "resnet8", "--epochs", 1, "--device",
            "cpu", "--threads", 1, "--out", out, *more]  # fmt: skip


def refused(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not [word for word in words if word not in result.err], result.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": np.arange(17) % 8}, ["5 classes", "'test/07'", "label 7"]),
        ({"x_test": np.zeros((17, 8, 8, 3), np.uint8)}, ["1 channels", "3: both splits"]),
        (
            {"x_train": np.zeros((17, 8, 8))},
            ["holds float32 items of shape 8x8, the test split images"],
        ),
    ],
    ids=["labels", "channels", "dtype"],
)
def test_splits_that_do_not_fit(
    changes: dict[str, Any], words: list[str], tmp_path: Path, kdcache: Run
) -> None:
    refused(kdcache(*train(arrays(tmp_path, **changes), tmp_path / "run")), 1, *words)


def test_a_single_array_is_no_npz(tmp_path: Path, kdcache: Run) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 8), np.uint8))
    result = kdcache(*train(f"arrays:{tmp_path / 'x.npy'}", tmp_path / "run"))
    refused(result, 1, "x.npy is not a readable .npz file")


def test_a_last_batch_of_one_sample(tmp_path: Path, kdcache: Run) -> None:
    dataset = arrays(tmp_path)
    narrow = ["--model", "vgg8", "--batch-size", 16]
    result = kdcache(*train(dataset, tmp_path / "run", *narrow))
    refused(result, 2, "17 images in batches of 16", "vgg8", "--batch-size")
    assert not (tmp_path / "run").exists()
    # Where the maps are wider than one pixel a batch of one trains.
    assert kdcache(*train(dataset, tmp_path / "wide", "--batch-size", 16)).code == 0


def test_a_network_that_diverged(tmp_path: Path, kdcache: Run) -> None:
    result = kdcache(*train(arrays(tmp_path), tmp_path / "run", "--lr", 1e30))
    refused(result, 1, "not finite", "--lr")


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", 2**64), ("--workers", -1)], ids=["seed", "workers"]
)
def test_numbers_out_of_range(option: str, value: int, tmp_path: Path, kdcache: Run) -> None:
    refused(kdcache(*train(arrays(tmp_path), tmp_path / "run", option, value)), 2, option)


def test_the_largest_seed(tmp_path: Path, kdcache: Run) -> None:
    assert kdcache(*train(arrays(tmp_path), tmp_path / "run", "--seed", 2**63 - 1)).code == 0


@pytest.mark.parametrize("weights", ["1,x", ".5,x", "-1,x"])
def test_teacher_weights_that_are_no_numbers(weights: str, tmp_path: Path, kdcache: Run) -> None:
    result = kdcache(
        "train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
        "--store", tmp_path, "--store", tmp_path, f"--teacher-weights={weights}", "--out", tmp_path / "run",
    )  # fmt: skip
    refused(result, 2, f"--teacher-weights {weights!r}")


@contextmanager
def no_file_above(most: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail within, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 500, 50_000, 400_500])
def test_a_checkpoint_on_a_full_disk(tmp_path: Path, most: int) -> None:
    run = runs.Run(tmp_path / "run", {"kdcache": "0"})
    with no_file_above(most), pytest.raises(OSError, match="File too large") as refused:
        run.save_checkpoint({"weights": torch.zeros(100_000)})
    assert refused.value.filename == str(tmp_path / "run/checkpoint.pt")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_a_store_where_a_file_is(tmp_path: Path, kdcache: Run) -> None:
    (tmp_path / "s.zarr").touch()
    np.savez(tmp_path / "l.npz", logits=2 * np.eye(3, dtype=np.float32), keys=["a", "b", "c"])
    result = kdcache("import", tmp_path / "l.npz", "--out", tmp_path / "s.zarr")
    refused(result, 1, "s.zarr is a file", "folder")


@pytest.mark.parametrize("url", ["s3://bucket/new", "https://host/new", "file:///new"])
def test_a_url_is_no_place_to_write(
    kdcache: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {name: app.get_command(click.Context(app), name) for name in COMMANDS}
    writing = {name for name, command in commands.items() if command and any(
        "--out" in param.opts for param in command.params)}  # fmt: skip
    assert writing >= {"demo", "train-teacher", "dump-teacher", "train-student", "export", "report",
                       "import", "export-views", "bench"}  # fmt: skip
    for command in sorted(writing):
        refused(kdcache(command, "--out", url), 2, "expected a path on this machine", url[:10])
    assert list(tmp_path.iterdir()) == []


def test_a_url_that_a_path_swallowed_is_no_folder(tmp_path: Path) -> None:
    for made in (
        lambda: LocalFiles(Path("s3://bucket/new")),
        lambda: runs.Run(Path("s3://b/r"), {}),
    ):
        with pytest.raises(UsageError, match="expected a path on this machine, found s3:/b"):
            made()


def test_a_store_behind_a_url_gives_its_plan(
    kdcache: Run, tmp_path: Path, trained: Trained
) -> None:
    url = trained.store.as_uri()
    result = kdcache(
        "export-views", "--dataset", "digits", "--store", url, "--out", tmp_path / "v.parquet"
    )
    assert result.code == 0, result.err


@pytest.mark.parametrize("text", ["abc", "1e400", "nan", "-1e30"])
def test_a_time_that_is_none(
    kdcache: Run, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    result = kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher, "--views", 1,
                     "--device", "cpu", "--out", tmp_path / "s")  # fmt: skip
    refused(result, 2, "SOURCE_DATE_EPOCH must be seconds since 1970", text)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "RUN", "--out", "OUT"],
        ["export-views", "--dataset", "digits", "--views", "2", "--augment", "pad-crop-flip",
         "--out", "OUT"],
        ["report", "RUN", "--out", "OUT"],
        ["card", "STORE"],
        ["pull", "STORE", "OUT"],
        ["push", "STORE", "OUT"],
        ["train-teacher", "--dataset", "digits", "--model", "resnet8", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_disk_that_takes_no_more(
    trained: Trained, tmp_path: Path, kdcache: Run, words: list[str]
) -> None:
    places = {"RUN": trained.teacher, "STORE": trained.store, "OUT": tmp_path / "out"}
    with no_file_above(1000):
        result = kdcache(*(places.get(word, word) for word in words))
    place = trained.store if words[0] == "card" else tmp_path / "out"
    refused(result, 1, str(place), "raise the limit (ulimit -f)")

"""Datasets that are no images, from files to a student: features, token ids and spectrograms."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.runs import WEIGHTS, read_config
from kdcache_stores import open_store
from tests.conftest import Result

Run = Callable[..., Result]

NETWORKS = """
import torch
from torch import nn

def mlp(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 16), nn.ReLU(),
                         nn.Linear(16, classes))

class Tokens(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embedding, self.head = nn.EmbeddingBag(50, 8), nn.Linear(8, classes)
    def forward(self, ids):
        assert ids.dtype == torch.int64
        return self.head(self.embedding(ids))

def tokens(classes):
    return Tokens(classes)

def few(classes):
    network = Tokens(classes)
    network.embedding = nn.EmbeddingBag(20, 8)
    return network

def pictures(classes, channels, size):
    return nn.Linear(channels * size, classes)

class Own:
    classes = 3
    def __init__(self, split):
        rng = torch.Generator().manual_seed(0)
        self.labels = torch.arange(60) % 3
        self.keys = [f"{split}/{row}" for row in range(60)]
        self.items = torch.randn(60, 4, 5, generator=rng) + self.labels[:, None, None]
    def __getitem__(self, row):
        return self.items[row].double().numpy(), int(self.labels[row])
"""
KINDS = {"features": "mlp", "ids": "tokens", "spectrograms": "resnet8"}
RATES = {"features": "0.05", "ids": "0.5", "spectrograms": "0.05"}


def items(kind: str, split: str, count: int = 90) -> np.ndarray:
    """Of three classes, easily told apart."""
    rng = np.random.default_rng(len(split))
    label = np.arange(count) % 3
    if kind == "ids":
        return (rng.integers(0, 16, (count, 7)) + 16 * label[:, None]).astype(np.int32)
    shape = (12,) if kind == "features" else (1, 8, 10)
    values = rng.normal(size=(count, *shape)) + 2 * (label - 1).reshape(-1, *[1] * len(shape))
    return values.astype(np.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of items; in the working directory lie data.npz and the module of networks."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    arrays = {f"x_{split}": items(request.param, split) for split in ("train", "test")}
    labels = {f"y_{split}": np.arange(90) % 3 for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, **labels)
    return str(request.param)


def options(kind: str) -> list[str]:
    return ["--device", "cpu", "--epochs", "4", "--batch-size", "20", "--lr", RATES[kind]]


def network(kind: str) -> str:
    return KINDS[kind] if kind == "spectrograms" else f"networks:{KINDS[kind]}"


@pytest.fixture
def store(kind: str, kdcache: Run) -> str:
    """t.zarr, which a teacher trained on the items has filled."""
    done = kdcache("train-teacher", "--dataset", "arrays:data.npz", "--model", network(kind), *options(kind),
                   "--out", "teacher")  # fmt: skip
    assert done.code == 0, done.err
    assert "no augmentation" in done.err
    done = kdcache("dump-teacher", "--dataset", "arrays:data.npz", "--teacher", "teacher",
                   "--allow-code", "--device", "cpu", "--encoding", "float32", "--out", "t.zarr")  # fmt: skip
    assert done.code == 0, done.err
    return "t.zarr"


@pytest.mark.slow
def test_from_the_file_to_a_student(kind: str, store: str, kdcache: Run, tmp_path: Path) -> None:
    with open_store(store) as opened:
        assert opened.header.format == (1, 1)
        held = opened.plan.item
        dtype = "int64" if kind == "ids" else "float32"
        assert held == {"dtype": dtype, "shape": list(items(kind, "train").shape[1:])}
    assert f"{dtype} " in kdcache("inspect", store).err
    student = ("train-student", "--dataset", "arrays:data.npz", "--student", network(kind), "--method",
               "kd", *options(kind))  # fmt: skip
    for name, more in {
        "cached": (),
        "held": ("--val-split", "0.2"),
        "online": ("--online", "teacher", "--allow-code"),
    }.items():
        done = kdcache(*student, "--store", store, *more, "--out", name)
        assert done.code == 0, done.err
        assert json.loads(Path(name, "summary.json").read_text())["last_top1"] > 0.6
    weights = [Path(name, WEIGHTS).read_bytes() for name in ("cached", "online")]
    assert weights[0] == weights[1]
    assert read_config("cached")["model"]["item"] == held
    teacher = f"{network(kind)}@teacher/{WEIGHTS}"
    for words in (
        (
            "evaluate",
            "cached",
            "--dataset",
            "arrays:data.npz",
            "--store",
            store,
            "--split",
            "train",
        ),
        ("evaluate", "cached", "--dataset", "arrays:data.npz", "--teacher", "teacher"),
        ("export", "cached"),
        ("check", store, "--dataset", "arrays:data.npz", "--teacher", teacher, "--method", "kd"),
        ("report", "cached", "held", "--store", store, "--out", "page"),
        ("push", store, "hub.zarr"),
        ("pull", "hub.zarr", "again.zarr"),
        ("diff", store, "again.zarr"),
        ("verify", store),
        ("verify", store, "--teacher", teacher, "--dataset", "arrays:data.npz"),
        (
            "export-views",
            "--store",
            store,
            "--dataset",
            "arrays:data.npz",
            "--out",
            "views.parquet",
        ),
    ):
        code = ("--allow-code",) if words[0] in ("evaluate", "export") else ()
        done = kdcache(*words, *code)
        assert done.code == 0, (words, done.err)


@pytest.mark.parametrize("kind", ["features"], indirect=True)
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("dump-teacher", "--augment", "rand-augment", "--views", "2"),
            "rand-augment augments images",
        ),
        (("dump-teacher", "--augment", "none+mixup", "--views", "2"), "none+mixup augments images"),
        (("dump-teacher", "--views", "2"), "--views 1"),
        (("dump-teacher", "--size", "32"), "--size prepare images"),
        (("dump-teacher", "--mean", "0.5", "--std", "0.5"), "--mean and --std prepare images"),
        (("dump-teacher", "--channels-last"), "--channels-last is a memory format of images"),
        (("train-teacher", "--augment", "pad-crop-flip"), "pad-crop-flip augments images"),
        (("train-teacher", "--model", "resnet8"), "resnet8 takes images"),
        (("train-teacher", "--model", "networks:pictures"), "networks:pictures: called as"),
        (("train-teacher", "--channels-last"), "--channels-last is a memory format of images"),
        (("evaluate", "networks:mlp", "--size", "32"), "prepare images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_for_images_alone_is_refused(
    kind: str, kdcache: Run, words: tuple[str, ...], why: str
) -> None:
    command, *rest = words
    more = {
        "dump-teacher": ["--teacher", "networks:mlp", "--allow-untrained", "--out", "t.zarr"],
        "train-teacher": ["--out", "t", "--model", "networks:mlp"],
        "evaluate": [],
    }[command]
    if "--model" in rest:
        more = more[:2]
    done = kdcache(command, "--dataset", "arrays:data.npz", "--device", "cpu", *rest, *more)
    assert done.code == 2, done.err
    assert why in " ".join(done.err.split())


@pytest.mark.parametrize("kind", ["features"], indirect=True)
def test_a_dataset_of_ones_own_and_logits_from_elsewhere(kind: str, kdcache: Run) -> None:
    import networks  # of the working directory

    own = networks.Own("train")
    logits = 4.0 * torch.eye(3)[own.labels]
    np.savez(
        "logits.npz", logits=logits.numpy(), keys=np.array(own.keys), labels=own.labels.numpy()
    )
    done = kdcache(
        "import",
        "logits.npz",
        "--out",
        "t.zarr",
        "--dataset",
        "networks:Own",
        "--encoding",
        "float32",
    )
    assert done.code == 0, done.err
    with open_store("t.zarr") as store:
        assert store.plan.item == {"dtype": "float32", "shape": [4, 5]}
    student = ["train-student", "--store", "t.zarr", "--student", "networks:mlp", "--method", "kd",
               "--dataset", "networks:Own", *options(kind), "--out", "s"]  # fmt: skip
    done = kdcache(*student)
    assert done.code == 0, done.err
    changed = Path("networks.py").read_text().replace("torch.randn", "0.9 * torch.randn")
    Path("others.py").write_text(changed)
    student[student.index("networks:Own")] = "others:Own"
    done = kdcache(*student[:-1], "other")
    assert done.code == 1, done.err
    assert "8 of 8 probed views are not those that the teacher saw" in " ".join(done.err.split())


@pytest.mark.parametrize("kind", ["ids"], indirect=True)
@pytest.mark.parametrize(
    "command", ["train-teacher --model", "dump-teacher --allow-untrained --teacher"]
)
def test_ids_beyond_an_embedding_are_refused(kind: str, kdcache: Run, command: str) -> None:
    done = kdcache(*command.split(), "networks:few", "--dataset", "arrays:data.npz", "--device", "cpu",
                   "--out", "t")  # fmt: skip
    assert done.code == 1, done.err
    assert "whose ids are 0 to 47" in done.err
    assert "An embedding needs 48 rows at least" in done.err
    assert not Path("t").exists()

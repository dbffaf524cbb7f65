"""The commands end to end on the digits, and what bad input is answered with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.runs import load_run_model
from tests.conftest import Result, Trained

Run = Callable[..., Result]


def student(store: Path, out: Path, *more: object) -> list[object]:
    return ["train-student", "--store", store, "--dataset", "digits", "--student", "resnet8",
            "--out", out, "--train-samples", 60, "--epochs", 2, "--batch-size", 20, "--device", "cpu",
            *more]  # fmt: skip


def test_evaluate_says_which_entry_of_a_file_it_takes(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    state = load_run_model(trained.teacher).module.state_dict()
    averaged = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "w.pth")
    spec = f"resnet8@{tmp_path / 'w.pth'}"
    evaluate = ("--dataset", "digits", "--device", "cpu")
    refused = kdcache("evaluate", spec, *evaluate)
    assert refused.code == 1
    assert "w.pth#model or" in refused.err
    good = kdcache("evaluate", f"{spec}#model", *evaluate, "--json").json
    assert good["weights_entry"] == "model"
    assert good["top1"] == kdcache("evaluate", trained.teacher, *evaluate, "--json").json["top1"]
    said = kdcache("evaluate", f"{spec}#model_ema", *evaluate)
    assert said.code == 0, said.err
    assert "resnet8: weights of the entry model_ema" in said.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "ce"),
        ("--method", "kd"),
        ("--method", "kd", "--standardize"),
        ("--method", "kd", "--standardize", "--noise", "gaussian:0.1"),
        ("--method", "kd", "--alpha", "0.5", "--temperature", "2"),
    ],
)
def test_student_from_the_store(
    flags: tuple[str, ...], trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    done = kdcache(*student(trained.store, tmp_path / "run", *flags, "--json"))
    assert done.code == 0, done.err
    summary = done.json
    assert summary["teacher_forwards"] == 0
    assert 0.1 <= summary["last_top1"] <= summary["best_top1"] <= summary["last_top5"] <= 1
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert files == {"config.toml", "metrics.jsonl", "model.safetensors", "checkpoint.pt",
                     "summary.json"}  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2]
    wanted = {"train_loss", "test_top1", "test_top5", "lr", "seconds", "data_wait_seconds"}
    assert wanted <= records[0].keys()
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    inspected = kdcache("inspect", trained.store, "--json").json
    assert config["stores"][0]["digest"] == inspected["digest"] == summary["stores"][0]


def test_ce_needs_no_store(tmp_path: Path, kdcache: Run) -> None:
    done = kdcache("train-student", "--dataset", "digits", "--student", "resnet8", "--method", "ce",
                   "--augment", "none", "--out", tmp_path / "run", "--train-samples", 60, "--epochs", 1,
                   "--device", "cpu", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["stores"] == []


def test_a_network_of_other_classes_is_called_one(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (18, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "nine.npz", **{f"x_{s}": images for s in ("train", "test")},
             **{f"y_{s}": np.arange(18) % 9 for s in ("train", "test")})  # fmt: skip
    done = kdcache("evaluate", trained.teacher, "--dataset", f"arrays:{tmp_path / 'nine.npz'}")
    assert done.code == 1
    assert "network resnet8 gives 10 logits, the dataset has 9 classes: give a network" in done.err


def test_evaluate_repeats_the_summary(trained: Trained, kdcache: Run) -> None:
    summary = json.loads((trained.teacher / "summary.json").read_text())
    found = kdcache("evaluate", trained.teacher, "--dataset", "digits", "--device", "cpu", "--json")
    assert found.code == 0, found.err
    assert found.json["top1"] == summary["last_top1"]
    assert found.json["ece"] == pytest.approx(summary["last_ece"], abs=1e-6)


def test_val_split_chooses_on_held_out_samples(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    done = kdcache(
        *student(trained.store, tmp_path, "--method", "kd", "--val-split", 0.2, "--json")
    )
    assert done.code == 0, done.err
    assert done.json["best_chosen_on"] == "held-out training samples"
    assert done.json["train_samples"] == 48


def test_dump_again_does_nothing_and_grows(trained: Trained, tmp_path: Path, kdcache: Run) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(trained.store, store)

    def dump(views: int) -> Result:
        return kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher, "--views",
                       views, "--encoding", "float32", "--out", store, "--device", "cpu", "--json")  # fmt: skip

    again = dump(4)
    assert again.code == 0, again.err
    assert (again.json["rows"], again.json["skipped"]) == (0, 4 * 1437)
    grown = dump(5)
    assert grown.code == 0, grown.err
    assert (grown.json["rows"], grown.json["skipped"]) == (1437, 4 * 1437)
    assert kdcache("verify", store, "-q").code == 0
    assert kdcache("inspect", store, "--json").json["views"] == 5


def test_verify_finds_a_flipped_bit(trained: Trained, tmp_path: Path, kdcache: Run) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(trained.store, store)
    whole = kdcache("verify", store, "--json")
    assert (whole.code, whole.json["ok"]) == (0, True)
    shard = next(file for file in sorted(store.rglob("c/1/*/*")) if file.is_file())
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    damaged = kdcache("verify", store, "--json")
    assert (damaged.code, damaged.json["ok"]) == (1, False)
    assert shard.relative_to(store).as_posix() in json.dumps(damaged.json)


def test_verify_expect(trained: Trained, kdcache: Run) -> None:
    digest = kdcache("inspect", trained.store, "--json").json["digest"]
    assert kdcache("verify", trained.store, "--expect", digest, "-q").code == 0
    other = kdcache("verify", trained.store, "--expect", "0" * 64)
    assert other.code == 1
    assert digest[:12] in other.err


@pytest.mark.parametrize("kind", ["models", "datasets", "methods", "augmentations", "encodings"])
def test_list(kind: str, kdcache: Run) -> None:
    expected = {"models": "resnet20", "datasets": "digits", "methods": "kd",
                "augmentations": "pad-crop-flip", "encodings": "float16"}[kind]  # fmt: skip
    names = {entry["name"] for entry in kdcache("list", kind, "--json").json}
    assert expected in names
    assert expected in kdcache("list", kind).out


BAD = {
    "dataset": (["train-teacher", "--dataset", "digit", "--model", "resnet8", "--out", "OUT"],
                2, ["digit", "digits"]),
    "model": (["train-teacher", "--dataset", "digits", "--model", "resnet9", "--out", "OUT"],
              2, ["resnet9", "resnet8"]),
    "method": (["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "dk",
                "--out", "OUT"], 2, ["dk", "kd", "ce"]),
    "command": (["inspct", "x"], 2, ["inspect"]),
    "no store": (["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
                  "--out", "OUT"], 2, ["--store"]),
    "not a store": (["inspect", "OUT"], 1, ["OUT"]),
    "not a run": (["evaluate", "OUT", "--dataset", "digits"], 1, ["config.toml"]),
    "weights": (["dump-teacher", "--dataset", "digits", "--teacher", "resnet8", "--weights",
                 "OUT/w.safetensors", "--views", "1", "--out", "OUT/s.zarr"], 1, ["w.safetensors"]),
    "no weights": (["dump-teacher", "--dataset", "digits", "--teacher", "resnet8", "--views", "1",
                    "--out", "OUT/s.zarr"], 1, ["no weights", "resnet8@FILE"]),
    "device": (["train-teacher", "--dataset", "digits", "--model", "resnet8", "--out", "OUT",
                "--device", "gpu"], 2, ["gpu", "cpu"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message(case: str, tmp_path: Path, kdcache: Run) -> None:
    args, code, words = BAD[case]
    folder = tmp_path / "OUT"
    folder.mkdir()
    done = kdcache(*[arg.replace("OUT", str(folder)) for arg in args])
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_unfinished_store_is_refused(trained: Trained, tmp_path: Path, kdcache: Run) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(trained.store, store)
    (store / "manifest.sha256").unlink()
    done = kdcache(*student(store, tmp_path / "run", "--method", "kd"))
    assert done.code == 1
    assert "copy.zarr" in done.err
    assert not (tmp_path / "run").exists()


def test_store_of_another_dataset_is_refused(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", x_train=rng.integers(0, 256, (40, 8, 8), np.uint8),
             y_train=np.arange(40) % 10, x_test=rng.integers(0, 256, (20, 8, 8), np.uint8),
             y_test=np.arange(20) % 10)  # fmt: skip
    args = student(trained.store, tmp_path / "run", "--method", "kd")
    args[args.index("digits")] = f"arrays:{tmp_path / 'other.npz'}"
    args[args.index(60)] = 20
    done = kdcache(*args)
    assert done.code == 1
    assert "Traceback" not in done.err


def test_teacher_for_other_classes_is_refused(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    np.savez(tmp_path / "five.npz", x_train=np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8),
             y_train=np.arange(40) % 5, x_test=np.zeros((20, 8, 8), np.uint8),
             y_test=np.arange(20) % 5)  # fmt: skip
    done = kdcache("dump-teacher", "--dataset", f"arrays:{tmp_path / 'five.npz'}", "--teacher",
                   trained.teacher, "--views", 1, "--out", tmp_path / "s.zarr")  # fmt: skip
    assert done.code == 1
    assert "10" in done.err
    assert "5" in done.err


def test_module_and_version() -> None:
    for command in ([sys.executable, "-m", "kdcache"], [sys.executable, "-m", "kdcache_cli"][:0]):
        if command:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=True
            )
            assert done.stdout.startswith("kdcache, version ")


def test_what_a_newcomer_looks_for_is_told(tmp_path: Path, kdcache: Run) -> None:
    train = (
        "train-teacher",
        "--dataset",
        "digits",
        "--model",
        "resnet8",
        "--out",
        tmp_path / "run",
    )
    sized = kdcache(*train, "--size", 64)
    assert sized.code == 2
    assert "--augment resized-crop-flip:size=64" in sized.err
    page = kdcache("list", "augmentations", "resized-crop-flip").out
    assert "size: the side of its images, 224 where these differ" in page
    assert "\nNetwork:\n  --model " in kdcache("train-teacher", "--help").out
    (tmp_path / "file.zarr").write_bytes(b"")
    for name, what in (("nope", ": there is no such folder"), ("file.zarr", " is a file")):
        assert f"{name}{what}" in kdcache("inspect", tmp_path / name).err


def test_a_teacher_of_some_samples(tmp_path: Path, kdcache: Run) -> None:
    done = kdcache("train-teacher", "--dataset", "digits", "--model", "resnet8", "--epochs", 1, "--device",
                   "cpu", "--train-samples", 40, "--val-split", 0.25, "--batch-size", 10, "--out",
                   tmp_path / "run", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["train_samples"] == 30
    assert done.json["best_chosen_on"] == "held-out training samples"

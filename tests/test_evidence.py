"""The page of evidence says what the measured files say, and its commands exist."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from sklearn.datasets import load_digits

from kdcache_cli.app import app

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence"
PAGE = runpy.run_path(str(EVIDENCE / "page.py"))


def test_tables_are_those_of_the_files() -> None:
    page = PAGE["PAGE"].read_text()
    assert PAGE["filled"](page) == page


@pytest.mark.parametrize("file", sorted(EVIDENCE.glob("*.json")), ids=lambda file: file.stem)
def test_a_result_names_its_command_machine_and_versions(file: Path) -> None:
    document = json.loads(file.read_text())
    if file.stem.startswith("bench"):
        assert document["versions"]
        return
    script = shlex.split(document["command"])[1]
    assert (ROOT / script).is_file()
    assert document["machine"]
    assert document["torch"]
    # Neither paths nor names of machines: what is left of a path is its last part.
    assert not re.search(r"(^|[\s:@=])/", document["command"])


def test_every_study_is_listed() -> None:
    done = subprocess.run(
        [sys.executable, EVIDENCE / "page.py", "--list"], capture_output=True, text=True, check=True
    )
    scripts = {file.name for file in EVIDENCE.glob("*.py")} - {"study.py", "page.py"}
    assert {name for name in scripts if f"evidence/{name}:" in done.stdout} == scripts
    assert all(f"python evidence/{name} " in done.stdout for name in scripts)


def test_differences_are_paired_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    from study import paired

    # Differences 1, 2, 3: mean 2, s = 1, t(.975; 2) = 4.3027, so 4.3027 / sqrt(3).
    assert paired([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == {"mean": 2.0, "ci95": 2.48, "n": 3}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_comparison_gives_every_stage_its_flags(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import cifar100

    args = cifar100.options(
        shlex.split(f"--folder runs --out found.json --device {device} --epochs 20 --teacher-epochs 30 "
                    "--extra '--compile --workers 2' --teacher-extra '--lr 0.1' "
                    "--dump-extra '--batch-size 512' --student-extra '--warmup-epochs 1'")
    )  # fmt: skip

    def given(words: list[str]) -> dict[str, Any]:
        command = app.get_command(click.Context(app), words[0])
        assert command is not None
        return command.make_context(words[0], words[1:]).params

    teacher = given(cifar100.train_teacher(args))
    dump = given(cifar100.dump_teacher(args, Path("runs/teacher")))
    student = given(cifar100.train_student(args, "kd-ls", 3))
    for stage in (teacher, dump, student):
        assert stage["precision"] == ("bf16" if device == "cuda" else "float32")
        assert stage["channels_last"] == (device == "cuda")
        assert (stage["compile"], stage["workers"], stage["device"]) == (True, 2, device)
    assert (teacher["epochs"], teacher["lr"], teacher["out"]) == (30, 0.1, Path("runs/teacher"))
    assert (dump["views"], dump["augment"], dump["batch_size"]) == (162, "exhaustive", 512)
    assert (student["epochs"], student["seeds"], student["recipes"]) == (
        20,
        (3,),
        ("cifar100/kd-ls",),
    )
    assert (student["schedule"], student["warmup_epochs"]) == ("random", 1)


@pytest.mark.slow
def test_a_small_comparison_runs(tmp_path: Path) -> None:
    """Thirty digits, enlarged: a teacher, its 162 views, and two students that draw from all of them."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.kron(images[:50].reshape(-1, 8, 8) * 15, np.ones((4, 4))).astype(np.uint8)
    np.savez(tmp_path / "few.npz", x_train=pixels[:30], y_train=labels[:30], x_test=pixels[30:],
             y_test=labels[30:50])  # fmt: skip
    subprocess.run(
        [sys.executable, EVIDENCE / "cifar100.py", "--dataset", f"arrays:{tmp_path / 'few.npz'}", "--teacher",
         "resnet8", "--student", "resnet8", "--methods", "ce,kd-ls", "--epochs", "2", "--teacher-epochs", "3",
         "--jobs", "1", "--device", "cpu", "--extra=--threads 1", "--dump-extra=--allow-untrained",
         "--folder", tmp_path / "runs", "--out", tmp_path / "found.json"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["found"].keys() == {"ce", "kd-ls"}
    assert (document["epochs"], document["teacher_epochs"]) == (2, 3)
    config = tomllib.loads((tmp_path / "runs" / "kd-ls-seed0" / "config.toml").read_text())
    assert (config["data"]["schedule"], config["data"]["resident_views"]) == ("random", 162)


@pytest.mark.slow
def test_a_small_study_runs_and_goes_on(tmp_path: Path) -> None:
    """Two tiny students of the digits; the second time nothing is trained again."""
    command = [sys.executable, EVIDENCE / "fresh_crops.py", "--dataset", "digits", "--samples", "40",
               "--test-samples", "20", "--epochs", "2", "--seeds", "2", "--device", "cpu", "--precision",
               "float32", "--folder", tmp_path / "study", "--out", tmp_path / "found.json"]  # fmt: skip
    teacher = [sys.executable, "-m", "kdcache", "train-teacher", "--dataset", "digits", "--model", "resnet8",
               "--epochs", "1", "--device", "cpu", "--quiet", "--out", tmp_path / "teacher"]  # fmt: skip
    subprocess.run(teacher, check=True)
    subprocess.run([*command, "--teacher", tmp_path / "teacher"], check=True, capture_output=True)
    first = json.loads((tmp_path / "found.json").read_text())
    assert len(first["found"]["online, fresh crops"]["last_top1"]) == 2
    weights = sorted((tmp_path / "study" / "runs").glob("*/model.safetensors"))
    assert len(weights) == 4
    times = [file.stat().st_mtime_ns for file in weights]
    subprocess.run([*command, "--teacher", tmp_path / "teacher"], check=True, capture_output=True)
    assert [file.stat().st_mtime_ns for file in weights] == times
    assert json.loads((tmp_path / "found.json").read_text())["found"] == first["found"]

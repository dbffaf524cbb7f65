"""The page of evidence says what the measured files say, and its commands exist."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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

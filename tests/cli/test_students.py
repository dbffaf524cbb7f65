"""Several students by one command: seeds, methods, recipes or a list of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.runs import read_config
from tests.conftest import Result, Trained

Kdcache = Callable[..., Result]


def command(trained: Trained, out: Path) -> tuple[object, ...]:
    return ("train-student", "--store", trained.store, "--dataset", "digits", "--student", "resnet8",
            "--epochs", 1, "--train-samples", 32, "--batch-size", 16, "--device", "cpu",
            "--out", out)  # fmt: skip


def test_every_method_with_every_seed(trained: Trained, tmp_path: Path, kdcache: Kdcache) -> None:
    done = kdcache(*command(trained, tmp_path / "all"), "--method", "kd", "--method", "dkd", "--seed", 4,
                   "--seed", 7, "--dkd-beta", 2)  # fmt: skip
    assert done.code == 0, done.err
    assert "4 students side by side see the samples in one order, of data seed 4" in done.err
    names = ["dkd-seed4", "dkd-seed7", "kd-seed4", "kd-seed7"]
    assert sorted(folder.name for folder in (tmp_path / "all").iterdir()) == names
    said = kdcache(*command(trained, tmp_path / "all"), "--method", "kd", "--method", "dkd",
                   "--seed", 4, "--seed", 7, "--dkd-beta", 2, "--json")  # fmt: skip
    assert sorted(Path(run["run"]).name for run in json.loads(said.out)) == names
    config = read_config(tmp_path / "all" / "dkd-seed7")
    assert (config["training"]["seed"], config["data"]["seed"]) == (7, 4)
    assert config["objective"]["options"]["beta"] == 2
    alone = kdcache(*command(trained, tmp_path / "alone"), "--method", "kd", "--seed", 7,
                    "--data-seed", 4, "-q")  # fmt: skip
    assert alone.code == 0, alone.err
    both = (tmp_path / "all" / "kd-seed7", tmp_path / "alone")
    assert len({(run / "model.safetensors").read_bytes() for run in both}) == 1


def test_a_log_tells_of_the_epochs(trained: Trained, tmp_path: Path, kdcache: Kdcache) -> None:
    asked = (*command(trained, tmp_path / "a"), "--method", "kd", "--seed", 4, "--seed", 7)
    done = kdcache(*asked, "--epochs", 2)
    told = [line for line in done.err.splitlines() if "epoch 2/2: test top-1" in line]
    assert [line.partition(",")[0] for line in told] == ["kd-seed4", "kd-seed7"]
    quiet = kdcache(*command(trained, tmp_path / "b"), "--method", "kd", "-q")
    assert (quiet.code, quiet.err) == (0, "")


def test_the_table_names_the_teacher_and_the_means(
    trained: Trained, tmp_path: Path, kdcache: Kdcache
) -> None:
    done = kdcache(*command(trained, tmp_path / "a"), "--method", "ce", "--method", "kd",
                   "--seed", 0, "--seed", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert "teacher resnet8, clean test images" in done.out
    assert "\nce: " in done.out
    assert re.search(r"\nkd: [\d.]+% over 2 seeds; kd - ce: [+-][\d.]+ \+- [\d.]+ points "
                     r"\(95%, seed by seed\)\n", done.out)  # fmt: skip


def test_a_list_of_runs(trained: Trained, tmp_path: Path, kdcache: Kdcache) -> None:
    listed = tmp_path / "runs.toml"
    listed.write_text(
        '[[run]]\nname = "warm"\nmethod = "kd"\ntemperature = 2.0\nstandardize = true\n'
        '[[run]]\nrecipe = "cifar100/dkd"\nseed = [1, 2]\nstudent = "resnet14"\n'
        'lr-schedule = "step"\nmilestones = "0.5"\n'
    )
    done = kdcache(*command(trained, tmp_path / "all"), "--runs", listed, "--lr", 0.01)
    assert done.code == 0, done.err
    warm, one, two = (
        read_config(tmp_path / "all" / name) for name in ("warm", "dkd-seed1", "dkd-seed2")
    )
    assert (warm["model"]["name"], one["model"]["name"]) == ("resnet8", "resnet14")
    assert (warm["objective"]["temperature"], one["objective"]["method"]) == (2.0, "dkd")
    assert [c["training"]["lr"] for c in (warm, one, two)] == [0.01] * 3
    assert one["training"]["milestones"] == [0.5]
    assert [c["data"]["seed"] for c in (warm, one, two)] == [0] * 3


def test_a_list_s_own_seed_of_zero_holds(
    trained: Trained, tmp_path: Path, kdcache: Kdcache
) -> None:
    listed = tmp_path / "runs.toml"
    listed.write_text('[[run]]\nmethod = "ce"\nseed = 0\n[[run]]\nmethod = "ce"\n')
    done = kdcache(*command(trained, tmp_path / "all"), "--runs", listed, "--seed", 5)
    assert done.code == 0, done.err
    seeds = {
        n: read_config(tmp_path / "all" / n)["training"]["seed"] for n in ("ce-seed0", "ce-seed5")
    }
    assert seeds == {"ce-seed0": 0, "ce-seed5": 5}


@pytest.mark.parametrize(("text", "what"), [
    ("[[run]]\nmethd = 'kd'", "methd is no option of a single student; did you mean method"),
    ("[[run]]\nout = 'x'", "out is no option of a single student"),
    ("[[run]]\nmethod = 'kd'\nlr = 'fast'", "is not a valid float"),
    ("[[run]]\nmethod = 'kd'\n[[run]]\nmethod = 'kd'", "several runs are named 'kd-seed0'"),
    ("[[run]]\nseed = 1", "give --method"),
    ("[[run]]\nmethod = 'kd'\nseed = 'a'", "'a' is not a valid integer"),
    ("[[run]]\nmethod = 'kd'\nseed = [1, -2]", "-2"),
    ("[[run]]\nmethod = 'kd'\nseed = []", "expected one, or a list"),
    ("[[run]]\nmethod = 'kd'\nname = '../x'", "names a folder"),
    ("[[run]]\nmethod = 'kd'\nname = 3", "names a folder"),
    ("run = 3", r"expected a table [[run]] for each student"),
    ("[[run", "--runs"),
])  # fmt: skip
def test_a_list_that_is_none(
    trained: Trained, tmp_path: Path, kdcache: Kdcache, text: str, what: str
) -> None:
    (tmp_path / "runs.toml").write_text(text)
    done = kdcache(*command(trained, tmp_path / "all"), "--runs", tmp_path / "runs.toml")
    assert done.code == 2
    assert what in " ".join(done.err.split())
    assert not (tmp_path / "all").exists()

"""Two processes under torchrun are one training: the same losses, the same weights, one writer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache import dump, load_dataset, load_teacher, make_augmentation, train
from kdcache.distributed import Ranks
from kdcache.runs import read_metrics
from kdcache.views.plan import ViewPlan
from kdcache_stores import UsageError
from tests.conftest import Trained
from tests.kdcache.training.job import training

ROOT = Path(__file__).parents[3]


SUMMED = {  # plain SGD without batch norm: what ranks give can be compared with one process
    method: {
        "objective": {"method": method, "noise": "gaussian:0.1"},
        "optimization": {"epochs": 2, "batch_size": 17, "lr": 0.1},
    }
    for method in ("kd", "ctkd")
}  # 50 samples in batches of 17: parts of 8 and 9, and in the last batch 8 and 8
SUMMED |= {  # these compare samples with each other, or remember them
    method: {
        "model": "tests.kdcache.training.networks:pooling",
        "objective": {"method": method, "options": own},
        "optimization": {"epochs": 2, "batch_size": 17, "lr": 0.01},
    }
    for method, own in (("rkd", {}), ("crd", {"negatives": 40}), ("ps-kd", {}))
}
SUMMED["two views a decode"] = {
    "objective": {"method": "kd", "noise": "gaussian:0.1"}, "views_per_decode": 2,
    "optimization": {"epochs": 2, "batch_size": 18, "lr": 0.1},
}  # fmt: skip
NORMED = {
    "model": "resnet8", "objective": {"method": "kd"}, "ema": 0.9,
    "optimization": {"epochs": 2, "batch_size": 25},
}  # fmt: skip
EMPTY = {"optimization": {"epochs": 1, "batch_size": 7}}  # 50 = 7 * 7 + 1


def torchrun(*jobs: tuple[Path, dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    work = json.dumps([[str(out), options] for out, options in jobs])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "tests.kdcache.training.job", work]  # fmt: skip
    path = os.pathsep.join(str(ROOT / part) for part in ("", "stores", "cli"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def two_ranks(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings by two processes; starting them is what takes time, so one start does them all."""
    folder = tmp_path_factory.mktemp("ranks")
    pooled = folder / "pooled"
    dataset = load_dataset("digits")
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8, fields=("pooled",))
    dump(plan, [(teacher, pooled)], 2)
    both = {"stores": [str(trained.store), str(pooled)], "views": 2}
    jobs = {name: options | both for name, options in (SUMMED | {"normed": NORMED}).items()}
    done = torchrun(*[(folder / name, options) for name, options in jobs.items()])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", list(SUMMED))
def test_two_ranks_give_the_gradients_of_one(
    trained: Trained, two_ranks: Path, tmp_path: Path, method: str
) -> None:
    both = [str(trained.store), str(two_ranks / "pooled")]
    options = SUMMED[method] | {"stores": both, "views": 2}
    runs = [train(training(options), tmp_path / "alone").path, two_ranks / method]
    weights = [load_file(run / "model.safetensors") for run in runs]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-6)
    for one, two in zip(*[read_metrics(run) for run in runs], strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds", "data_wait_seconds", "images_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_two_ranks_resume_and_refuse(trained: Trained, two_ranks: Path, tmp_path: Path) -> None:
    """A run of two ranks goes on from its checkpoint; a batch of one sample is refused."""
    run = tmp_path / "run"
    shutil.copytree(two_ranks / "normed", run)
    metrics = read_metrics(run)
    # As if killed after the last checkpoint: what came later is not there.
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    both = {"stores": [str(trained.store), str(two_ranks / "pooled")], "views": 2}
    done = torchrun((run, NORMED | both), (tmp_path / "empty", EMPTY))
    assert done.returncode != 0
    assert "end with a batch of 1, which cannot be divided among 2 ranks" in done.stderr
    assert not (tmp_path / "empty").exists()
    assert read_metrics(run) == metrics
    again, whole = ((path / "model.safetensors").read_bytes() for path in
                    (run, two_ranks / "normed"))  # fmt: skip
    assert again == whole


def test_batches_that_leave_a_rank_empty() -> None:
    Ranks(0, 2).require_divisible(50, 16)
    with pytest.raises(UsageError, match="among 3 ranks"):
        Ranks(0, 3).require_divisible(50, 16)


def test_parts_cover_every_batch_once() -> None:
    for world in (1, 2, 3, 7):
        for total in range(world, 40):
            parts = [Ranks(rank, world).part(total) for rank in range(world)]
            covered = [i for part in parts for i in range(total)[part]]
            assert covered == list(range(total))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1

"""Training on a GPU: equal to the CPU up to rounding, cached equals online, no step waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import CachedViews, Training, load_dataset, load_teacher, train
from kdcache.bench.equality import OBJECTIVES, drift, first_step
from kdcache.bench.training_bench import bench_train
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import read_metrics, read_summary
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared
from tests.conftest import Trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ROOT = Path(__file__).parents[2]


def training(trained: Trained, method: str = "kd", **changes: object) -> Training:
    base = Training(
        dataset="digits",
        model="resnet8",
        objective=OBJECTIVES[method],
        optimization=Optimization(epochs=2, batch_size=64),
        stores=(str(trained.store),),
        device="cuda",
    )
    return replace(base, **changes)


@pytest.mark.parametrize("name", ["kd", "kd+std", "dkd", "dkd+std", "ctkd"])
def test_cached_is_live(trained: Trained, tmp_path: Path, name: str) -> None:
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8, device="cuda")
    with CachedViews(load_dataset("digits"), [trained.store], 64, device="cuda") as views:
        batch = next(views.epoch(0))
        live = teacher.logits(batch.images)
    scale = live.abs().max().item()
    # The store is of the CPU; convolutions of a GPU may use TF32.
    torch.testing.assert_close(batch.teachers[0]["logits"], live, rtol=0, atol=5e-3 * scale)
    found = drift(training(trained, name), str(trained.teacher), tmp_path)
    assert found["cached_loss"] < 0.05


def test_the_cpu_learns_the_same(trained: Trained, tmp_path: Path) -> None:
    runs = [train(training(trained, device=where), tmp_path / where) for where in ("cpu", "cuda")]
    losses = [[record["train_loss"] for record in read_metrics(run.path)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("options", [
    {"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}, {"compile": True},
    {"schedule": "random"}, {"ema": 0.9},
])  # fmt: skip
def test_options_learn(trained: Trained, tmp_path: Path, options: dict[str, object]) -> None:
    run = train(training(trained, **options), tmp_path / "run")
    first, last = (record["train_loss"] for record in read_metrics(run.path))
    assert last < first


@pytest.mark.parametrize("name", ["kd+std", "dkd", "ctkd"])
def test_a_step_does_not_wait_for_the_device(trained: Trained, tmp_path: Path, name: str) -> None:
    with prepared(training(trained, name), tmp_path / "run") as loop:
        loop.train_epoch(0)
        learner = loop.courses[0].learner
        learner.begin_epoch(1)
        batch = next(loop.views.epoch(1))
        torch.cuda.set_sync_debug_mode("error")
        try:
            learner.learn(batch, 1, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_first_step_of_mlkd_runs_there(trained: Trained, tmp_path: Path) -> None:
    from kdcache import ViewPlan, dump, make_augmentation

    dataset = load_dataset("digits").subset(np.arange(200))
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8, device="cuda")
    plan = ViewPlan(dataset, make_augmentation("weak+strong", dataset), 0)
    dump(plan, [(teacher, tmp_path / "s.zarr")], 2, encoding="float32", device="cuda")
    with CachedViews(dataset, [tmp_path / "s.zarr"], 50, pairs=True, device="cpu") as views:
        cpu = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
        found = first_step(views, cpu, "resnet8", OBJECTIVES["mlkd"])
    assert found["loss"] < 0.01


def test_the_price(trained: Trained) -> None:
    optimization = Optimization(epochs=20, batch_size=64)
    way = training(trained, optimization=optimization, objective=ObjectiveConfig(method="kd"))
    found = bench_train(way, str(trained.teacher), rounds=5)
    print(json.dumps(found))
    assert found["cached"]["median"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cifar100_script(real_data: Path, tmp_path: Path) -> None:
    """The published comparison, cut down to a few epochs; run the script itself for the numbers."""
    command = [sys.executable, "evidence/cifar100.py", "--dataset",
               f"arrays:{real_data / 'cifar100.npz'}", "--folder", str(tmp_path / "runs"),
               "--teacher-epochs", "4", "--epochs", "4", "--methods", "ce,kd-ls,dkd-ls",
               "--out", str(tmp_path / "found.json")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert found["kd-ls"]["mean_last"] > 10
    assert read_summary(tmp_path / "runs" / "kd-ls-seed0")["resident_views"] == 162

"""The loop and the cached views: cached equals online, resume is exact, wrong input is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import (
    CachedViews,
    Training,
    ViewPlan,
    dump,
    load_dataset,
    load_teacher,
    open_store,
    train,
)
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import load_run_model, read_metrics, read_summary
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache_stores import MismatchError, TrainingError, UsageError
from tests.conftest import Trained

KD = ObjectiveConfig(method="kd")


def training(trained: Trained, **changes: Any) -> Training:
    base = Training(
        dataset="digits",
        model="resnet8",
        objective=KD,
        optimization=Optimization(epochs=4, batch_size=16),
        stores=(str(trained.store),),
        train_samples=64,
    )
    return replace(base, **changes)


class StopAfter(Unwatched):
    """Interrupts a training, as Ctrl-C would, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def step(self, epoch: int, done: int, total: int) -> None:
        if epoch == self.at and done == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"schedule": "random"}])
def test_a_resumed_run_ends_with_the_same_bytes(
    trained: Trained, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(training(trained, **changes), tmp_path / "whole")
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(training(trained, **changes), tmp_path / "cut", StopAfter(epoch))
    cut = train(training(trained, **changes), tmp_path / "cut")
    weights = [(run.path / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]
    losses = [[r["train_loss"] for r in read_metrics(run.path)] for run in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_run_goes_on_when_its_store_has_grown(trained: Trained, tmp_path: Path) -> None:
    """What a run pins is the views that it reads, not those that a store got since."""
    store = tmp_path / "grows.zarr"
    shutil.copytree(trained.store, store)
    with pytest.raises(KeyboardInterrupt):
        train(training(trained, stores=(str(store),)), tmp_path / "cut", StopAfter(3))
    dataset = load_dataset("digits", "train")
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    with open_store(store) as before:
        plan = ViewPlan.from_store(before.plan, dataset)
    dump(plan, [(teacher, store)], views=6, encoding="float32")
    with pytest.raises(MismatchError, match=r"data\.views was 4, now 6"):
        train(training(trained, stores=(str(store),)), tmp_path / "cut")
    train(training(trained, stores=(str(store),), views=4), tmp_path / "cut")
    train(training(trained), tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_cached_views_bring_what_the_teacher_says(trained: Trained) -> None:
    teacher = load_run_model(trained.teacher)
    dataset = load_dataset("digits", "train")
    rows = np.arange(100, 300)
    with CachedViews(dataset, [trained.store], batch_size=64, rows=rows, seed=3) as views:
        seen = []
        for images, labels, teachers, which in views.epoch(2):
            with torch.inference_mode():
                live = teacher.module(teacher.preprocessing(images))
            torch.testing.assert_close(teachers[0]["logits"], live, rtol=0, atol=1e-4)
            assert labels.tolist() == dataset.labels[which].tolist()
            seen += which.tolist()
    assert sorted(seen) == rows.tolist()


def test_schedules_use_the_views_they_say(trained: Trained) -> None:
    dataset = load_dataset("digits", "train")
    with CachedViews(dataset, [trained.store], batch_size=500) as views:
        by_epoch = [{int(v) for batch in views.epoch(e) for v in batch.views} for e in range(6)]
    assert by_epoch == [{0}, {1}, {2}, {3}, {0}, {1}]
    with CachedViews(
        dataset, [trained.store], batch_size=500, schedule="random", resident_views=2
    ) as views:
        windows = [{int(v) for batch in views.epoch(e) for v in batch.views} for e in range(4)]
    assert windows == [{0, 1}, {1, 2}, {2, 3}, {3, 0}]


def test_cached_equals_online(trained: Trained, tmp_path: Path) -> None:
    cached = train(training(trained), tmp_path / "cached")
    online = train(training(trained, online=(str(trained.teacher),)), tmp_path / "online")
    first = [read_metrics(run.path)[0]["train_loss"] for run in (cached, online)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert read_summary(cached.path)["teacher_forwards"] == 0
    assert read_summary(online.path)["teacher_forwards"] == 64 * 4


def test_online_refuses_another_teacher(trained: Trained, tmp_path: Path) -> None:
    other = train(
        Training(dataset="digits", model="resnet8", objective=ObjectiveConfig(method="ce"), seed=7,
                 optimization=Optimization(epochs=1)),
        tmp_path / "other",
    )  # fmt: skip
    with pytest.raises(MismatchError, match="digest"):
        train(training(trained, online=(str(other.path),)), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(trained: Trained, tmp_path: Path) -> None:
    wild = Optimization(epochs=4, batch_size=16, lr=1e30)
    with pytest.raises(TrainingError, match=r"epoch 1 .* step \d"):
        train(training(trained, optimization=wild), tmp_path / "run")


def test_a_run_of_another_configuration_is_refused(trained: Trained, tmp_path: Path) -> None:
    train(training(trained), tmp_path / "run")
    with pytest.raises(MismatchError, match=r"training\.seed was 0, now 1"):
        train(training(trained, seed=1), tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    other = ObjectiveConfig(method="dkd")
    with pytest.raises(
        MismatchError, match=r"objective\.method was 'kd', now 'dkd' and \d.*delete"
    ):
        train(training(trained, objective=other), tmp_path / "run")


def test_a_finished_run_is_not_trained_again(trained: Trained, tmp_path: Path) -> None:
    run = train(training(trained), tmp_path / "run")
    before = (run.path / "model.safetensors").stat().st_mtime_ns
    train(training(trained), tmp_path / "run", StopAfter(1))
    assert (run.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_that_is_no_run_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        train(training(trained), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_training_samples_are_balanced_and_seeded(trained: Trained) -> None:
    from kdcache.data.choice import choose

    dataset = load_dataset("digits", "train")
    rows, held = choose(dataset, 50, 0.2, 0)
    assert (len(rows), len(held)) == (40, 10)
    assert np.bincount(dataset.labels[np.concatenate([rows, held])]).tolist() == [5] * 10
    assert np.bincount(dataset.labels[held]).tolist() == [1] * 10
    other, _ = choose(dataset, 50, 0.2, 1)
    assert other.tolist() != rows.tolist()


def test_metrics_hold_each_part_of_the_loss(trained: Trained, tmp_path: Path) -> None:
    run = train(training(trained), tmp_path / "run")
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    parts = record["train_ce_weighted"] + record["train_kd_weighted"]
    assert record["train_loss"] == pytest.approx(parts, rel=1e-5)
    assert record["train_ce_weighted"] == pytest.approx(0.1 * record["train_ce"], rel=1e-5)

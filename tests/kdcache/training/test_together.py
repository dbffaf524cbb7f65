"""Trainings side by side: each writes what it would have written alone; the data is read once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import read_config, read_metrics, read_summary
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared_together, train_together
from kdcache.training.settings import with_orders
from kdcache.views.batches import ImageBatch
from kdcache.views.plan import ViewPlan
from kdcache_stores import MismatchError, TrainingError, UsageError
from tests.conftest import Trained

DROPOUT = "tests.kdcache.training.networks:with_dropout"
STEPS = Optimization(epochs=4, batch_size=16)


def trainings(trained: Trained, **changes: Any) -> list[Training]:
    """Four students that differ in all that they may."""
    base = Training(
        dataset="digits",
        model="resnet8",
        objective=ObjectiveConfig(method="kd"),
        optimization=STEPS,
        stores=(str(trained.store),),
        train_samples=80,
        val_split=0.1,
        data_seed=5,
    )
    base = replace(base, **changes)
    return [
        base,
        replace(base, seed=1, model=DROPOUT, objective=ObjectiveConfig(method="ce")),
        replace(base, seed=2, model=DROPOUT, objective=ObjectiveConfig(method="dkd"), ema=0.9),
        replace(base, seed=3, optimization=replace(STEPS, lr=0.01, optimizer="adamw")),
    ]


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def folders(where: Path, count: int = 4) -> list[Path]:
    return [where / str(number) for number in range(count)]


def without_times(run: Path) -> list[dict[str, Any]]:
    times = {"seconds", "data_wait_seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in times} for r in read_metrics(run)]


def test_each_is_what_it_would_be_alone(trained: Trained, tmp_path: Path) -> None:
    how = trainings(trained)
    together = train_together(how, folders(tmp_path / "together"))
    for training, run in zip(how, together, strict=True):
        alone = train(training, tmp_path / "alone" / run.path.name)
        assert weights(run.path) == weights(alone.path)
        assert without_times(run.path) == without_times(alone.path)
        assert read_config(run.path) == read_config(alone.path)
        untimed = {"seconds_per_epoch", "data_wait_fraction"}
        one, other = (
            {k: v for k, v in read_summary(r.path).items() if k not in untimed}
            for r in (run, alone)
        )
        assert one.pop("students_side_by_side") == 4  # the seconds are those of all
        assert one == other
        assert read_config(run.path)["data"]["seed"] == 5


def test_of_images_in_memory_each_has_its_own_order(trained: Trained, tmp_path: Path) -> None:
    """Runs and order are those of a training alone; after a cut too."""
    few = Optimization(epochs=2, batch_size=256)
    how = trainings(trained, train_samples=None, val_split=0.0, data_seed=None, optimization=few)
    how[3] = replace(how[3], data_seed=2, optimization=few)  # that of another
    with prepared_together(how, folders(tmp_path / "looked at")) as loop:
        first = [next(loop.views.epoch(1, seed=t.stream_seed)).rows.tolist() for t in how]
    assert len({tuple(rows) for rows in first[:3]}) == 3
    assert first[3] == first[2]
    cut = folders(tmp_path / "together")
    with pytest.raises(KeyboardInterrupt):
        train_together(how, cut, [Unwatched(), Unwatched(), StopAt(2, 2), Unwatched()])
    for training, run in zip(how, train_together(how, cut), strict=True):
        alone = train(training, tmp_path / "alone" / run.path.name)
        assert weights(run.path) == weights(alone.path)
        assert without_times(run.path) == without_times(alone.path)
        assert read_config(run.path) == read_config(alone.path)


@pytest.mark.parametrize("changes", [
    {"train_samples": 80}, {"val_split": 0.1}, {"online": True}, {"stores": ()},
])  # fmt: skip
def test_one_order_where_it_saves_work_or_chooses_samples(
    trained: Trained, changes: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"train_samples": None, "val_split": 0.0, "data_seed": None, "seed": 7}
    if "online" in changes:
        changes = {"online": (str(trained.teacher),)}
    if "stores" in changes:
        plain["objective"] = ObjectiveConfig(method="ce")
    base = replace(trainings(trained)[0], **(plain | changes))
    both = [base, replace(base, seed=8)]
    assert [t.data_seed for t in with_orders(both, True)] == [7, 7]
    base = replace(trainings(trained)[0], **plain)
    both = [base, replace(base, seed=8)]
    assert with_orders(both, True) == both
    assert [t.data_seed for t in with_orders(both, False)] == [7, 7]
    with pytest.raises(UsageError, match="data-seed is 7 in training 1 and 9 in training 2"):
        with_orders([base, replace(base, data_seed=9)], False)


def test_so_it_is_with_files(tmp_path: Path) -> None:
    """What loads files draws nothing that layers would draw."""
    rng = np.random.default_rng(0)
    for split, number in product(("train", "val"), range(16)):
        file = tmp_path / "photos" / split / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(file)
    base = Training(
        dataset=f"folder:{tmp_path / 'photos'}",
        model=DROPOUT,
        augment="resized-crop-flip:size=8",
        optimization=Optimization(epochs=2, batch_size=8),
        data_seed=0,
    )
    how = [replace(base, seed=seed) for seed in (1, 2)]
    together = train_together(how, folders(tmp_path / "together", 2))
    for training, run in zip(how, together, strict=True):
        alone = train(training, tmp_path / "alone" / run.path.name)
        assert weights(run.path) == weights(alone.path)


def test_the_views_are_made_once(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    stream = ViewPlan.stream

    def counted(self: ViewPlan, *args: Any, **options: Any) -> Iterator[ImageBatch]:
        for batch in stream(self, *args, **options):
            made.append(len(batch))
            yield batch

    monkeypatch.setattr(ViewPlan, "stream", counted)
    counts = []
    for number in (1, 4):
        made.clear()
        train_together(trainings(trained)[:number], folders(tmp_path / str(number), number))
        counts.append(sum(made))
    assert counts[0] == counts[1] > 4 * 64


def test_a_teacher_in_the_loop_is_asked_once(trained: Trained, tmp_path: Path) -> None:
    how = trainings(trained, online=(str(trained.teacher),))
    with prepared_together(how, folders(tmp_path)) as loop:
        batch = next(loop.views.epoch(0))
        taught, forwards = loop._with_teachers(batch)
        assert forwards == batch.total
        assert set(taught.teachers[0]) >= {"logits"}
        loop.train_epoch(0)
    assert [course.teacher_forwards for course in loop.courses] == [len(loop.views.rows)] * 4


class StopAt(Unwatched):
    def __init__(self, epoch: int, done: int) -> None:
        self.at = epoch, done

    def step(self, epoch: int, done: int, total: int) -> None:
        if (epoch, done) == self.at:
            raise KeyboardInterrupt


def test_interrupted_at_any_time_they_end_with_the_same_bytes(
    trained: Trained, tmp_path: Path
) -> None:
    how = trainings(trained)
    whole = train_together(how, folders(tmp_path / "whole"))
    cut = folders(tmp_path / "cut")
    for epoch in (1, 3):
        watches = [Unwatched(), Unwatched(), StopAt(epoch, 2), Unwatched()]
        with pytest.raises(KeyboardInterrupt):
            train_together(how, cut, watches)
    # One of them is further than the others, one has lost its checkpoint, one is trained alone.
    (cut[0] / "checkpoint.pt").unlink()
    train(how[1], cut[1])
    torch.manual_seed(99)
    train_together(how, cut)
    for one, other in zip(whole, cut, strict=True):
        assert weights(one.path) == weights(other)
        assert without_times(one.path) == without_times(other)


def test_one_that_explodes_does_not_take_the_others_along(trained: Trained, tmp_path: Path) -> None:
    how = trainings(trained)
    how[1] = replace(how[1], optimization=replace(STEPS, lr=1e30))
    with pytest.raises(TrainingError, match=r"epoch 1 of .*1, first at step \d") as caught:
        train_together(how, folders(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    finished = [(folder / "summary.json").exists() for folder in folders(tmp_path / "run")]
    assert finished == [True, False, True, True]


@pytest.mark.parametrize(("changes", "what"), [
    ({"data_seed": 6}, "data-seed is 5 in training 1 and 6 in training 3"),
    ({"optimization": replace(STEPS, batch_size=8)}, "batch-size is 16"),
    ({"optimization": replace(STEPS, epochs=5)}, "epochs is 4"),
    ({"train_samples": 90}, "train-samples is 80"),
    ({"objective": ObjectiveConfig(method="mlkd")}, "weak and strong views is False"),
])  # fmt: skip
def test_what_cannot_share_a_stream_is_refused(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    how = trainings(trained)
    how[2] = replace(how[2], **changes)
    with pytest.raises(UsageError, match=what):
        train_together(how, folders(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_each_needs_a_directory_of_its_own(trained: Trained, tmp_path: Path) -> None:
    for outs in ([tmp_path / "a"] * 4, [tmp_path / "a"]):
        with pytest.raises(UsageError, match="4 trainings need a directory each"):
            train_together(trainings(trained), outs)
    with pytest.raises(UsageError, match="found none"):
        train_together([], [])


def test_a_run_of_another_configuration_is_refused_before_any_is_trained(
    trained: Trained, tmp_path: Path
) -> None:
    how = trainings(trained)
    train(replace(how[3], seed=9), tmp_path / "run" / "3")
    with pytest.raises(MismatchError, match=r"training\.seed was 9, now 3"):
        train_together(how, folders(tmp_path / "run"))
    assert not any((folder / "metrics.jsonl").exists() for folder in folders(tmp_path / "run", 3))

"""A loss that explodes while it stays finite stops a run; none that a healthy run shows does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import train
from kdcache.runs import read_metrics
from kdcache.training.learning.explosion import LossWatch
from kdcache.training.observer import Unwatched
from kdcache_stores import TrainingError
from tests.conftest import Trained
from tests.kdcache.training.job import training

PLAIN = "tests.kdcache.training.networks:plain"
ZERO = "tests.kdcache.training.networks:zero_head"


def epochs_of(watch: LossWatch, *epochs: list[float], ignorant: float = 2.0) -> None:
    for epoch, losses in enumerate(epochs):
        watch.begin(torch.tensor(ignorant), len(losses))
        for index, loss in enumerate(losses):
            watch.add(index, torch.tensor(loss))
        watch.end(epoch, Path("run"))


def watch(steps: int = 1000) -> LossWatch:
    return LossWatch(steps, torch.device("cpu"))


def test_fifty_steps_above_twenty_times_the_beginning_are_an_explosion() -> None:
    epochs_of(watch(), [2.5] * 60, [50.0] * 60)
    with pytest.raises(
        TrainingError, match=r"epoch 2 of run.*50 steps that end with step 50 is 50\.1"
    ):
        epochs_of(watch(), [2.5] * 60, [50.1] * 60)
    with pytest.raises(TrainingError, match=r"epoch 1 of run.*end with step 50 .*none yet"):
        epochs_of(watch(), [2.0] + [1e6] * 60)


def test_a_window_reaches_over_the_ends_of_epochs() -> None:
    with pytest.raises(TrainingError, match=r"epoch 3 .* step 10 .*checkpoint is of epoch 2"):
        epochs_of(watch(), [2.5] * 20, [2.5] * 20, [260.0] * 20)
    epochs_of(watch(), [2.5] * 20, [2.5] * 20, [240.0] * 5 + [2.5] * 15)


@pytest.mark.parametrize(
    "losses",
    [
        [2.5] * 30 + [1500.0] + [2.5] * 60,  # one bad batch
        [2.5] * 30 + [60.0] * 40 + [2.5] * 30,  # a bad stretch, but not of 50 steps
        [300.0] + [900.0] * 60 + [3.0] * 30,  # ill-scaled at its start, and on its way down
        [1e-4] * 50 + [3.0] * 50,  # fine-tuned: next to nothing at its start, then a student's loss
        [0.0] * 100,
    ],
    ids=["spike", "stretch", "start", "fine-tuned", "zero"],
)
def test_what_is_no_explosion(losses: list[float]) -> None:
    epochs_of(watch(), losses, losses)


def test_a_short_run_is_judged_by_all_of_its_steps() -> None:
    with pytest.raises(TrainingError, match=r"the 6 steps that end with step 3"):
        epochs_of(watch(6), [2.0, 500.0, 500.0], [500.0] * 3)


def test_a_state_goes_on_where_it_was() -> None:
    first, second = watch(), watch()
    epochs_of(first, [2.5] * 30)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.begin(torch.tensor(2.0), 20)
        for index in range(20):
            each.add(index, torch.tensor(2000.0 * (index > 17)))
        with pytest.raises(TrainingError, match="end with step 20"):
            each.end(1, Path("run"))


WILD = {"epochs": 30, "batch_size": 5, "lr": 60.0, "momentum": 0.0, "lr_schedule": "constant"}


class StopIn(Unwatched):
    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def step(self, epoch: int, done: int, total: int) -> None:
        if epoch == self.at and done == 2:
            raise KeyboardInterrupt


def test_a_run_that_explodes_stops_at_the_same_step_after_a_resume(
    trained: Trained, tmp_path: Path
) -> None:
    options = {"optimization": WILD, "precision": "float32"}
    messages = []
    for name, interrupted in (("whole", None), ("cut", StopIn(3))):
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(training(options), tmp_path / name, interrupted)
        with pytest.raises(TrainingError, match=r"exploded in epoch 5 of .*epoch 4") as caught:
            train(training(options), tmp_path / name)
        messages.append(str(caught.value).replace(str(tmp_path / name), ""))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "objective",
    [
        {"method": "dkd", "ce_weight": 0.0, "options": {"warmup": 30}},
        {"method": "dkd", "standardize": "unbiased", "options": {"warmup": 30}},
        {"method": "ctkd"},
        {"method": "kd", "kd_weight": 1e-6, "ce_weight": 0.0},
    ],
    ids=str,
)
def test_warm_ups_and_small_losses_are_no_explosion(
    trained: Trained, tmp_path: Path, objective: dict[str, Any]
) -> None:
    """The student learns nothing, so all that changes is what the schedule of the loss changes."""
    how = {"epochs": 31, "batch_size": 50, "lr": 1e-12}
    options = {"stores": [str(trained.store)], "objective": objective, "optimization": how}
    losses = [
        r["train_loss"] for r in read_metrics(train(training(options), tmp_path / "run").path)
    ]
    if objective["method"] == "dkd" and objective.get("ce_weight") == 0:
        assert losses[-1] > 20 * losses[0]


@pytest.mark.parametrize("precision", ["float32", "fp16", "bf16"])
def test_a_student_whose_head_starts_at_zero_learns_as_others_do(
    trained: Trained, tmp_path: Path, precision: str
) -> None:
    options = {
        "stores": [str(trained.store)], "objective": {"method": "kd", "standardize": "unbiased"},
        "optimization": {"epochs": 8, "batch_size": 16, "lr": 0.01}, "precision": precision,
        "train_samples": 200,
    }  # fmt: skip
    usual, zero = (
        read_metrics(train(training(options | {"model": model}), tmp_path / model[-4:]).path)
        for model in (PLAIN, ZERO)
    )
    assert zero[0]["train_ce"] < 1.5 * usual[0]["train_ce"]
    assert zero[-1]["train_loss"] < 1.5 * usual[-1]["train_loss"]
    assert zero[-1]["test_top1"] > usual[-1]["test_top1"] - 0.1

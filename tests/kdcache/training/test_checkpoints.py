"""Checkpoints: as often as asked, never lost but to a kill, written beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import train
from kdcache.runs import Run, read_metrics
from kdcache.training.checkpoints import Checkpoints, Pace
from kdcache.training.observer import Unwatched
from kdcache_stores import DataError, UsageError
from tests.kdcache.training.job import training

HOW = {"optimization": {"epochs": 5, "batch_size": 25}}


class Noted(Run):
    """A run that notes what is written; the second one waits for leave, or fails."""

    def __init__(self, path: Path, error: Exception | None = None) -> None:
        super().__init__(path, {})
        self.error, self.leave = error, threading.Event()
        self.written: list[int] = []

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        if len(self.written) == 1:
            self.leave.wait(10)
            if self.error is not None:
                raise self.error
        self.written.append(int(state["weights"]))


def keep(checkpoints: Checkpoints, epochs: range) -> None:
    weights = torch.zeros(())
    for epoch in epochs:
        weights.fill_(epoch)  # as an optimizer changes them: what was kept must be a copy
        checkpoints.keep({"weights": weights})


def test_every_so_many_epochs_and_after_the_last(tmp_path: Path) -> None:
    run = Noted(tmp_path / "run")
    run.leave.set()
    with Checkpoints(run, Pace(epochs=3)) as checkpoints:
        for epoch in range(1, 9):
            keep(checkpoints, range(epoch, epoch + 1))
            if checkpoints._writing:
                checkpoints._writing.result()
    assert run.written == [3, 6, 8]


def test_time_has_to_pass(tmp_path: Path) -> None:
    run = Noted(tmp_path / "run")
    with Checkpoints(run, Pace(seconds=3600)) as checkpoints:
        keep(checkpoints, range(1, 5))
    assert run.written == [4]


def test_the_training_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    run = Noted(tmp_path / "run")
    with Checkpoints(run, Pace()) as checkpoints:
        keep(checkpoints, range(1, 2))
        assert checkpoints._writing is not None
        checkpoints._writing.result()
        keep(checkpoints, range(2, 5))  # 2 is being written all the while
        run.leave.set()
    assert run.written == [1, 2, 4]


def test_an_interruption_loses_no_epoch(tmp_path: Path) -> None:
    run = Noted(tmp_path / "run")

    def interrupted() -> None:
        with Checkpoints(run, Pace(seconds=3600)) as checkpoints:
            keep(checkpoints, range(1, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert run.written == [3]


def test_an_error_of_the_disk_stops_the_training(tmp_path: Path) -> None:
    run = Noted(tmp_path / "run", DataError("the disk is full"))
    run.leave.set()

    def training() -> None:
        with Checkpoints(run, Pace()) as checkpoints:
            keep(checkpoints, range(1, 2))
            assert checkpoints._writing is not None
            checkpoints._writing.result()
            keep(checkpoints, range(2, 3))
            assert checkpoints._writing.exception() is not None
            keep(checkpoints, range(3, 4))
            raise AssertionError("it went on")

    with pytest.raises(DataError, match="full"):
        training()


@pytest.mark.parametrize("text", ["0", "-1", "x", "5d", "1.5", "", "0s"])
def test_a_pace_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--checkpoint-every"):
        Pace.parse(text)


def test_a_run_resumes_from_an_old_checkpoint_with_the_same_bytes(tmp_path: Path) -> None:
    """Epochs that were recorded after the checkpoint are trained again."""
    whole = train(training(HOW), tmp_path / "whole")

    class Killed(Unwatched):
        def epoch(self, record: dict[str, Any], epochs: int) -> None:
            if record["epoch"] == 4:  # as a kill: what had not been written is lost
                while not (tmp_path / "cut/checkpoint.pt").exists():
                    time.sleep(0.01)
                (tmp_path / "old.pt").write_bytes((tmp_path / "cut/checkpoint.pt").read_bytes())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(training(HOW), tmp_path / "cut", Killed(), checkpoint_every="3")
    (tmp_path / "old.pt").rename(tmp_path / "cut/checkpoint.pt")
    state = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)
    assert state["epochs_done"] == 3 < len(read_metrics(tmp_path / "cut")) == 4
    cut = train(training(HOW), tmp_path / "cut")
    assert [r["epoch"] for r in read_metrics(cut.path)] == [1, 2, 3, 4, 5]
    weights = [(run.path / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]

"""Students that teach each other: their steps, their checkpoints, what cannot be."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import read_config, read_metrics
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared_together, train_together
from kdcache_stores import TrainingError, UsageError

STEPS = Optimization(epochs=3, batch_size=32, lr=0.05)
NETWORKS = "tests.kdcache.training.networks"


def peers(count: int = 2, **changes: Any) -> list[Training]:
    base = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="dml"),
        optimization=STEPS, train_samples=96, data_seed=5,
    )  # fmt: skip
    return [replace(base, seed=seed, **changes) for seed in range(count)]


def folders(where: Path, count: int = 2) -> list[Path]:
    return [where / str(number) for number in range(count)]


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def without_times(run: Path) -> list[dict[str, Any]]:
    times = {"seconds", "data_wait_seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in times} for r in read_metrics(run)]


def as_published(networks: list[nn.Module], batch: Any, inputs: Tensor, rate: float) -> None:
    """One step of each network in turn, by plain gradient descent, with what the others say by then."""
    for index, network in enumerate(networks):
        logits = network(inputs)
        loss = F.cross_entropy(logits, batch.labels)
        for peer in networks[:index] + networks[index + 1 :]:
            said = copy.deepcopy(peer)(inputs).detach()
            divergence = F.kl_div(logits.log_softmax(1), said.softmax(1), reduction="batchmean")
            loss = loss + divergence / (len(networks) - 1)
        network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter -= rate * parameter.grad


@pytest.mark.parametrize("count", [2, 3])
def test_each_learns_in_turn_from_what_the_others_say(tmp_path: Path, count: int) -> None:
    plain = replace(
        STEPS, momentum=0.0, weight_decay=0.0, nesterov=False, lr_schedule="step", milestones=()
    )
    with prepared_together(peers(count, optimization=plain), folders(tmp_path, count)) as loop:
        networks = [copy.deepcopy(course.learner.model).train() for course in loop.courses]
        loop.train_epoch(0)
        for batch in loop.views.epoch(0):
            as_published(networks, batch, loop.preprocessing(batch.images), plain.lr)
    for course, network in zip(loop.courses, networks, strict=True):
        mine = course.learner.model.state_dict()
        for name, expected in network.state_dict().items():
            torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5)


class StopAt(Unwatched):
    def __init__(self, epoch: int, done: int) -> None:
        self.at = epoch, done

    def step(self, epoch: int, done: int, total: int) -> None:
        if (epoch, done) == self.at:
            raise KeyboardInterrupt


def test_interrupted_at_any_time_they_end_with_the_same_bytes(tmp_path: Path) -> None:
    how = peers(model=f"{NETWORKS}:with_dropout")
    whole = train_together(how, folders(tmp_path / "whole"))
    cut = folders(tmp_path / "cut")
    kept: list[bytes] = []
    for epoch in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            train_together(how, cut, [Unwatched(), StopAt(epoch, 2)], checkpoint_every="1")
        kept.append((cut[0] / "checkpoint.pt").read_bytes())
    # One was cut off an epoch before the other, as when the process is killed between two files.
    (cut[0] / "checkpoint.pt").write_bytes(kept[0])
    train_together(how, cut)
    for one, other in zip(whole, cut, strict=True):
        assert weights(one.path) == weights(other)
        assert without_times(one.path) == without_times(other)
    assert weights(cut[0]) != weights(cut[1])
    assert read_config(cut[0])["peers"] == [
        f"{NETWORKS}:with_dropout, seed 0", f"{NETWORKS}:with_dropout, seed 1",
    ]  # fmt: skip
    assert json.loads((cut[0] / "summary.json").read_text())["teacher_forwards"] == 0


def test_one_whose_peer_is_finished_cannot_begin_anew(tmp_path: Path) -> None:
    how, outs = peers(), folders(tmp_path)
    train_together(how, outs)
    before = weights(outs[1])
    # Its own checkpoint has all that its summary needs.
    for file in ("summary.json", "model.safetensors"):
        (outs[1] / file).unlink()
    train_together(how, outs)
    assert weights(outs[1]) == before
    for file in outs[1].iterdir():
        file.unlink()
    with pytest.raises(
        TrainingError, match=r"is at epoch 0, and .*0, whose student teaches it, is"
    ):
        train_together(how, outs)
    assert (outs[0] / "summary.json").exists()


def test_one_that_explodes_ends_those_that_learn_from_it(tmp_path: Path) -> None:
    how = peers(3)
    how[1] = replace(how[1], optimization=replace(STEPS, lr=1e30))
    how[2] = replace(how[2], objective=ObjectiveConfig(method="ce"))
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 1 of .*/[01], first at"):
        train_together(how, folders(tmp_path / "run", 3))
    finished = [(out / "summary.json").exists() for out in folders(tmp_path / "run", 3)]
    assert finished == [False, False, True]

    with prepared_together(peers(), folders(tmp_path / "one")) as loop:
        loop.train_epoch(0)
        loop.courses[1].learner.losses.losses.fill_(torch.nan)
        assert loop._sound(loop.courses, 0) == []
    first, second = (out for out in folders(tmp_path / "one"))
    expected = f"{first} ends with {second}, whose student teaches it."
    assert str(loop.courses[0].failure) == expected


def test_who_has_no_peers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found one: give --seed twice"):
        train(peers()[0], tmp_path / "run")
    with pytest.raises(
        UsageError, match="nothing to teach each other, found resnet8, seed 0; resnet8"
    ):
        train_together([peers()[0]] * 2, folders(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_them(kdcache: Any, tmp_path: Path) -> None:
    command = ["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "dml",
               "--epochs", "1", "--train-samples", "64", "--out", str(tmp_path)]  # fmt: skip
    done = kdcache(*command, "--seed", "0")
    assert done.code == 2
    assert "give --seed twice" in done.err
    done = kdcache(*command, "--seed", "0", "--seed", "1")
    assert done.code == 0, done.err
    for seed in (0, 1):
        record = read_metrics(tmp_path / f"dml-seed{seed}")[0]
        assert record["train_kd"] > 0

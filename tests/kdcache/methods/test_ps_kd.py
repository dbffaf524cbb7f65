"""PS-KD against its formula, epoch after epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.ps_kd import ps_kd
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache_stores.errors import DataError, UsageError

KEYS, LABELS = torch.tensor([30, 10, 20, 40]), torch.tensor([0, 2, 1, 2])


def logits(seed: int) -> Tensor:
    return torch.tensor(3 * np.random.default_rng(seed).standard_normal((4, 3)))


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def formula(v: np.ndarray, y: np.ndarray, earlier: np.ndarray, share: float) -> float:
    target = (1 - share) * np.eye(3)[y] + share * earlier
    return float(-(target * np.log(softmax(v))).sum(1).mean())


def objective() -> Objective:
    return Objective(ObjectiveConfig(method="ps-kd"), Nets({"logits": (3,)}, {}, keys=KEYS))


def test_ps_kd_is_its_formula() -> None:
    v, p = logits(0), logits(1).softmax(-1)
    expected = formula(v.numpy(), LABELS.numpy(), p.numpy(), 0.3)
    assert ps_kd(v, LABELS, p, share=0.3).item() == pytest.approx(expected)
    torch.testing.assert_close(ps_kd(v, LABELS, p, share=0.0), ce(v, LABELS))
    assert torch.autograd.gradcheck(lambda v: ps_kd(v, LABELS, p, share=0.3), (v.requires_grad_(),))


def test_the_targets_follow_the_student_s_own_predictions_of_the_epoch_before() -> None:
    whole, epochs = objective(), 4
    earlier = np.eye(3)[LABELS.numpy()]  # of the first epoch, the labels themselves
    for epoch in range(epochs):
        v = logits(epoch)
        order = torch.randperm(4)
        loss, parts = whole({"logits": v[order]}, [], LABELS[order],
                            Step(epoch=epoch, epochs=epochs, keys=KEYS[order]))  # fmt: skip
        share = 0.8 * (epoch + 1) / epochs
        expected = formula(v.numpy(), LABELS.numpy(), earlier, share)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert parts["kd_share"].item() == 1
        earlier = softmax(v.numpy())


def test_looking_at_a_loss_keeps_nothing() -> None:
    whole = objective().eval()
    whole({"logits": logits(0)}, [], LABELS, Step(keys=KEYS))
    assert whole.state_dict()["loss.predictions"].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    step = Step(keys=KEYS)
    with pytest.raises(DataError, match="unlabelled"):
        objective()({"logits": logits(0)}, [], -torch.ones(4, dtype=torch.int64), step)
    with pytest.raises(UsageError, match="without mixup"):
        objective()({"logits": logits(0)}, [], LABELS, step, (LABELS, torch.ones(4)))
    with pytest.raises(UsageError, match="ps-kd has no teacher: leave out temperature"):
        Objective(method="ps-kd", temperature=4.0)


class Stop(Unwatched):
    def epoch(self, record: dict[str, object], epochs: int) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_training_remembers(tmp_path: Path) -> None:
    training = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="ps-kd"),
        optimization=Optimization(epochs=3, batch_size=50), train_samples=100,
    )  # fmt: skip
    whole = train(training, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(training, tmp_path / "run", Stop())
    resumed = train(training, tmp_path / "run")
    assert [r["train_loss"] for r in resumed.metrics()] == [
        r["train_loss"] for r in whole.metrics()
    ]
    assert (tmp_path / "run/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()

"""DML and BYOT against formulas of their own, written with NumPy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.mutual.byot import Exit, byot
from kdcache.methods.mutual.dml import dml
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.models.zoo import build_model
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache_stores.errors import DataError, UsageError


class Stop(Unwatched):
    def epoch(self, record: dict[str, object], epochs: int) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt


LABELS = torch.tensor([0, 2, 1, 2])


def array(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(1)


def cross_entropy(v: np.ndarray) -> np.ndarray:
    return -np.log(softmax(v))[np.arange(4), LABELS.numpy()]


# -- DML ---------------------------------------------------------------------------------------------
def test_dml_is_its_formula() -> None:
    v, peer = array(0, 4, 3), array(1, 4, 3)
    expected = kl(softmax(peer.numpy()), softmax(v.numpy()))
    np.testing.assert_allclose(dml(v, peer, reduction="none"), expected)
    assert dml(v, peer).item() == pytest.approx(expected.mean())
    assert torch.autograd.gradcheck(lambda v: dml(v, peer), (v.requires_grad_(),))


def test_of_several_peers_it_takes_the_mean() -> None:
    v, peers = array(0, 4, 3), [array(seed, 4, 3) for seed in (1, 2, 3)]
    loss, parts = Objective(method="dml")(
        {"logits": v}, [{"logits": peer.requires_grad_()} for peer in peers], LABELS
    )
    divergences = [kl(softmax(p.detach().numpy()), softmax(v.numpy())).mean() for p in peers]
    assert parts["kd"].item() == pytest.approx(np.mean(divergences))
    expected = cross_entropy(v.numpy()).mean() + np.mean(divergences)
    assert loss.item() == pytest.approx(expected)
    assert not loss.requires_grad  # the peers are detached


def test_what_dml_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one other student, found none"):
        Objective(method="dml")({"logits": array(0, 4, 3)}, [], LABELS)
    with pytest.raises(UsageError, match="dml has no teacher: leave out noise"):
        ObjectiveConfig.from_flags({"method": "dml", "noise": "gaussian:0.1"})
    for first, added in (("dml", "kd"), ("kd", "dml")):
        with pytest.raises(UsageError, match="dml learns from the students beside it alone"):
            ObjectiveConfig(method=first, add=(added,))


# -- BYOT --------------------------------------------------------------------------------------------
def test_byot_is_its_formula() -> None:
    deepest = array(0, 4, 5), array(1, 4, 3)
    exits = [(array(2, 4, 5), array(3, 4, 3)), (array(4, 4, 5), array(5, 4, 3))]
    terms = byot(deepest, exits, LABELS, alpha=0.2, temperature=3.0, hint=0.01)
    expected = np.zeros(4)
    for features, logits in exits:
        f, v = features.numpy(), logits.numpy()
        taught = 9 * kl(softmax(deepest[1].numpy() / 3), softmax(v / 3))
        distance = ((f - deepest[0].numpy()) ** 2).sum(1)
        expected += 0.8 * cross_entropy(v) + 0.2 * taught + 0.01 * distance
    np.testing.assert_allclose(terms["kd"], expected)
    flat = [values.requires_grad_() for pair in exits for values in pair]

    def total(*values: Tensor) -> Tensor:
        pairs = [(values[0], values[1]), (values[2], values[3])]
        return byot(deepest, pairs, LABELS, alpha=0.2, temperature=3.0, hint=0.01)["kd"].sum()

    assert torch.autograd.gradcheck(total, flat)
    deep = [values.requires_grad_() for values in deepest]
    grads = torch.autograd.grad(
        byot((deep[0], deep[1]), exits, LABELS, alpha=0.2, temperature=3.0, hint=0.01)["kd"].sum(),
        deep,
        allow_unused=True,
    )
    assert grads == (None, None)  # the deepest classifier learns nothing from its exits


def test_byot_in_an_objective() -> None:
    torch.manual_seed(0)
    shapes = {"logits": (3,), "stage_1": (2, 8, 8), "stage_2": (4, 4, 4), "stage_3": (6, 2, 2),
              "pooled": (6,)}  # fmt: skip
    objective = Objective(ObjectiveConfig(method="byot"), Nets(shapes, {}))
    student = {name: array(i, 4, *shape).float() for i, (name, shape) in enumerate(shapes.items())}
    loss, parts = objective(student, [], LABELS)
    exits = list(objective.loss.exits)  # type: ignore[union-attr, arg-type]
    assert [len(leave.layers) for leave in exits] == [
        9,
        6,
    ]  # two and one halvings, and the last three
    expected = 0.9 * F.cross_entropy(student["logits"], LABELS)
    for name, leave in zip(("stage_1", "stage_2"), exits, strict=True):
        features, logits = leave(student[name])
        soft = F.kl_div(
            (logits / 3).log_softmax(1), (student["logits"] / 3).softmax(1), reduction="batchmean"
        )
        distance = F.mse_loss(features, student["pooled"], reduction="sum") / 4
        expected += 0.9 * F.cross_entropy(logits, LABELS) + 0.1 * 9 * soft + 1e-6 * distance
    torch.testing.assert_close(loss, expected)
    assert parts["kd_share"] > 0.5
    with pytest.raises(DataError, match="unlabelled"):
        objective(student, [], -torch.ones(4, dtype=torch.int64))
    with pytest.raises(UsageError, match="after its shallower stages, and it has one"):
        Objective(
            ObjectiveConfig(method="byot"),
            Nets({"logits": (3,), "stage_1": (2, 8, 8), "pooled": (2,)}, {}),
        )


def test_byot_trains_without_a_teacher_and_goes_on(tmp_path: Path) -> None:
    how = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="byot"),
        optimization=Optimization(epochs=3, batch_size=50), train_samples=100,
    )  # fmt: skip
    whole = train(how, tmp_path / "whole")
    first, *_, last = (record["train_exits_ce"] for record in whole.metrics())
    assert last < first
    with pytest.raises(KeyboardInterrupt):
        train(how, tmp_path / "run", Stop())
    train(how, tmp_path / "run")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert set(load_file(tmp_path / "run/model.safetensors")) == set(
        build_model("resnet8", 10, 1, 8).state_dict()
    )


@pytest.mark.parametrize(("size", "last"), [((7, 7), (7, 7)), ((28, 14), (7, 7)), ((9, 9), (3, 3))])
def test_an_exit_ends_at_the_size_of_the_last_map(
    size: tuple[int, int], last: tuple[int, int]
) -> None:
    leave = Exit((2, *size), last, 5, 3)
    features, logits = leave(torch.randn(2, 2, *size))
    assert (features.shape, logits.shape) == ((2, 5), (2, 3))
    height, width = leave.layers(torch.randn(2, 2, *size)).shape[2:]
    assert height <= last[0]
    assert width <= last[1]

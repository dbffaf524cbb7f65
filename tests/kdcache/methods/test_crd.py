"""CRD against its published estimator: by hand on a tiny bank, and a plain PyTorch form of its code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.crd import CRD, crd, similarities
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UsageError

N, K, CLASSES = 12, 5, 3
KEYS = torch.arange(N).flip(0) * 1000 - 4000  # in no order, some of them negative
LABELS = torch.arange(N) % CLASSES


def array(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def nets(**changes: Any) -> Nets:
    known: dict[str, Any] = {
        "student": {"logits": (CLASSES,), "pooled": (4,)},
        "teacher": {"pooled": (6,)},
        "keys": KEYS,
        "labels": LABELS,
    }
    return Nets(**(known | changes))


def objective(**options: Any) -> Objective:
    torch.manual_seed(0)
    config = ObjectiveConfig(method="crd", options={"negatives": K, "dim": 3} | options)
    return Objective(config, nets())


def test_the_estimator_by_hand() -> None:
    """A positive at .3 and negatives at .1 and .2, of N = 4 samples: K/N = .5."""
    loss = crd(torch.tensor([[0.3, 0.1, 0.2]]).double(), 4)
    expected = -math.log(0.3 / 0.8) - math.log(0.5 / 0.6) - math.log(0.5 / 0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


class Published:
    """The contrast of the published code, with its bank, written anew in float64 NumPy."""

    def __init__(self, of_student: np.ndarray, of_teacher: np.ndarray) -> None:
        self.bank = {"s": of_student.copy(), "t": of_teacher.copy()}
        self.z: dict[str, float] = {}

    def step(self, s: np.ndarray, t: np.ndarray, places: np.ndarray) -> float:
        """Embeddings (B, D) of unit length, places (B, 1 + K) with the positive first."""
        total = 0.0
        for own, vectors, other in (("s", s, "t"), ("t", t, "s")):
            out = np.exp(np.einsum("bd,bmd->bm", vectors, self.bank[other][places]) / 0.07)
            self.z.setdefault(own, out.mean() * N)
            out = out / self.z[own]
            noise = K / N
            positive = np.log(out[:, 0] / (out[:, 0] + noise + 1e-7))
            negatives = np.log(noise / (out[:, 1:] + noise + 1e-7))
            total += -(positive.sum() + negatives.sum()) / len(s)
        for own, vectors in (("s", s), ("t", t)):
            mean = 0.5 * self.bank[own][places[:, 0]] + 0.5 * vectors
            self.bank[own][places[:, 0]] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return total


def embedded(layer: torch.nn.Linear, x: Tensor) -> np.ndarray:
    y = (x @ layer.weight.double().mT + layer.bias.double()).detach().numpy()
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_three_steps_are_those_of_the_published_code() -> None:
    whole = objective()
    loss = whole.loss
    assert isinstance(loss, CRD)
    own = Published(loss.of_student.double().numpy(), loss.of_teacher.double().numpy())
    for index in range(3):
        rows = torch.randperm(N)[:4]
        student = {"logits": array(index, 4, CLASSES), "pooled": array(index + 10, 4, 4)}
        target = array(index + 20, 4, 6)
        step = Step(index=index, keys=KEYS[rows])
        places = loss.draw(loss.places.of(step), LABELS[rows], step).numpy()
        expected = own.step(
            embedded(loss.embed_student, student["pooled"]),
            embedded(loss.embed_teacher, target),
            places,
        )
        _, parts = whole(student, [{"pooled": target}], LABELS[rows], step)
        assert parts["kd"].item() == pytest.approx(expected, rel=1e-4)
        assert parts["kd_weighted"].item() == pytest.approx(0.8 * expected, rel=1e-4)
        np.testing.assert_allclose(loss.of_student, own.bank["s"], atol=1e-5)
        np.testing.assert_allclose(loss.of_teacher, own.bank["t"], atol=1e-5)


def test_negatives_are_of_other_classes_and_uniform_among_them() -> None:
    loss = objective(negatives=2000).loss
    assert isinstance(loss, CRD)
    order = KEYS.argsort()
    labels = LABELS[order]  # by place
    places, step = torch.arange(N), Step(epoch=3, index=5)
    drawn = loss.draw(places, labels, step)
    assert torch.equal(drawn[:, 0], places)
    assert (labels[drawn[:, 1:]] != labels[:, None]).all()
    counts = torch.stack([torch.bincount(row, minlength=N) for row in drawn[:, 1:]])
    expected = 2000 / (N - N // CLASSES)
    assert (counts[counts > 0] - expected).abs().max() < 6 * math.sqrt(expected)
    assert (counts > 0).sum(1).tolist() == [N - N // CLASSES] * N
    assert torch.equal(drawn, loss.draw(places, labels, step))
    assert not torch.equal(drawn, loss.draw(places, labels, Step(epoch=3, index=6)))


def test_a_sample_is_known_by_its_key_alone() -> None:
    places = objective().loss.places  # type: ignore[union-attr]
    rows = torch.tensor([3, 0, 11])
    assert torch.equal(KEYS.sort().values[places.of(Step(keys=KEYS[rows]))], KEYS[rows])  # type: ignore[operator, union-attr]
    words = torch.stack([KEYS & 0xFFFFFFFF, KEYS >> 32 & 0xFFFFFFFF], 1)
    assert torch.equal(places.of(Step(keys=words)), places.of(Step(keys=KEYS)))  # type: ignore[operator, union-attr]
    with pytest.raises(DataError, match="not one of those that the training began with"):
        places.of(Step(keys=torch.tensor([7])))  # type: ignore[operator, union-attr]


def test_a_large_bank_gives_what_a_small_one_does() -> None:
    vectors, bank, places = array(0, 4, 3), array(1, 90, 3), torch.randint(90, (4, 5))
    few = similarities(vectors, bank, places)  # 90 > 16 x 5: rows are copied
    many = (vectors @ bank.mT).gather(1, places)
    torch.testing.assert_close(few, many)
    torch.testing.assert_close(similarities(vectors, bank[:80], places % 80),
                               (vectors @ bank[:80].mT).gather(1, places % 80))  # fmt: skip


def test_gradients_by_finite_differences() -> None:
    scores = array(0, 3, 6).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crd(x, N), (scores,))


def test_gradients_reach_both_embeddings_and_the_student_alone() -> None:
    whole = objective()
    pooled = array(0, 4, 4).float().requires_grad_()
    target = array(1, 4, 6).float().requires_grad_()
    student = {"logits": array(2, 4, CLASSES), "pooled": pooled}
    loss, _ = whole(student, [{"pooled": target}], LABELS[:4], Step(keys=KEYS[:4]))
    loss.backward()
    assert pooled.grad is not None
    assert pooled.grad.abs().sum() > 0
    assert target.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whole.parameters())


def test_looking_at_a_loss_changes_no_bank_and_a_checkpoint_holds_them() -> None:
    whole = objective()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    assert {"loss.of_student", "loss.of_teacher", "loss.scale"} < before.keys()
    student = {"logits": array(2, 4, CLASSES), "pooled": array(0, 4, 4)}
    arguments = (student, [{"pooled": array(1, 4, 6)}], LABELS[:4], Step(keys=KEYS[:4]))
    whole.eval()(*arguments)
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())
    whole.train()(*arguments)
    assert not torch.equal(before["loss.of_student"], whole.state_dict()["loss.of_student"])
    again = objective()
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.eval()(*arguments)[0], whole.eval()(*arguments)[0])


def test_what_it_cannot_do_without_is_named() -> None:
    config = ObjectiveConfig(method="crd")
    with pytest.raises(UsageError, match="remembers something of each sample"):
        Objective(config, nets(keys=None))
    with pytest.raises(DataError, match="every sample needs its label"):
        Objective(config, nets(labels=-torch.ones(N, dtype=torch.int64)))
    with pytest.raises(DataError, match="all samples are of one class"):
        Objective(config, nets(labels=torch.zeros(N, dtype=torch.int64)))
    with pytest.raises(UsageError, match="crd distils one teacher, found 2"):
        Objective(config, nets()).check(LABELS, 2)

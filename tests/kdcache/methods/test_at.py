"""AT against its formula in float64 NumPy, from whole feature maps of both networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.fields.maps import attention_at, attention_heights
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.at import AT, at, pairs_of
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache_stores.errors import DataError, UsageError


def smaller(f: np.ndarray, height: int) -> np.ndarray:
    k = f.shape[2] // height
    return f.reshape(*f.shape[:2], height, k, height, k).mean((3, 5))


def unit(f: np.ndarray) -> np.ndarray:
    a = (f**2).mean(1).reshape(len(f), -1)
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def formula(student: list[np.ndarray], teacher: list[np.ndarray]) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=False):
        height = min(s.shape[2], t.shape[2])
        total += ((unit(smaller(s, height)) - unit(smaller(t, height))) ** 2).mean()
    return total


def maps(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal((3, c, h, h))) for c, h in shapes]


def held_by(teacher: list[Tensor]) -> dict[str, Tensor]:
    """The fields of a store."""
    heights = attention_heights([m.shape[2] for m in teacher])
    return {f"attention_{height}": attention_at(teacher, height) for height in heights}


def objective_of(
    student: list[Tensor], held: dict[str, Tensor]
) -> tuple[Objective, dict[str, Tensor]]:
    fields = {f"stage_{i + 1}": m for i, m in enumerate(student)}
    shapes = [{n: tuple(v.shape[1:]) for n, v in f.items()} for f in (fields, held)]
    config = ObjectiveConfig(method="at").resolved()
    read = AT.reads(config, *shapes)
    nets = Nets({"logits": (4,), **shapes[0]}, {name: shapes[1][name] for name in read})
    return Objective(config, nets), fields


@pytest.mark.parametrize(
    ("student", "teacher", "read"),
    [
        ([(2, 16), (3, 8), (4, 4)], [(5, 16), (6, 8), (7, 4)], {16, 8, 4}),  # alike
        ([(2, 8), (3, 4), (4, 2)], [(5, 16), (6, 8), (7, 4)], {8, 4, 2}),  # a smaller student
        ([(2, 16), (3, 16), (4, 8)], [(5, 16), (6, 8), (7, 4)], {16, 8, 4}),  # a larger one
        ([(2, 8), (2, 4), (2, 2), (2, 2)], [(5, 8), (6, 4)], {8, 4}),  # of more stages
        ([(2, 8), (2, 4)], [(5, 16), (6, 8), (7, 4)], {8, 4}),
    ],
)
def test_from_what_a_store_holds_it_is_the_published_loss_of_whole_maps(
    student: list[tuple[int, int]], teacher: list[tuple[int, int]], read: set[int]
) -> None:
    s, t = maps(0, *student), maps(1, *teacher)
    held = held_by(t)
    objective, fields = objective_of(s, held)
    assert set(objective.teacher_fields) == {f"attention_{height}" for height in read}
    logits = torch.randn(3, 4).double()
    loss, parts = objective({"logits": logits, **fields}, [held], torch.arange(3))
    expected = formula([m.numpy() for m in s], [m.numpy() for m in t])
    assert parts["kd"].item() == pytest.approx(expected, rel=1e-9)
    assert parts["kd_weighted"].item() == pytest.approx(1000 * expected, rel=1e-9)
    assert loss.item() == pytest.approx((parts["ce"] + parts["kd_weighted"]).item())


def test_gradients_by_finite_differences() -> None:
    s, t = maps(0, (2, 4), (3, 2)), maps(1, (2, 2), (4, 2))
    aims = [attention_at(t, 2)[:, i] for i in range(2)]
    inputs = [m.requires_grad_() for m in s]
    assert torch.autograd.gradcheck(lambda *m: at(list(m), aims), inputs)


def test_a_network_that_looks_where_its_teacher_does_has_no_loss() -> None:
    t = maps(1, (5, 8))
    same = [3 * t[0][:, torch.randperm(5)]]
    assert at(same, [attention_at(t, 8)[:, 0]]).abs().max() < 1e-12


def test_a_dead_stage_is_finite() -> None:
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = at([dead], [attention_at(maps(1, (5, 4)), 4)[:2, 0].float()]).sum()
    loss.backward()
    assert loss.isfinite()
    assert dead.grad is not None
    assert dead.grad.isfinite().all()


def test_what_is_not_held_is_named_with_what_to_dump() -> None:
    student = {"logits": (4,), "stage_1": (2, 8, 8)}
    with pytest.raises(UsageError, match="found pooled: dump-teacher --fields attention"):
        pairs_of(student, {"pooled": (64,)})
    with pytest.raises(UsageError, match=r"stage 1 at 8 x 8.*held at 16: .*attention@8"):
        pairs_of(student, {"attention_16": (1, 16, 16)})
    with pytest.raises(DataError, match="a stage 4 high with attention 8 high"):
        at(maps(0, (2, 4)), [attention_at(maps(1, (2, 8)), 8)[:, 0]])

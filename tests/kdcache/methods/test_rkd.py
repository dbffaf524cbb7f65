"""RKD against its formula by loops over pairs and triplets, in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.methods.features.rkd import relations, rkd
from kdcache.methods.logits.ce import ce
from kdcache.methods.objective import Objective
from kdcache_stores.errors import DataError, UsageError


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def distances(e: np.ndarray) -> np.ndarray:
    n = len(e)
    d = np.array([[np.sqrt(((e[i] - e[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
    return d / d[d > 0].mean()


def angles(e: np.ndarray) -> np.ndarray:
    n = len(e)
    cosines = np.zeros((n, n, n))
    for i in range(n):
        for j in range(n):
            for k in range(n):
                a, b = e[j] - e[i], e[k] - e[i]
                size = np.linalg.norm(a) * np.linalg.norm(b)
                cosines[i, j, k] = a @ b / size if size > 0 else 0.0
    return cosines


def formula(s: np.ndarray, t: np.ndarray, distance: float, angle: float) -> float:
    d = np.mean([huber(x) for x in (distances(s) - distances(t)).ravel()])
    a = np.mean([huber(x) for x in (angles(s) - angles(t)).ravel()])
    return float(distance * d + angle * a)


def vectors(seed: int, count: int = 5, dim: int = 4) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((count, dim)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 7), dim=st.integers(1, 6),
       distance=st.floats(0, 30), angle=st.floats(0, 60))  # fmt: skip
def test_rkd_is_its_formula(seed: int, count: int, dim: int, distance: float, angle: float) -> None:
    s, t = vectors(seed, count, dim), vectors(seed + 1, count, dim + 2)
    expected = formula(s.numpy(), t.numpy(), distance, angle)
    assert rkd(s, t, distance=distance, angle=angle).item() == pytest.approx(expected, abs=1e-9)


def test_three_points_by_hand() -> None:
    """Legs of 3 and 4: distances 3, 4, 5 with mean 4; cosines 0, .6 and .8 at the three corners."""
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    d, a = relations(triangle)
    assert d.tolist() == pytest.approx(np.array([[0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0]]))
    assert a[0, 1, 2].item() == pytest.approx(0)
    assert a[1, 0, 2].item() == pytest.approx(0.6)
    assert a[2, 0, 1].item() == pytest.approx(0.8)
    assert a[0, 1, 1].item() == pytest.approx(1)
    equal = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]]).double()
    # All distances are 1 there, cosines .5: differences .25, 0, .25 in six of nine pairs; .5, .1, .3 in
    # two of three triplets each at the three corners, of 27.
    assert rkd(equal, triangle, distance=1, angle=0).item() == pytest.approx(
        2 * (0.5 * 0.25**2 * 2) / 9
    )
    assert rkd(equal, triangle, distance=0, angle=1).item() == pytest.approx(
        2 * 0.5 * (0.5**2 + 0.1**2 + 0.3**2) / 27
    )


def test_neither_scale_nor_rotation_nor_place_matters() -> None:
    t = vectors(0)
    turn, _ = torch.linalg.qr(vectors(1, 4, 4))
    assert rkd(3 * t @ turn + 7, t).item() == pytest.approx(0, abs=1e-12)


def test_gradients_by_finite_differences() -> None:
    s, t = vectors(0).requires_grad_(), vectors(1)
    assert torch.autograd.gradcheck(lambda s: rkd(s, t), (s,))
    assert torch.autograd.gradcheck(lambda s: rkd(s, t, distance=0), (s,))


@pytest.mark.parametrize("kind", ["equal", "two equal", "single"])
def test_equal_vectors_and_single_samples_are_finite(kind: str) -> None:
    s = vectors(0).float()
    if kind == "equal":
        s[:] = s[0]
    elif kind == "two equal":
        s[1] = s[0]
    else:
        s = s[:1]
    for student, teacher in ((s, vectors(1)[: len(s)].float()), (vectors(1)[: len(s)].float(), s)):
        student = student.clone().requires_grad_()
        loss = rkd(student, teacher)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def objective(**options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    s, t, v = vectors(0), vectors(1), vectors(2)
    student, teacher = {"logits": v, "pooled": s}, {"pooled": t}
    loss, parts = Objective(method="rkd", **options)(student, [teacher], torch.arange(5) % 4)
    return loss, parts


def test_objective_weighs_it_as_published() -> None:
    s, t, v = vectors(0), vectors(1), vectors(2)
    loss, parts = objective()
    torch.testing.assert_close(loss, ce(v, torch.arange(5) % 4) + rkd(s, t))
    torch.testing.assert_close(parts["kd"], rkd(s, t, distance=25, angle=50))
    _, parts = objective(options={"distance": 1, "angle": 2}, kd_weight=3)
    torch.testing.assert_close(parts["kd_weighted"], 3 * rkd(s, t, distance=1, angle=2))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"a vector per sample, \(5, D\), found \(4, 4\)"):
        rkd(vectors(0), vectors(1, 4))
    with pytest.raises(DataError, match="reads the field 'pooled' of the student"):
        Objective(method="rkd")({"logits": vectors(0)}, [{"pooled": vectors(1)}], torch.arange(5))
    s = {"logits": vectors(0), "pooled": vectors(1)}
    two = [{"pooled": vectors(2)}, {"pooled": vectors(3)}]
    with pytest.raises(UsageError, match="makes one target of 2 teachers by their logits"):
        Objective(method="rkd")(s, two, torch.arange(5) % 4)
    _, parts = Objective(method="rkd", combine="mean-losses")(s, two, torch.arange(5) % 4)
    mean = (rkd(s["pooled"], two[0]["pooled"]) + rkd(s["pooled"], two[1]["pooled"])) / 2
    torch.testing.assert_close(parts["kd"], mean)
    with pytest.raises(UsageError, match="rkd has no standardized form"):
        Objective(method="rkd", standardize="unbiased")

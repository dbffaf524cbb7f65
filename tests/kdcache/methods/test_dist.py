"""DIST against an independent formula, its gradient and the properties of a correlation."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from fields import on_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.methods.ensembles import Ensemble
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.dist import correlation, dist
from kdcache.methods.objective import Objective
from kdcache_stores.errors import DataError, UsageError


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """By sums of squares, with the 1e-8 of the published code and our floor for flat rows."""
    covariance = (a * b).sum() - a.sum() * b.sum() / len(a)
    x, y = (max(z.std(), 0.01 * z.mean()) for z in (a, b))
    return float(covariance / (len(a) * x * y + 1e-8))


def formula(v: np.ndarray, z: np.ndarray, t: float, beta: float, gamma: float) -> float:
    q, p = formulas.softmax(v / t), formulas.softmax(z / t)
    inter = np.mean([1 - pearson(q[i], p[i]) for i in range(q.shape[0])])
    intra = np.mean([1 - pearson(q[:, k], p[:, k]) for k in range(q.shape[1])])
    return float(t**2 * (beta * inter + gamma * intra))


def logits(seed: int, b: int = 6, k: int = 10) -> torch.Tensor:
    return torch.tensor(3 * np.random.default_rng(seed).standard_normal((b, k)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), b=st.integers(2, 9), k=st.integers(3, 20), t=st.floats(1, 8),
    beta=st.floats(0, 5), gamma=st.floats(0, 5),
)  # fmt: skip
def test_dist_is_its_formula(
    seed: int, b: int, k: int, t: float, beta: float, gamma: float
) -> None:
    v, z = logits(seed, b, k), logits(seed + 1, b, k)
    loss = dist(v, z, temperature=t, beta=beta, gamma=gamma).item()
    expected = formula(v.numpy(), z.numpy(), t, beta, gamma)
    assert loss == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_it_is_the_correlation_that_numpy_has() -> None:
    v, z = logits(0), logits(1)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(v, z, strict=True)]
    np.testing.assert_allclose(correlation(v, z), expected, rtol=1e-8)


def test_gradients_by_finite_differences() -> None:
    v, z = logits(0, 4, 5).requires_grad_(), logits(1, 4, 5)
    assert torch.autograd.gradcheck(lambda v: dist(v, z), (v,))
    assert torch.autograd.gradcheck(lambda v: dist(v, z, beta=0), (v,))
    assert torch.autograd.gradcheck(lambda v: dist(v, z, gamma=0, temperature=1), (v,))


@settings(deadline=None)
@given(seed=st.integers(0, 99), a=st.floats(0.1, 10), b=st.floats(-3, 3))
def test_correlations_see_neither_scale_nor_shift(seed: int, a: float, b: float) -> None:
    x, y = logits(seed), logits(seed + 1)
    torch.testing.assert_close(correlation(a * x + b, y), correlation(x, y), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(correlation(-a * x + b, x), -torch.ones(6).double())
    assert (correlation(x, y).abs() <= 1).all()


def test_a_student_with_the_teacher_s_preferences_has_no_loss() -> None:
    v = logits(0)
    assert dist(v, v).abs().item() < 1e-3
    # Equal up to a constant per row are the same probabilities; half of the deviation from uniform is
    # another distribution with the same preferences, which KD would go on pulling at.
    p = (v / 4).softmax(-1)
    halfway = 4 * (0.5 * p + 0.5 / 10).log()
    assert dist(halfway, v + torch.arange(6)[:, None]).abs().item() < 1e-3


def test_constant_rows_and_single_samples_are_finite() -> None:
    z, flat = logits(1).float(), torch.zeros(6, 10)
    mixed = torch.cat([logits(0)[:3].float(), flat[:3]])
    for v in (flat, mixed, mixed[:1], flat[:1]):
        student = v.clone().requires_grad_()
        loss = dist(student, z[: len(v)])
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    assert dist(flat, z).item() == pytest.approx(64, abs=0.1)  # all correlations are 0


@pytest.mark.parametrize("deviation", [0, 1e-6, 1e-3])
def test_a_student_of_hardly_any_spread_has_a_gradient_of_the_usual_size(deviation: float) -> None:
    def gradient(student: torch.Tensor) -> float:
        v = student.clone().requires_grad_()
        dist(v, logits(1, k=100)).backward()
        assert v.grad is not None
        return float(v.grad.norm())

    usual = gradient(0.3 * logits(0, k=100))
    assert 0 < gradient(deviation * logits(0, k=100)) < 5 * usual


def test_rows_of_normal_spread_have_the_published_correlation() -> None:
    q, p = ((0.1 * logits(seed, k=100).float()).softmax(-1) for seed in (0, 1))
    a, b = q - q.mean(-1, keepdim=True), p - p.mean(-1, keepdim=True)
    published = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-8)
    assert torch.equal(correlation(q, p), published)


def test_half_precision_is_computed_in_float32() -> None:
    v, z = logits(0).half(), logits(1).half()
    exact = dist(v.float(), z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dist(v, z) == exact
    assert exact.dtype == torch.float32


def test_objective_weighs_it_as_published() -> None:
    v, z, y = logits(0), logits(1), torch.arange(6)
    loss, parts = on_logits(Objective(method="dist"), v, [z], y)
    torch.testing.assert_close(loss, ce(v, y) + dist(v, z))
    torch.testing.assert_close(parts["kd"], dist(v, z))
    options = {"beta": 1, "gamma": 0.5}
    loss, _ = on_logits(Objective(method="dist", alpha=0, options=options), v, [z], y)
    torch.testing.assert_close(loss, dist(v, z, beta=1, gamma=0.5))
    other = logits(2)
    objective = Objective(method="dist", alpha=0, combine="mean-probs")
    mean = dist(v, Ensemble([z, other], [0.5, 0.5], "mean-probs"))
    torch.testing.assert_close(on_logits(objective, v, [z, other], y)[0], mean)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="one shape"):
        dist(logits(0), logits(1, k=9))
    with pytest.raises(UsageError, match="dist has no standardized form"):
        Objective(method="dist", standardize="unbiased")
    with pytest.raises(UsageError, match="dist compares whole batches"):
        Objective(method="dist", weights="entropy", combine="mean-losses")

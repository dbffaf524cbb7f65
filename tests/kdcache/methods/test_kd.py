"""Losses against float64 formulas, closed-form gradients and the properties they are known by."""

from __future__ import annotations

import doctest
import importlib

import formulas
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdcache.methods
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.kd import kd
from kdcache.methods.scaling import scaled, standardize
from kdcache_stores.errors import DataError, UsageError


def logits(seed: int, b: int = 6, k: int = 10, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((b, k))


def labels(seed: int, b: int = 6, k: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, k, b)


def tensor(array: np.ndarray, **options: object) -> torch.Tensor:
    return torch.tensor(array, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("module", "examples"), [("scaling", 9), ("noise", 2), ("objective", 2)])
def test_doctests(module: str, examples: int) -> None:
    namespace = {name: getattr(kdcache.methods, name) for name in kdcache.methods.__all__}
    result = doctest.testmod(
        importlib.import_module(f"kdcache.methods.{module}"),
        extraglobs=namespace,
        optionflags=doctest.ELLIPSIS,
    )
    assert result.failed == 0
    assert result.attempted >= examples


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    b=st.integers(1, 9),
    k=st.integers(2, 30),
    t=st.floats(0.5, 20),
    scale=st.floats(0.01, 30),
)
def test_ce_and_kd_are_their_formulas(seed: int, b: int, k: int, t: float, scale: float) -> None:
    v, z, y = logits(seed, b, k, scale), logits(seed + 1, b, k, scale), labels(seed, b, k)
    assert ce(tensor(v), tensor(y)).item() == pytest.approx(formulas.ce(v, y).mean(), rel=1e-9)
    loss = kd(tensor(v), tensor(z), temperature=t).item()
    assert loss == pytest.approx(formulas.kd(v, z, t), rel=1e-7, abs=1e-11)
    for convention in ("unbiased", "biased"):
        expected = formulas.kd(
            formulas.zscore(v, convention == "biased"),
            formulas.zscore(z, convention == "biased"),
            t,
        )
        loss = kd(tensor(v), tensor(z), temperature=t, standardize=convention).item()
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-10)
    backwards = kd(tensor(v), tensor(z), temperature=t, reverse=True).item()
    assert backwards == pytest.approx(formulas.kd(z, v, t), rel=1e-7, abs=1e-11)


def test_toy_case_as_published() -> None:
    teacher = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    wrong = torch.tensor([[1.0, 2.8, 3.0, 2.0]])
    right = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert kd(wrong, teacher, temperature=1).item() == pytest.approx(0.1749, abs=5e-5)
    assert kd(right, teacher, temperature=1).item() == pytest.approx(0.3457, abs=5e-5)
    for convention, t, expected in (
        ("unbiased", 1, 0.09951),
        ("biased", 1, 0.13470),
        ("unbiased", 2, 0.0220),
        ("biased", 2, 0.0301),
    ):
        loss = kd(wrong, teacher, temperature=t, standardize=convention).item() / t**2
        assert loss == pytest.approx(expected, abs=6e-5)
        assert kd(right, teacher, temperature=t, standardize=convention).item() < 1e-6


def test_two_temperatures_multiply() -> None:
    v, z = logits(0), logits(1)
    loss = kd(tensor(v), tensor(z), teacher_temperature=2.0, student_temperature=3.0)
    assert loss.item() == pytest.approx(6 * formulas.kl(z / 2, v / 3).mean(), rel=1e-9)
    same = kd(tensor(v), tensor(z), teacher_temperature=4.0)
    assert same.item() == kd(tensor(v), tensor(z), temperature=4.0).item()


def test_none_reduction_gives_each_sample() -> None:
    v, z, y = tensor(logits(0)), tensor(logits(1)), tensor(labels(0))
    assert kd(v, z, reduction="none").mean().item() == pytest.approx(kd(v, z).item())
    assert ce(v, y, reduction="none").mean().item() == pytest.approx(ce(v, y).item())
    with pytest.raises(UsageError, match="reduction"):
        kd(v, z, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reduction"):
        ce(v, y, reduction="sum")  # type: ignore[arg-type]


def test_ce_leaves_unlabelled_samples_out() -> None:
    v, y = logits(0), labels(0)
    y[[1, 4]] = -1
    known = y >= 0
    student = tensor(v).requires_grad_()
    loss = ce(student, tensor(y))
    assert loss.item() == pytest.approx(formulas.ce(v[known], y[known]).mean(), rel=1e-9)
    loss.backward()
    assert student.grad is not None
    assert (student.grad[[1, 4]] == 0).all()
    assert (student.grad[0] != 0).all()
    none = ce(student, torch.full((6,), -1))
    assert none.item() == 0
    none.backward()
    assert student.grad.isfinite().all()


def test_ce_of_mixed_images() -> None:
    v, y, partner = logits(0), labels(0), labels(1)
    lam = np.random.default_rng(2).uniform(size=6)
    expected = lam * formulas.ce(v, y) + (1 - lam) * formulas.ce(v, partner)
    mix = (tensor(partner), tensor(lam))
    assert ce(tensor(v), tensor(y), mix=mix).item() == pytest.approx(expected.mean(), rel=1e-9)
    partner[:] = -1
    alone = ce(tensor(v), tensor(y), mix=(tensor(partner), tensor(lam))).item()
    assert alone == pytest.approx((lam * formulas.ce(v, y)).sum() / lam.sum(), rel=1e-9)


def test_label_smoothing_spreads_over_all_classes() -> None:
    v, y = logits(0), labels(0)
    target = 0.9 * np.eye(10)[y] + 0.1 / 10
    expected = -(target * formulas.log_softmax(v)).sum(-1).mean()
    assert ce(tensor(v), tensor(y), label_smoothing=0.1).item() == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(2, 50), a=st.floats(0.1, 50), b=st.floats(-50, 50))
def test_zscores_do_not_see_scale_and_shift(seed: int, k: int, a: float, b: float) -> None:
    x = logits(seed, 4, k)
    x[:, 0] += 20  # the 1e-7 beside the deviation is no part of the invariance: no tiny deviations
    for convention in ("unbiased", "biased"):
        z = standardize(tensor(x), convention)
        moved = standardize(tensor(a * x + b), convention)
        torch.testing.assert_close(moved, z, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    k=st.integers(2, 200),
    tau=st.floats(0.5, 8),
    convention=st.sampled_from(["unbiased", "biased"]),
)
def test_the_four_properties_of_zscores(seed: int, k: int, tau: float, convention: str) -> None:
    array = logits(seed, 5, k)
    array[:, 0] += 20  # the 1e-7 beside the deviation is no part of the properties either
    x = tensor(array)
    z = scaled(x, tau, convention)
    torch.testing.assert_close(z.mean(-1), torch.zeros(5).double(), rtol=0, atol=1e-9)
    deviation = z.std(-1, correction=int(convention == "unbiased"))
    torch.testing.assert_close(deviation, torch.full((5,), 1 / tau).double(), rtol=1e-4, atol=0)
    assert torch.equal(z.argsort(-1), x.argsort(-1))
    bound = np.sqrt(k - 1) if convention == "biased" else (k - 1) / np.sqrt(k)
    assert z.abs().max() <= bound / tau * (1 + 1e-12)
    # The bound is the value of a single class apart from all others.
    peak = scaled(torch.eye(1, k).double(), tau, convention).max().item()
    assert peak == pytest.approx(bound / tau, rel=1e-5)


def test_gradient_of_ce_is_q_minus_one_hot() -> None:
    v, y = logits(0), labels(0)
    student = tensor(v).requires_grad_()
    ce(student, tensor(y)).backward()
    expected = (formulas.softmax(v) - np.eye(10)[y]) / 6
    np.testing.assert_allclose(student.grad, expected, rtol=1e-9, atol=1e-14)


def test_gradient_of_kd_is_t_times_q_minus_p() -> None:
    v, z, t = logits(0), logits(1), 4.0
    student = tensor(v).requires_grad_()
    kd(student, tensor(z), temperature=t).backward()
    expected = t * (formulas.softmax(v / t) - formulas.softmax(z / t)) / 6
    np.testing.assert_allclose(student.grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
def test_gradient_of_standardized_kd_has_its_closed_form(convention: str) -> None:
    v, z, tau, k = logits(0), logits(1), 2.0, 10
    student = tensor(v).requires_grad_()
    kd(
        student, tensor(z), temperature=tau, standardize=convention, reduction="none"
    ).sum().backward()
    biased = convention == "biased"
    a, b = formulas.zscore(v, biased), formulas.zscore(z, biased)
    d = (formulas.softmax(a / tau) - formulas.softmax(b / tau)) / tau
    sigma = v.std(-1, ddof=0 if biased else 1, keepdims=True)
    along = a * (d * a).sum(-1, keepdims=True) / (k if biased else k - 1)
    expected = tau**2 * (d - d.mean(-1, keepdims=True) - along) / sigma
    # The closed form knows nothing of the 1e-7 beside sigma.
    np.testing.assert_allclose(student.grad, expected, rtol=1e-6, atol=1e-8)
    assert student.grad is not None
    assert student.grad.sum(-1).abs().max() < 1e-9
    assert (student.grad * student).sum(-1).abs().max() < 1e-6


def test_large_temperature_is_matching_of_centred_logits() -> None:
    v, z = logits(0), logits(1)
    difference = (v - v.mean(-1, keepdims=True)) - (z - z.mean(-1, keepdims=True))
    student = tensor(v).requires_grad_()
    loss = kd(student, tensor(z), temperature=1e4)
    loss.backward()
    assert loss.item() == pytest.approx((difference**2).sum() / (2 * 10 * 6), rel=1e-3)
    np.testing.assert_allclose(student.grad, difference / (10 * 6), rtol=2e-2, atol=1e-5)


def test_gradients_by_finite_differences() -> None:
    v, z, y = tensor(logits(0, 3, 5)), tensor(logits(1, 3, 5)), tensor(labels(0, 3, 5))
    v.requires_grad_()
    t = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ce(v, y), (v,))
    for options in (
        {},
        {"standardize": "unbiased"},
        {"standardize": "biased"},
        {"reverse": True},
    ):
        assert torch.autograd.gradcheck(
            lambda v, t, options=options: kd(v, z, temperature=t, **options), (v, t)
        )


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"found \(6, 10\) and \(6, 9\)"):
        kd(tensor(logits(0)), tensor(logits(1, k=9)))
    with pytest.raises(UsageError, match="'unbiased' or 'biased'"):
        standardize(tensor(logits(0)), "population")  # type: ignore[arg-type]

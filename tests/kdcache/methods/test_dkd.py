"""DKD and the ablations: a teacher's answer in parts."""

from __future__ import annotations

import math

import formulas
import numpy as np
import pytest
import torch
from fields import on_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.methods.ablations import ablate, permutation
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.dkd import dkd, dkd_warmup, tckd_nckd
from kdcache.methods.logits.kd import kd
from kdcache.methods.objective import Objective
from kdcache.methods.scaling import divergence
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UnknownName, UsageError

B, K = 6, 10


def batch(seed: int = 0, b: int = B, k: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    v, z = 3 * generator.standard_normal((2, b, k))
    return v, z, generator.integers(0, k, b)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    b=st.integers(1, 9),
    k=st.integers(2, 30),
    t=st.floats(1, 10),
    alpha=st.floats(0, 5),
    beta=st.floats(0, 20),
)
def test_dkd_is_its_formula(seed: int, b: int, k: int, t: float, alpha: float, beta: float) -> None:
    v, z, y = batch(seed, b, k)
    loss = dkd(*tensors(v, z, y), alpha=alpha, beta=beta, temperature=t).item()
    assert loss == pytest.approx(formulas.dkd(v, z, y, alpha, beta, t), rel=1e-7, abs=1e-9)
    loss = dkd(
        *tensors(v, z, y), alpha=alpha, beta=beta, temperature=t, standardize="unbiased"
    ).item()
    expected = formulas.dkd(formulas.zscore(v), formulas.zscore(z), y, alpha, beta, t)
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(2, 30), t=st.floats(1, 10))
def test_kl_is_tckd_plus_the_rest_times_nckd(seed: int, k: int, t: float) -> None:
    v, z, y = batch(seed, k=k)
    target, rest = tckd_nckd(*tensors(v, z, y), temperature=t, reduction="none")
    p_y = torch.tensor(formulas.softmax(z / t)[np.arange(B), y])
    whole = kd(*tensors(v, z), temperature=t, reduction="none")
    torch.testing.assert_close(target + (1 - p_y) * rest, whole, rtol=1e-8, atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    v, z, y = tensors(*batch(0, 3, 5))
    v.requires_grad_()
    for convention in (False, "unbiased"):
        assert torch.autograd.gradcheck(lambda v, c=convention: dkd(v, z, y, standardize=c), (v,))
    order = torch.stack([torch.randperm(4) for _ in range(3)])
    for name in ("target-only", "target-removed", "non-target-permuted", "non-target-uniform"):
        options = {"ablation": name, "labels": y, "order": order}
        assert torch.autograd.gradcheck(lambda v, o=options: kd(v, z, **o), (v,))


def test_certain_and_two_class_answers_stay_finite() -> None:
    y = torch.tensor([0, 1, 0])
    certain = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0], [0.0, 1000.0]])
    student = (-certain).requires_grad_()
    target, rest = tckd_nckd(student, certain, y, reduction="none")
    assert rest.tolist() == [0, 0, 0]
    assert target.isfinite().all()
    target.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_warmup_counts_from_the_first_epoch() -> None:
    assert [dkd_warmup(epoch) for epoch in (0, 9, 19, 200)] == [0.05, 0.5, 1.0, 1.0]
    assert dkd_warmup(0, 1) == dkd_warmup(0, 0) == 1.0


def test_objective_warms_only_the_dkd_term() -> None:
    v, z, y = tensors(*batch())
    loss, parts = on_logits(Objective(method="dkd"), v, [z], y, Step(epoch=4))
    torch.testing.assert_close(loss, ce(v, y) + 0.25 * dkd(v, z, y))
    tckd, nckd = tckd_nckd(v, z, y)
    torch.testing.assert_close(parts["tckd"], tckd)
    torch.testing.assert_close(parts["nckd"], nckd)
    # lambda scales alpha and beta.
    loss, _ = on_logits(
        Objective(method="dkd", standardize="unbiased", options={"beta": 2}),
        v,
        [z],
        y,
        Step(epoch=50),
    )
    term = dkd(v, z, y, alpha=9, beta=18, temperature=2.0, standardize="unbiased")
    torch.testing.assert_close(loss, ce(v, y) + term)
    both = {"teacher_temperature": 3.0, "student_temperature": 5.0}
    loss, _ = on_logits(Objective(method="dkd", ce_weight=0, **both), v, [z], y, Step(epoch=50))
    torch.testing.assert_close(loss, dkd(v, z, y, **both))


def test_mixed_images_mix_dkd_as_they_mix_ce() -> None:
    v, z, y = tensors(*batch())
    partner, lam = torch.tensor(batch(1)[2]), torch.rand(B, dtype=torch.float64)
    loss, _ = on_logits(
        Objective(method="dkd", ce_weight=0, options={"warmup": 0}), v, [z], y, mix=(partner, lam)
    )
    one, other = (dkd(v, z, labels, reduction="none") for labels in (y, partner))
    torch.testing.assert_close(loss, (lam * one + (1 - lam) * other).mean())


def test_unlabelled_samples_are_refused() -> None:
    v, z, y = tensors(*batch())
    y[2] = -1
    with pytest.raises(DataError, match="1 of 6 unlabelled"):
        dkd(v, z, y)
    with pytest.raises(DataError, match="dkd needs the label"):
        on_logits(Objective(method="dkd"), v, [z], y)
    with pytest.raises(DataError, match="ablation 'target-only'"):
        on_logits(Objective(ablation="target-only"), v, [z], y)
    with pytest.raises(DataError, match="unlabelled"):
        Objective(method="dkd").check(y.numpy())
    Objective().check(y.numpy())


def test_ablations_are_what_they_say() -> None:
    v, z, y = batch()
    rows = np.arange(B)
    p, q = formulas.softmax(z / 4), formulas.softmax(v / 4)

    def teacher_is(target: np.ndarray) -> float:
        return float(16 * (target * np.log(target / q)).sum(-1).mean())

    def ablated(name: str, order: torch.Tensor | None = None) -> float:
        student, teacher, labels = tensors(v, z, y)
        return kd(student, teacher, ablation=name, labels=labels, order=order).item()

    assert ablated("full") == pytest.approx(formulas.kd(v, z))
    assert ablated("target-only") == pytest.approx(formulas.tckd(v, z, y))
    assert ablated("target-removed") == pytest.approx(formulas.nckd(v, z, y))
    uniform = np.repeat((1 - p[rows, y])[:, None] / (K - 1), K, 1)
    uniform[rows, y] = p[rows, y]
    assert ablated("non-target-uniform") == pytest.approx(teacher_is(uniform))
    order = np.random.default_rng(0).permuted(np.tile(np.arange(K - 1), (B, 1)), axis=1)
    permuted = p.copy()
    for row in rows:
        wrong = [k for k in range(K) if k != y[row]]
        permuted[row, wrong] = p[row, wrong][order[row]]
    assert ablated("non-target-permuted", torch.tensor(order)) == pytest.approx(
        teacher_is(permuted)
    )


def test_permutations_are_seeded_per_sample_and_epoch() -> None:
    keys = torch.arange(40) << 20
    first = permutation(Step(keys=keys), 10)
    assert torch.equal(first.sort(-1).values, torch.arange(9).expand(40, -1))
    assert len({tuple(row) for row in first.tolist()}) > 35
    assert torch.equal(permutation(Step(keys=keys.flip(0), index=7), 10).flip(0), first)
    assert not torch.equal(permutation(Step(epoch=1, keys=keys), 10), first)


def test_objective_ablates_and_reverses() -> None:
    v, z, y = tensors(*batch())
    step = Step(keys=torch.arange(B))
    for name in ("target-only", "target-removed", "non-target-permuted", "non-target-uniform"):
        loss, _ = on_logits(Objective(ablation=name, alpha=0), v, [z], y, step)
        order = permutation(step, K)
        torch.testing.assert_close(loss, kd(v, z, ablation=name, labels=y, order=order))
    loss, _ = on_logits(Objective(reverse=True, alpha=0, temperature=1), v, [z], y)
    torch.testing.assert_close(loss, divergence(z, v).mean())
    with pytest.raises(UsageError, match="mixed images"):
        on_logits(Objective(ablation="target-only"), v, [z], y, mix=(y, torch.ones(B)))
    with pytest.raises(UsageError, match="ablation is an option of kd and ctkd"):
        Objective(method="dkd", ablation="target-only")
    with pytest.raises(UsageError, match="needs an order"):
        ablate(v, z, y, "non-target-permuted")
    with pytest.raises(UnknownName, match="target-only"):
        ablate(v, z, y, "target")
    with pytest.raises(DataError, match="found none"):
        ablate(v, z, None, "target-only")


def test_large_beta_shifts_weight_to_the_dark_knowledge() -> None:
    # Where the teacher is sure, KD's weight of the non-target part, 1 - p_y, vanishes; DKD's stays.
    z = torch.tensor([[30.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[30.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0])
    assert kd(v, z, temperature=1).item() < 1e-11
    target, rest = tckd_nckd(v, z, y, temperature=1)
    assert target.item() < 1e-12
    e = math.exp(2)
    assert rest.item() == pytest.approx(2 * (e - 1) / (e + 2))

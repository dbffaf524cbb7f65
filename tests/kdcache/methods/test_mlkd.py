"""MLKD as coded and as described."""

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
from kdcache.methods.logits.mlkd import mlkd
from kdcache.methods.noise import Noise
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UnknownName, UsageError


def pairs(seed: int = 0, b: int = 8, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    v, z = 3 * np.random.default_rng(seed).standard_normal((2, b, 2, k))
    return v, z


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), b=st.integers(1, 9), k=st.integers(2, 12), t=st.floats(1, 6))
def test_both_variants_are_their_formulas(seed: int, b: int, k: int, t: float) -> None:
    v, z = pairs(seed, b, k)
    student, teacher = torch.tensor(v), torch.tensor(z)
    loss = mlkd(student, teacher, temperature=t).item()
    assert loss == pytest.approx(formulas.mlkd_as_coded(v, z, t), rel=1e-7)
    loss = mlkd(student, teacher, temperature=t, standardize="unbiased").item()
    assert loss == pytest.approx(formulas.mlkd_as_coded(v, z, t, zscored=True), rel=1e-6)
    loss = mlkd(student, teacher, temperature=t, variant="as-described").item()
    assert loss == pytest.approx(formulas.mlkd_as_described(v, z, t), rel=1e-7)
    loss = mlkd(
        student, teacher, temperature=t, standardize="unbiased", variant="as-described"
    ).item()
    scored = formulas.mlkd_as_described(formulas.zscore(v), formulas.zscore(z), t)
    assert loss == pytest.approx(scored, rel=1e-6)


def test_the_masks_select_nothing_but_halve() -> None:
    # With distinct values and even sizes both masks keep a half: the weights are 1/2 throughout.
    v, z = pairs()
    assert formulas.masks(z[:, 0]) == (0.5, 0.5)
    temperatures = (4.0, 3.0, 5.0, 2.0, 6.0)
    weak, strong = ([formulas.kd(v[:, i], z[:, i], t) for t in temperatures] for i in (0, 1))
    levels = sum(
        formulas.class_level(v[:, 0], z[:, 0], t) + formulas.batch_level(v[:, 0], z[:, 0], t)
        for t in temperatures
    )
    expected = 0.5 * sum(weak) + sum(strong[:3]) + sum(weak[3:]) + 0.5 * levels
    assert mlkd(torch.tensor(v), torch.tensor(z)).item() == pytest.approx(expected, rel=1e-9)


def test_as_coded_ignores_the_strong_view_at_temperatures_2_and_6() -> None:
    # The strong logits are scaled so far up that all but T = 4, 3, 5 would differ.
    v, z = pairs()
    strong_only = torch.tensor(v)
    strong_only[:, 0] = torch.tensor(z)[:, 0]
    loss = mlkd(strong_only, torch.tensor(z)).item()
    expected = sum(formulas.kd(v[:, 1], z[:, 1], t) for t in (4.0, 3.0, 5.0))
    assert loss == pytest.approx(expected, rel=1e-9)


def test_gradients_by_finite_differences() -> None:
    v, z = (torch.tensor(x) for x in pairs(0, 3, 4))
    v.requires_grad_()
    for variant in ("as-coded", "as-described"):
        for convention in (False, "unbiased"):
            assert torch.autograd.gradcheck(
                lambda v, o=(variant, convention): mlkd(v, z, variant=o[0], standardize=o[1]), (v,)
            )


def test_objective_weighs_both_views_alike_in_ce() -> None:
    v, z = (torch.tensor(x) for x in pairs())
    y = torch.arange(8)
    both = ce(v[:, 0], y) + ce(v[:, 1], y)
    loss, parts = on_logits(Objective(method="mlkd"), v, [z], y)
    torch.testing.assert_close(loss, 0.1 * both + 0.9 * mlkd(v, z))
    torch.testing.assert_close(parts["ce"], both)
    loss, _ = on_logits(Objective(method="mlkd", standardize="unbiased"), v, [z], y)
    standardized = mlkd(v, z, temperature=2.0, standardize="unbiased")
    torch.testing.assert_close(loss, 0.1 * both + 9 * standardized)
    y[:] = -1
    assert on_logits(Objective(method="mlkd"), v, [z], y)[1]["ce"] == 0


@pytest.mark.parametrize("combine", ["mean-logits", "mean-probs", "mean-losses", "random"])
def test_ensembles_teach_pairs(combine: str) -> None:
    v, z = (torch.tensor(x) for x in pairs(0))
    other = torch.tensor(pairs(1)[1])
    y = torch.arange(8)
    loss, _ = on_logits(
        Objective(method="mlkd", combine=combine, weights=(1, 3), alpha=0), v, [z, other], y
    )
    if combine == "mean-losses":
        torch.testing.assert_close(loss, 0.25 * mlkd(v, z) + 0.75 * mlkd(v, other))
    elif combine == "random":
        assert loss in (mlkd(v, z), mlkd(v, other))
    else:
        torch.testing.assert_close(loss, mlkd(v, Ensemble([z, other], [0.25, 0.75], combine)))


@pytest.mark.parametrize("weights", ["entropy", "confidence"])
def test_weights_per_sample_and_view(weights: str) -> None:
    v, z = (torch.tensor(x) for x in pairs(0))
    objective = Objective(method="mlkd", weights=weights, combine="mean-probs")
    loss, _ = on_logits(objective, v, [z, z], torch.arange(8))
    alone, _ = on_logits(Objective(method="mlkd"), v, [z], torch.arange(8))
    torch.testing.assert_close(loss, alone)


def test_noise_is_of_its_own_on_each_view() -> None:
    v, z = (torch.tensor(x) for x in pairs())
    step = Step(keys=torch.arange(8))
    loss, _ = on_logits(
        Objective(method="mlkd", alpha=0, noise=Noise(scale=1.0)), v, [z], torch.arange(8), step
    )
    torch.testing.assert_close(loss, mlkd(v, Noise(scale=1.0)(z, step)))


def test_what_does_not_fit_is_refused() -> None:
    v, z = (torch.tensor(x) for x in pairs())
    with pytest.raises(DataError, match="weak and a strong view"):
        mlkd(v[:, 0], z[:, 0])
    with pytest.raises(DataError, match=r"\(samples, 2, classes\)"):
        on_logits(Objective(method="mlkd"), v[:, 0], [z[:, 0]], torch.arange(8))
    with pytest.raises(UnknownName, match="as-coded"):
        mlkd(v, z, variant="ascoded")
    with pytest.raises(UsageError, match="as-described"):
        Objective(method="mlkd", standardize="unbiased", combine="mean-zscores")
    with pytest.raises(UsageError, match="whole batches"):
        Objective(method="mlkd", weights="entropy", combine="mean-losses")
    with pytest.raises(UsageError, match="teacher_temperature is an option of kd and dkd"):
        Objective(method="mlkd", teacher_temperature=3)

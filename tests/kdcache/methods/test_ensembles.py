"""Several teachers: means, weights, and the noise before them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from fields import on_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.methods.ensembles import Ensemble, confidence_weights, entropy_weights
from kdcache.methods.logits.dkd import dkd
from kdcache.methods.logits.kd import kd
from kdcache.methods.noise import Noise
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache_stores.errors import UnknownName, UsageError

B, K, M = 6, 10, 3
GENERATOR = np.random.default_rng(0)
V = 3 * GENERATOR.standard_normal((B, K))
ZS = [scale * GENERATOR.standard_normal((B, K)) for scale in (1.0, 3.0, 6.0)]
Y = GENERATOR.integers(0, K, B)
W = (0.5, 0.2, 0.3)
STUDENT, LABELS = torch.tensor(V), torch.tensor(Y)
TEACHERS = [torch.tensor(z) for z in ZS]


def distillation(teachers: list[torch.Tensor], step: Step | None = None, **options) -> float:  # type: ignore[no-untyped-def]
    return on_logits(Objective(alpha=0, **options), STUDENT, teachers, LABELS, step)[0].item()


def test_mean_of_logits() -> None:
    mean = sum(w * z for w, z in zip(W, ZS, strict=True))
    assert distillation(TEACHERS, weights=W) == pytest.approx(formulas.kd(V, mean))
    assert distillation(TEACHERS) == pytest.approx(formulas.kd(V, sum(ZS) / 3))
    # Standardized after the combination.
    scored = formulas.kd(formulas.zscore(V), formulas.zscore(mean), 2.0)
    value = distillation(TEACHERS, weights=W, standardize="unbiased")
    assert value == pytest.approx(scored)


def test_mean_of_zscores_is_not_standardized_again() -> None:
    mean = sum(w * formulas.zscore(z) for w, z in zip(W, ZS, strict=True))
    expected = formulas.kd(formulas.zscore(V), mean, 2.0)
    value = distillation(TEACHERS, weights=W, combine="mean-zscores", standardize="unbiased")
    assert value == pytest.approx(expected)
    again = formulas.kd(formulas.zscore(V), formulas.zscore(mean), 2.0)
    assert abs(value - again) > 1e-3


def test_mean_of_probabilities_is_taken_at_the_temperature() -> None:
    for t in (1.0, 4.0):
        mean = sum(w * formulas.softmax(z / t) for w, z in zip(W, ZS, strict=True))
        expected = t**2 * (mean * (np.log(mean) - formulas.log_softmax(V / t))).sum(-1).mean()
        value = distillation(TEACHERS, weights=W, combine="mean-probs", temperature=t)
        assert value == pytest.approx(expected)
    first = distillation(TEACHERS, weights=(1, 0, 0), combine="mean-probs")
    assert first == pytest.approx(formulas.kd(V, ZS[0]))


def test_mean_of_losses_has_the_gradient_of_the_mean_of_probabilities() -> None:
    expected = sum(w * formulas.kd(V, z) for w, z in zip(W, ZS, strict=True))
    assert distillation(TEACHERS, weights=W, combine="mean-losses") == pytest.approx(expected)
    gradients = []
    for combine in ("mean-losses", "mean-probs"):
        student = STUDENT.clone().requires_grad_()
        loss, _ = on_logits(
            Objective(alpha=0, weights=W, combine=combine), student, TEACHERS, LABELS
        )
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients)


def test_dkd_of_an_ensemble_is_dkd_of_its_mean() -> None:
    mean = sum(w * formulas.softmax(z / 4) for w, z in zip(W, ZS, strict=True))
    expected = formulas.dkd(V, 4 * np.log(mean), Y, 1.0, 8.0, 4.0)
    value = distillation(
        TEACHERS, method="dkd", weights=W, combine="mean-probs", options={"warmup": 0}
    )
    assert value == pytest.approx(expected)
    each = [dkd(STUDENT, z, LABELS).item() for z in TEACHERS]
    value = distillation(
        TEACHERS, method="dkd", weights=W, combine="mean-losses", options={"warmup": 0}
    )
    assert value == pytest.approx(np.dot(W, each))


def test_random_teacher_by_share_and_step() -> None:
    each = [distillation([z]) for z in TEACHERS]
    chosen = Counter()
    for index in range(300):
        step = Step(epoch=index % 3, index=index)
        value = distillation(TEACHERS, step, weights=(3, 0, 1), combine="random")
        chosen[int(np.argmin(np.abs(np.array(each) - value)))] += 1
        assert min(abs(value - loss) for loss in each) < 1e-12
        assert value == distillation(TEACHERS, step, weights=(3, 0, 1), combine="random")
    assert chosen[1] == 0
    assert 180 < chosen[0] < 265  # 225 on average, standard deviation 7.5


def test_entropy_weights() -> None:
    entropy = np.stack([-(formulas.softmax(z) * formulas.log_softmax(z)).sum(-1) for z in ZS])
    expected = 1 - entropy / entropy.sum(0)
    expected /= expected.sum(0)
    weights = entropy_weights(TEACHERS)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    losses = sum(
        w * 16 * formulas.kl(z / 4, V / 4) for w, z in zip(expected, ZS, strict=True)
    ).mean()
    value = distillation(TEACHERS, weights="entropy", combine="mean-losses")
    assert value == pytest.approx(losses)
    mean = sum(w[:, None] * z for w, z in zip(expected, ZS, strict=True))
    assert distillation(TEACHERS, weights="entropy") == pytest.approx(formulas.kd(V, mean))


def test_confidence_weights() -> None:
    losses = np.stack([formulas.ce(z, Y) for z in ZS])
    expected = (1 - formulas.softmax(losses.T).T) / (M - 1)
    weights = confidence_weights(TEACHERS, LABELS)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    np.testing.assert_allclose(weights.sum(0), 1)
    total = sum(w * 16 * formulas.kl(z / 4, V / 4) for w, z in zip(expected, ZS, strict=True))
    value = distillation(TEACHERS, weights="confidence", combine="mean-losses")
    assert value == pytest.approx(total.mean())
    # No label, no confidence: equal weights.
    unlabelled = confidence_weights(TEACHERS, torch.full((B,), -1))
    np.testing.assert_allclose(unlabelled, 1 / 3)
    partner, lam = torch.tensor(np.roll(Y, 1)), torch.full((B,), 0.25)
    mixed = 0.25 * losses + 0.75 * np.stack([formulas.ce(z, np.roll(Y, 1)) for z in ZS])
    expected = (1 - formulas.softmax(mixed.T).T) / (M - 1)
    np.testing.assert_allclose(confidence_weights(TEACHERS, LABELS, (partner, lam)), expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    combine=st.sampled_from(["mean-logits", "mean-zscores", "mean-probs", "mean-losses", "random"]),
    weights=st.sampled_from([None, (2.0, 1.0), "entropy", "confidence"]),
)
def test_equal_teachers_are_one_teacher(seed: int, combine: str, weights: object) -> None:
    z = torch.randn(B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if combine == "random" and isinstance(weights, str):
        return
    standardize = "unbiased" if combine == "mean-zscores" else False
    both = distillation([z, z], combine=combine, weights=weights, standardize=standardize)
    assert both == pytest.approx(distillation([z], standardize=standardize))
    weights = None if isinstance(weights, tuple) else weights
    one = distillation([z], combine=combine, weights=weights, standardize=standardize)
    assert one == distillation([z], standardize=standardize)


def test_certain_teachers_have_finite_weights() -> None:
    certain = torch.full((B, K), -1000.0)
    certain[:, 3] = 1000
    for weights in ("entropy", "confidence"):
        for combine in ("mean-logits", "mean-probs", "mean-losses"):
            value = distillation([certain, certain], weights=weights, combine=combine)
            assert np.isfinite(value)
    mixed = entropy_weights([certain, TEACHERS[0].float()])
    assert mixed[:, 0].tolist() == [1.0, 0.0]


def test_noise_comes_before_the_combination() -> None:
    noise, step = Noise(scale=0.5, copies=2), Step(keys=torch.arange(B), epoch=1)
    expected = 0.0
    for copy in range(2):
        noisy = [noise(z, step, teacher, copy) for teacher, z in enumerate(TEACHERS)]
        mean = sum(formulas.zscore(z.numpy()) for z in noisy) / 3
        expected += formulas.kd(formulas.zscore(V), mean, 2.0) / 2
    value = distillation(
        TEACHERS, step, noise=noise, combine="mean-zscores", standardize="unbiased"
    )
    assert value == pytest.approx(expected)


def test_expectation_over_noise_is_kl_to_the_mean_probability_and_a_constant() -> None:
    # KL(p_i | q) averaged over draws = KL(mean p | q) + mean entropy gap: the gap has no student.
    noise, step, t = Noise(scale=2.0, copies=64), Step(keys=torch.arange(B)), 1.0
    draws = [noise(TEACHERS[0], step, copy=copy).numpy() for copy in range(64)]
    probabilities = np.stack([formulas.softmax(z) for z in draws])
    mean = probabilities.mean(0)
    gap = (mean * -np.log(mean)).sum(-1) - (probabilities * -np.log(probabilities)).sum(-1).mean(0)
    losses, gradients = [], []
    for seed in range(3):
        v = np.random.default_rng(seed).standard_normal((B, K))
        student = torch.tensor(v, requires_grad=True)
        objective = Objective(alpha=0, temperature=t, noise=noise)
        loss, _ = on_logits(objective, student, TEACHERS[:1], LABELS, step)
        to_mean = formulas.kl(np.log(mean), v).mean()
        losses.append(loss.item() - to_mean)
        gradient = torch.autograd.grad(loss, student)[0].numpy()
        gradients.append(gradient - (formulas.softmax(v) - mean) / B)
        # Averaging the noisy logits before the softmax is something else.
        before = formulas.kl(np.mean(draws, 0), v).mean()
        assert abs(before - to_mean) > 0.02
    assert losses == pytest.approx([gap.mean()] * 3, abs=1e-5)
    assert gap.mean() > 0.05
    assert np.abs(gradients).max() < 1e-7


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="no logits left"):
        Objective(combine="mean-probs", standardize="unbiased")
    with pytest.raises(UsageError, match="add standardize"):
        Objective(combine="mean-zscores")
    with pytest.raises(UsageError, match="per sample"):
        Objective(combine="random", weights="confidence")
    with pytest.raises(UsageError, match="each of 3 teachers, found 2"):
        distillation(TEACHERS, weights=(1, 2))
    with pytest.raises(UsageError, match="each of 3 teachers, found 2"):
        Objective(weights=(1, 2)).check(Y, teachers=3)
    with pytest.raises(UsageError, match="at least one teacher"):
        Objective().check(Y, teachers=0)
    with pytest.raises(UsageError, match="each of 1 teachers"):
        distillation(TEACHERS[:1], weights=(1, 2))
    with pytest.raises(UsageError, match="not all 0"):
        Objective(weights=(0, 0))
    with pytest.raises(UnknownName, match="entropy"):
        Objective(weights="entropi")
    with pytest.raises(UnknownName, match="mean-logits"):
        Objective(combine="mean")
    with pytest.raises(UnknownName, match="mean-logits"):
        Ensemble(TEACHERS, W, "mean-losses")
    with pytest.raises(UsageError, match="a weight for each"):
        Ensemble(TEACHERS, W[:2])
    with pytest.raises(UsageError, match="add standardize"):
        kd(STUDENT, Ensemble(TEACHERS, W, "mean-zscores"))
    with pytest.raises(UsageError, match="no logits left"):
        kd(STUDENT, Ensemble(TEACHERS, W, "mean-probs"), standardize="biased")


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, ("logits", "pooled"), "--combine mean-logits .* --combine mean-losses or"),
        ({"combine": "mean-probs"}, ("pooled",), "--combine mean-probs"),
        (
            {"combine": "mean-losses", "weights": "entropy"},
            ("pooled",),
            "--teacher-weights entropy",
        ),
        ({"combine": "mean-losses"}, ("pooled",), None),
        ({"combine": "random"}, ("logits", "pooled"), None),
    ],
)
def test_what_only_logits_have_is_refused_of_other_fields_before_training(
    options: dict[str, Any], fields: tuple[str, ...], message: str | None
) -> None:
    objective = Objective(method="kd", **options)
    objective.teacher_fields = fields
    labels = np.zeros(4, np.int64)
    objective.check(labels, 1)
    if message is None:
        objective.check(labels, 2)
    else:
        with pytest.raises(UsageError, match=message):
            objective.check(labels, 2)

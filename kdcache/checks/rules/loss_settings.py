"""Rules about the weights and temperatures of a loss. They need the configuration alone.

What is published never warns: the settings of every recipe that comes with kdcache, of every pair of teacher
and student in them, the defaults of every method, and the few of `ELSEWHERE`. Everything else is held
against the ranges that the field works in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from kdcache.checks.finding import Finding, percent
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.table import METHODS
from kdcache.recipes import published as recipes

#: T, and tau of standardized logits, at which KD is published to work: Hinton et al. 2015 and the CIFAR
#: benchmarks after it use 2 to 5 (4 mostly), logit standardization (CVPR 2024) 2 to 4.
TEMPERATURES = (2.0, 5.0)

#: alpha, the share of cross-entropy in the weights, of L = alpha CE + (1 - alpha) T^2 KL.
ALPHAS = (0.1, 0.5)

#: Standardized logits need a large weight: Sun et al. (CVPR 2024, supplement, resnet32x4 to resnet8x4, tau = 2)
#: measured 74.1% with a weight of 0.9, 76.1% with 3 and 76.6% with 6 to 15. Without standardization the same
#: weights fall from 73.6% (0.9) to 68.3% (12) and 63.5% (18).
STANDARDIZED_WEIGHT = 6.0
PLAIN_WEIGHT = 1.0


class Setting(NamedTuple):
    """How strong the distillation is, and how flat its targets are; T is None where it is trained."""

    method: str
    standardized: bool
    ce_weight: float
    kd_weight: float
    temperature: float | None


#: Published with code, but no recipe of kdcache.
ELSEWHERE = (
    Setting("kd", False, 1.0, 1.0, 4.0),  # SimKD's repository (Chen et al., CVPR 2022)
    Setting("kd", False, 1.0, 0.5, 1.0),  # ImageNet, the repository of logit standardization
    Setting("kd", True, 1.0, 9.0, 2.0),  # the same, standardized
)


def setting(objective: ObjectiveConfig) -> Setting:
    """The setting of a configuration, its defaults filled in."""
    resolved = objective.resolved()
    assert resolved.ce_weight is not None
    assert resolved.kd_weight is not None
    standardized = bool(resolved.standardize)
    return Setting(
        resolved.method, standardized, resolved.ce_weight, resolved.kd_weight, resolved.temperature
    )


@lru_cache(maxsize=1)
def published() -> frozenset[Setting]:
    """Every setting that never warns."""
    settings = set(ELSEWHERE)
    for name, method in METHODS.items():
        settings.add(setting(ObjectiveConfig(method=name)))
        if method.standardized:
            settings.add(setting(ObjectiveConfig(method=name, standardize="unbiased")))
    for name in recipes.names():
        dataset, _, _ = name.partition("/")
        pairs = [pair.split(">") for pair in recipes.load(dataset).get("pair", {})]
        for teacher, student in [("", ""), *pairs]:
            settings.add(_of_recipe(recipes.resolve(name, student, teacher)))
    return frozenset(settings)


def _of_recipe(options: Mapping[str, Any]) -> Setting:
    flags = {name: value for name, value in options.items() if name in ObjectiveConfig.flags()}
    return setting(ObjectiveConfig.from_flags(flags))


def loss_settings(objective: ObjectiveConfig, labelled: bool) -> Iterator[Finding]:
    """Everything that can be checked of a loss before a sample is seen.

    Args:
        objective: with or without its defaults filled in.
        labelled: whether any training sample has a label; without, there is no CE to weigh.
    """
    mine = setting(objective)
    usual = mine in published()
    sides = {objective.teacher_temperature, objective.student_temperature} - {None}
    if not objective.record.needs_teacher or (usual and not sides):
        return
    temperatures = sides or ({mine.temperature} if mine.temperature is not None else set())
    yield from _temperature({t for t in temperatures if t is not None}, mine)
    if not usual and labelled and objective.record.teacher_fields == ("logits",):
        yield from _weights(mine)


def _temperature(temperatures: set[float], mine: Setting) -> Iterator[Finding]:
    low, high = TEMPERATURES
    name = "tau" if mine.standardized else "T"
    for t in sorted(t for t in temperatures if not low <= t <= high):
        why = (
            "the targets are nearly the teacher's top class alone, and little of its information "
            "about the other classes is left"
            if t < low
            else "the targets are nearly uniform, and classes that are clearly wrong for a sample weigh as "
            "much as likely ones"
        )
        yield Finding(
            "temperature",
            f"The temperature {name} = {t:g} is outside {low:g} to {high:g}: {why}.",
            f"--temperature {2 if mine.standardized else 4}, the published value of this form.",
        )


def _weights(mine: Setting) -> Iterator[Finding]:
    """What is wrong with the two weights: the most serious mistake, if there is any."""
    method, standardized, ce, kd, _ = mine
    default = setting(
        ObjectiveConfig(method=method, standardize="unbiased" if standardized else False)
    )
    usual = f"--ce-weight {default.ce_weight:g} --kd-weight {default.kd_weight:g}"
    if kd == 0:
        yield Finding(
            "no-distillation",
            "The weight of distillation is 0: the teacher has no part in the loss.",
            f"{usual}, or --method ce.",
        )
    elif ce == 0:
        yield Finding(
            "no-labels",
            "The weight of cross-entropy is 0 although the samples have labels: where the teacher "
            "errs the student learns the error, with nothing to correct it.",
            f"{usual}, the published weights of this form.",
        )
    elif standardized and kd <= PLAIN_WEIGHT:
        yield Finding(
            "standardized-weight",
            f"The logits are standardized, but the weight of distillation is {kd:g}, of the size used "
            "without standardization. Standardization divides its gradient by the square of the "
            "logits' spread; published, a weight of 0.9 lost 2.5 points to 9.",
            f"--kd-weight {default.kd_weight:g}.",
        )
    elif not standardized and kd >= STANDARDIZED_WEIGHT:
        yield Finding(
            "standardized-weight",
            f"The weight of distillation is {kd:g}, of the size that standardized logits need, but "
            "the logits are not standardized. Published, plain KD with 12 and T = 2 lost 5 points.",
            f"--standardize, or --kd-weight {default.kd_weight:g}.",
        )
    elif (owner := _owner(mine)) is not None:
        yield Finding(
            "other-method",
            f"The weights {ce:g} of cross-entropy and {kd:g} of distillation are those of {owner}, the "
            f"method is {method}, whose term is of another size.",
            f"{usual}, the published weights of {method}.",
        )
    elif METHODS[method].plain_kl and not standardized:
        yield from _alpha(ce, kd)


def _owner(mine: Setting) -> str | None:
    """The method that these weights were published for, if it is another one and not this one too."""
    same = [s for s in published() if s.standardized == mine.standardized]
    same = [s for s in same if s[2:4] == mine[2:4]]
    same = [s for s in same if METHODS[s.method].teacher_fields == ("logits",)]
    owners = {s.method for s in same}
    if not owners or mine.method in owners:
        return None
    return " and ".join(sorted(owners))


def _alpha(ce: float, kd: float) -> Iterator[Finding]:
    low, high = ALPHAS
    alpha = ce / (ce + kd)
    if low - 1e-9 <= alpha <= high + 1e-9:
        return
    why = (
        "labels hardly count, and the student learns the teacher's errors with little to correct them"
        if alpha < low
        else "most of the loss is plain training, and the teacher hardly counts"
    )
    yield Finding(
        "alpha",
        f"Cross-entropy has {percent(alpha)} of the weights (alpha = {alpha:.3g}), outside "
        f"{low:g} to {high:g}: {why}.",
        "--alpha 0.1, as published for CIFAR-100; up to 0.5 as for ImageNet.",
    )

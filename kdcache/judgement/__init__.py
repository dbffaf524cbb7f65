"""Judgement: what will likely go wrong with a distillation, before its first step, with reason and remedy.

    findings = judge(Case(stores=[store], objective=ObjectiveConfig(method="kd"), epochs=240))

Each rule is a function of a `Case` that yields `Finding`s; it is silent about what it cannot know. `RULES`
is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kdcache.judgement import data, ensemble, settings, targets, teacher, views
from kdcache.judgement.case import Case
from kdcache.judgement.finding import Finding
from kdcache.judgement.records import Baseline, Fit

__all__ = ["RULES", "Baseline", "Case", "Finding", "Fit", "judge"]

Rule = Callable[[Case], Iterator[Finding]]


def _loss(case: Case) -> Iterator[Finding]:
    if case.objective is not None:
        yield from settings.loss_settings(case.objective, case.labelled)


#: What needs no logits.
OF_SETTINGS: tuple[Rule, ...] = (_loss,)
#: What needs a store.
OF_STORES: tuple[Rule, ...] = (
    teacher.teacher_on_views,
    teacher.teacher_asked_wrongly,
    teacher.teacher_against_baseline,
    targets.share_of_loss,
    targets.confident_targets,
    views.few_views,
    views.fit,
    data.class_prior,
    data.confidence,
    ensemble.scales,
    ensemble.alike,
)
RULES: tuple[Rule, ...] = OF_SETTINGS + OF_STORES


def judge(case: Case, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Everything that the rules find, in their order.

    Raises:
        StoreError: what was read of a store is not what was written.
    """
    taught = bool(case.stores) and case.loss.record.needs_teacher
    return [finding for rule in rules if rule in OF_SETTINGS or taught for finding in rule(case)]

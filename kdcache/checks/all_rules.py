"""Checks: what will likely go wrong with a distillation, before its first step, with reason and remedy.

    findings = run_rules(Case(stores=[store], objective=ObjectiveConfig(method="kd"), epochs=240))

Each rule is a function of a `Case` that yields `Finding`s; it yields nothing where it lacks the facts to
decide. `RULES` is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding
from kdcache.checks.rules import (
    class_prior,
    loss_settings,
    members,
    smaller,
    softmax_targets,
    teacher_accuracy,
    view_count,
)

Rule = Callable[[Case], Iterator[Finding]]


def _loss(case: Case) -> Iterator[Finding]:
    if case.objective is not None:
        yield from loss_settings.loss_settings(case.objective, case.labelled)


#: What needs no logits.
OF_SETTINGS: tuple[Rule, ...] = (
    _loss,
    class_prior.batches,
    teacher_accuracy.student_against_baseline,
)
#: What needs a store.
OF_STORES: tuple[Rule, ...] = (
    teacher_accuracy.teacher_on_views,
    teacher_accuracy.teacher_preprocessing,
    teacher_accuracy.teacher_against_baseline,
    softmax_targets.share_of_loss,
    softmax_targets.confident_targets,
    view_count.few_views,
    view_count.fit,
    smaller.pruned_too_far,
    class_prior.class_prior,
    class_prior.confidence,
    members.scales,
    members.alike,
)
#: What a finished training may show that was not known at its beginning.
OF_THE_END: tuple[Rule, ...] = (
    teacher_accuracy.teacher_against_baseline,
    teacher_accuracy.student_against_baseline,
    view_count.fit,
    smaller.pruned_too_far,
)
RULES: tuple[Rule, ...] = OF_SETTINGS + OF_STORES


def run_rules(case: Case, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Everything that the rules find, in their order.

    Raises:
        StoreError: what was read of a store is not what was written.
    """
    reads_teachers = bool(case.stores) and case.loss.needs_teacher
    return [
        finding for rule in rules if rule in OF_SETTINGS or reads_teachers for finding in rule(case)
    ]

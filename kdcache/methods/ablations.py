"""Which part of a teacher's targets helps a student: switches for studies on cached logits."""

from __future__ import annotations

import math

from torch import Tensor

from kdcache.methods.step import Step
from kdcache.methods.target import check_labels, others, target_or_not, with_others
from kdcache_stores.errors import UnknownName, UsageError

ABLATIONS = ("full", "target-only", "target-removed", "non-target-permuted", "non-target-uniform")


def ablate(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    ablation: str = "full",
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Student and teacher, both scaled, with a part of the teacher's targets taken away.

    ======================  ====================================================================
    full                    all K classes, unchanged
    target-only             the label's class against all others together: 2 classes on both sides
    target-removed          the others among themselves: K - 1 classes on both sides
    non-target-permuted     the teacher's other probabilities, moved to wrong classes
    non-target-uniform      the teacher's other probabilities, each replaced by their mean
    ======================  ====================================================================

    The first two parts are those of DKD: KL = KL(target-only) + (1 - p_y)·KL(target-removed).
    Permutation follows Born-Again Networks (Furlanello et al. 2018, "DKPP"), with the label's class
    kept in place instead of the teacher's largest.

    Args:
        student: (B, K) scaled logits.
        teacher: (B, K) scaled logits.
        labels: (B,) int64; not needed for "full".
        ablation: a name from the table.
        order: (B, K - 1) int64, a permutation of 0, ..., K - 2 per row, for "non-target-permuted";
            see `permutation`.

    Raises:
        UnknownName: for another name.
        DataError: for absent labels or unlabelled samples.
    """
    if ablation == "full":
        return student, teacher
    if ablation not in ABLATIONS:
        raise UnknownName("ablation", ablation, ABLATIONS)
    labels = check_labels(labels, f"the ablation {ablation!r}")
    if ablation == "target-only":
        return target_or_not(student, labels), target_or_not(teacher, labels)
    rest = others(teacher, labels)
    if ablation == "target-removed":
        return others(student, labels), rest
    if ablation == "non-target-uniform":
        mean = rest.logsumexp(-1, keepdim=True) - math.log(rest.shape[-1])
        return student, with_others(teacher, labels, mean.expand_as(rest))
    if order is None:
        raise UsageError("the ablation 'non-target-permuted' needs an order, found none")
    return student, with_others(teacher, labels, rest.gather(-1, order))


def permutation(step: Step, classes: int) -> Tensor:
    """(B, K - 1) int64: a permutation per row, seeded by (seed, epoch, key, view)."""
    return step.draw("uniform", classes - 1, "permutation").argsort(-1)

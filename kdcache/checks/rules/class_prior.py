"""Rules about the student's samples: are they what the store was made of?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import chi2, ttest_ind

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding, percent
from kdcache.teachers.sanity import SIGNIFICANCE

#: Total variation between two priors: a tenth of the samples would have to be of another class.
PRIOR = 0.1

#: Difference of mean entropies in standard deviations of it: a medium effect by Cohen's convention.
EFFECT = 0.5


def class_prior(case: Case) -> Iterator[Finding]:
    """The student's classes are not as frequent as those of the store that it reads.

    By total variation, half the sum of |p - q| over classes, where it is beyond what drawing so few
    samples explains (Pearson's chi-squared against the store's frequencies).
    """
    labels = case.own_labels
    if labels is None or len(labels) == len(case.first):
        return
    own, whole = (
        np.bincount(some[some >= 0], minlength=case.first.classes).astype(np.float64)
        for some in (labels, case.first.labels)
    )
    if not own.sum() or not whole.sum():
        return
    p, q = own / own.sum(), whole / whole.sum()
    distance, labelled = float(np.abs(p - q).sum() / 2), q > 0
    statistic = own.sum() * float(((p - q)[labelled] ** 2 / q[labelled]).sum())
    by_chance = chi2.sf(statistic, max(int(labelled.sum()) - 1, 1)) > SIGNIFICANCE
    if distance <= PRIOR or by_chance:
        return
    absent = int((labelled & (own == 0)).sum())
    most = int(np.abs(p - q).argmax())
    gone = f", {absent} of {int(labelled.sum())} classes are absent" if absent else ""
    yield Finding(
        "class-prior",
        f"The classes of the student's {len(labels)} samples are not as frequent as in the store: "
        f"{percent(distance)} of them would have to be of another class (class {most} has "
        f"{percent(p[most])}, in the store {percent(q[most])}){gone}. The teacher's probabilities "
        "carry the frequencies that it saw.",
        "train on samples with the frequencies that will be met in use, or take a store and a teacher "
        "of data like the student's.",
    )


def batches(case: Case) -> Iterator[Finding]:
    """A batch that is larger than all of the samples: an epoch is a single step."""
    labels = case.own_labels
    if case.batch_size is None or labels is None or case.batch_size <= len(labels):
        return
    steps = "" if case.epochs is None else f" {case.epochs} epochs are {case.epochs} steps."
    yield Finding(
        "batch-size",
        f"The batch size {case.batch_size} is larger than the {len(labels)} samples, so an epoch is a "
        f"single step.{steps}",
        f"--batch-size {max(len(labels) // 8, 1)}, say, for 8 steps an epoch.",
    )


def confidence(case: Case) -> Iterator[Finding]:
    """The teacher is more, or less, confident of the student's samples than of the rest of the store.

    Entropy of softmax(z) in one view; a difference of `EFFECT` standard deviations that chance does not
    explain (Welch's t-test).
    """
    sample = case.sample
    if len(sample.rest) < 2 or len(sample.rows) < 2:
        return
    own, rest = (
        _entropies(torch.from_numpy(logits)) for logits in (sample.logits[0][0], sample.rest)
    )
    spread = float(np.sqrt((own.var(ddof=1) + rest.var(ddof=1)) / 2))
    effect = float(own.mean() - rest.mean()) / max(spread, 1e-12)
    if abs(effect) <= EFFECT or ttest_ind(own, rest, equal_var=False).pvalue > SIGNIFICANCE:
        return
    yield Finding(
        "other-samples",
        f"The teacher is {'less' if effect > 0 else 'more'} confident of the student's samples than of "
        f"the others in the store: an entropy of {own.mean():.2g} nats against {rest.mean():.2g}. They "
        "are not drawn alike.",
        "--train-samples draws evenly; where the samples are chosen on purpose, expect accuracies that "
        "hold for such samples.",
    )


def _entropies(logits: torch.Tensor) -> np.ndarray:
    logs = logits.log_softmax(-1)
    return np.asarray(-(logs.exp() * logs).sum(-1), np.float64)

"""Rules about the number of views, and about a student that fits its targets too well or not at all.

One statistic serves both. Of the scaled logits of the teachers (their mean), let W be the variance over the
views of a sample, and B the variance between the samples' means, each summed over the classes. The mean target
of V views is W / V off that of all views, in mean square, and `uncovered` = (W / V) / B says how large that is
beside what there is to learn. It is about the teacher's outputs, not about accuracy, which it can only suggest:
see what was measured, at `UNCOVERED`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from kdcache.augment.specs import from_description
from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Fit
from kdcache.checks.finding import Finding, percent
from kdcache.methods.scaling import scaled
from kdcache_stores import KDCacheError

#: The most that does not warn. Measured: a resnet8 taught by a resnet20 on 300 digits (KD, 30 epochs, 5
#: seeds) reaches 94.6 +- 0.7% from one view (0.04), 95.7 +- 0.8% from two (0.02), 97.4 +- 0.7% from four
#: (0.01) and 97.4 +- 0.5% from nine; on 80 digits 74.3 +- 9.1%, 88.1 +- 4.8%, 93.2 +- 2.6% and 94.4 +- 1.5%.
#: A resnet20 on CIFAR-100 has 0.042 / V for padded crops; for resized crops 0.58 / V, so that 58 views would
#: do, and 50 were found to do as well as 400 on ImageNet (Faghri et al., Reinforce Data, ICCV 2023).
UNCOVERED = 0.01

#: Share of the distillation term of a uniform output (equal logits for all classes) that is left at the end.
#: Measured on the training views: 0.03 to 0.04 for the digits above with nine views; 0.23 for a resnet8, too
#: small for it, taught by a resnet20 on 5,000 images of CIFAR-100, 40 epochs, one view. Beyond a half the
#: student has missed more of its teacher than it took.
UNFIT, PERFECT = 0.5, 0.05

#: A training of at least so many epochs whose distillation fell by less than this share from one quarter of
#: the epochs to the next has come to its limit; of a shorter one nothing is said. `tests/kdcache/checks/
#: test_health.py` holds both against healthy and sick trainings.
EPOCHS, FALLING = 10, 0.02


class Variances(NamedTuple):
    """Of the targets, summed over classes: over the views of a sample (W), between samples (B)."""

    within: float
    between: float

    def uncovered(self, views: int) -> float:
        """W / V / B."""
        return self.within / views / max(self.between, 1e-12)

    def enough(self) -> int:
        """The least number of views with `uncovered` of at most `UNCOVERED`."""
        return max(1, math.ceil(self.uncovered(1) / UNCOVERED))


def variances(case: Case) -> Variances | None:
    """From the sample; None where it holds a single view or sample.

    None too for `topk`, where a logit that leaves the top k jumps to the mean of the others.
    """
    views, rows = len(case.sample.views), len(case.sample.rows)
    if (
        views < 2
        or rows < 2
        or any(store.fields["logits"].encoding.name == "topk" for store in case.stores)
    ):
        return None
    loss = case.loss
    temperature = loss.teacher_temperature or loss.temperature or 4.0
    targets = [
        scaled(torch.from_numpy(z), temperature, loss.standardize) for z in case.sample.logits
    ]
    mean = torch.stack(targets).mean(0).double()
    within = float(mean.var(0).sum(-1).mean())
    # The means of a few views scatter by W / V themselves.
    between = float(mean.mean(0).var(0).sum()) - within / views
    return Variances(within, between)


def few_views(case: Case) -> Iterator[Finding]:
    """So few views that a sample's targets are left to chance, and each is seen many times."""
    views = len(case.used)
    if case.epochs is None or case.epochs <= views or _holds_all_views(case):
        return
    spread, most = variances(case), _shown(case, case.epochs)
    if spread is None and views == 1 and len(case.sample.rows) > 1:
        yield Finding(
            "few-views",
            f"A single view of a sample is seen {case.epochs} times: the student memorizes its pixels "
            "and targets. How much targets change from view to view cannot be measured on one.",
            f"{_get(case, min(4, most))}{', or more' if most > 4 else ''}.",
        )
    if spread is None or spread.uncovered(views) <= UNCOVERED:
        return
    yield Finding(
        "few-views",
        f"{_views(views)} of a sample are {percent(spread.uncovered(views))} off the mean of all its views "
        f"(variance over views, divided by {views}, beside that between samples), and each is seen "
        f"{case.epochs / views:.0f} times in {case.epochs} epochs: the student memorizes these views.",
        _more(case, spread, most),
    )


def fit(case: Case) -> Iterator[Finding]:
    """A finished student against its targets: too small for them, or done with them."""
    if case.fit is None or case.uniform is None or not case.uniform["kd"] > 0:
        return
    shares, views = _shares(case, case.fit), len(case.used)
    left, falling = shares[-1], _falling(shares)
    if left > UNFIT:
        if case.fit.epochs < EPOCHS or falling >= FALLING:
            return  # too short, or not yet at its limit: that is no fault
        yield Finding(
            "unfit",
            f"After {case.fit.epochs} epochs the student is still {percent(left)} as far from its targets as "
            f"one of uniform predictions, and its distillation fell by {percent(max(falling, 0.0))} "
            "over the last half of the training.",
            "a larger student, or a smaller teacher; a higher --lr if the loss hardly moved at all, a lower "
            "one if it went up and down.",
        )
    elif left < PERFECT and case.fit.epochs > views and not _holds_all_views(case):
        spread = variances(case)
        if spread is not None and spread.uncovered(views) > UNCOVERED:
            yield Finding(
                "learned-by-heart",
                f"The student is {percent(1 - left)} of the way to its targets, having seen each of "
                f"{_views(views).lower()} {case.fit.epochs / views:.0f} times; the views that are not "
                f"stored differ from these by {percent(spread.uncovered(views))} of what there is to learn.",
                _more(case, spread, _shown(case, case.fit.epochs)),
            )


def _shares(case: Case, fit: Fit) -> list[float]:
    """The distillation term of each epoch beside that of a uniform student, whatever the warm-up."""
    uniform = [case.uniform_at(epoch) for epoch in range(fit.epochs)]
    return [
        kd / max(parts["kd"], 1e-12) for kd, parts in zip(fit.kd, uniform, strict=True) if parts
    ]


def _falling(shares: Sequence[float]) -> float:
    """By which share the mean of the last quarter of the epochs is below that of the quarter before."""
    quarter = max(1, len(shares) // 4)
    last, before = shares[-quarter:], shares[-2 * quarter : -quarter] or shares[:1]
    return 1 - fmean(last) / max(fmean(before), 1e-12)


def _holds_all_views(case: Case) -> bool:
    """Whether more views would bring nothing: all of a finite number, or one that never changes."""
    try:
        augmentation = from_description(case.first.plan.augmentation)
    except KDCacheError:
        return False  # a user's own, which a store must not import
    return augmentation.fixed or augmentation.views == len(case.used)


def _views(count: int) -> str:
    return "A single view" if count == 1 else f"{count} views"


def _shown(case: Case, epochs: int) -> int:
    """The most views of a sample that so many epochs show: one each, or a weak and a strong one."""
    return epochs * (2 if case.augmentation == "weak+strong" else 1)


def _more(case: Case, spread: Variances, most: int) -> str:
    """Views that suffice, but no more than a training shows."""
    views = min(spread.enough(), most)
    limit = ", all that its epochs show," if views < spread.enough() else ""
    left = percent(spread.uncovered(views))
    return f"{_get(case, views)}: {views} views{limit} bring that to {left}."


def _get(case: Case, views: int) -> str:
    """How to get so many views: they are stored, or a dump adds what is missing."""
    stored = min(store.n_views for store in case.stores)
    return (
        f"--views {views}, which are stored" if stored >= views else f"dump-teacher --views {views}"
    )

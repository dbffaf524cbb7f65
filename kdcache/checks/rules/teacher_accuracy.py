"""Rules about accuracy: the teacher's, that of its student, and whether images are preprocessed as it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy.stats import binom

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding, percent
from kdcache.models.classes import best_class_map
from kdcache.teachers.sanity import SIGNIFICANCE, Check, sample_size
from kdcache.teachers.trials import LEAST
from kdcache_stores import Store

#: How far of the way from chance to always right a teacher's top-1 must be. A resnet20 for CIFAR-100
#: that is shown images of twice its size still has 7%, far beyond what chance explains and of no use.
CLOSE = 0.1

#: Share of its clean top-1 that a teacher must keep on the views. The same resnet20 keeps 99% (73.0 of 74.0%)
#: on padded crops, which it was trained on, and 40% (29.9%) on resized crops, which it was not.
KEPT = 0.7


def teacher_on_views(case: Case) -> Iterator[Finding]:
    """Per teacher the most serious of: classes in another order, guessing, lost on the views.

    Measured on one view of the sample's rows, so that the rows are independent.
    """
    for number, store in enumerate(case.stores):
        labels, predictions = case.sample.labels, case.sample.logits[number][0].argmax(1)
        if number == 0:
            rest = case.sample.rest_labels
            labels = np.concatenate([labels, rest])
            predictions = np.concatenate([predictions, case.sample.rest.argmax(1)])
        known = labels >= 0
        if known.any():
            check = Check(labels[known], predictions[known].astype(np.int64), store.classes)
            yield from _on_views(case, store, check)


def _on_views(case: Case, store: Store, check: Check) -> Iterator[Finding]:
    who, where = name(store), f"on {len(check.labels)} stored views"
    order = other_order(check)
    clean = (store.teacher.clean_top1 or {}).get(store.plan.split)
    if order is not None:
        moved = [f"{d} is its {t}" for d, t in enumerate(order) if d != t]
        more = f" and {len(moved) - 5} more" if len(moved) > 5 else ""
        right = float((np.asarray(order)[check.labels] == check.predictions).mean())
        yield Finding(
            "class-order",
            f"{who} has a top-1 of {percent(check.top1)} {where}, but {percent(right)} with its "
            f"classes in another order: class {', '.join(moved[:5])}{more}. Distillation and labels "
            "pull the student to different classes.",
            "dump again with the right order as --class-map FILE.",
        )
    elif check.near_chance() or check.top1 < check.chance + CLOSE * (1 - check.chance):
        yield Finding(
            "chance",
            f"{who} has a top-1 of {percent(check.top1)} {where}, close to what guessing gives "
            f"({percent(check.chance)}): its logits hold little or no information about the labels.",
            "check its weights and its preprocessing (check --teacher tries the likely mistakes), or "
            "whether an imported array has the rows of this dataset.",
        )
    elif clean is not None and not case.mixed and check.top1 < KEPT * clean:
        yield Finding(
            "lost-on-views",
            f"{who} has a top-1 of {percent(check.top1)} {where}, and {percent(clean)} on clean "
            f"images of the same split: the augmentation {case.augmentation} takes away what it "
            "needs, or the views have another size than it was trained at.",
            "a milder --augment, or --size of the teacher's own training; check --teacher tries sizes.",
        )


def other_order(check: Check) -> tuple[int, ...] | None:
    """The order of classes that explains the predictions better than the given one, if there is one.

    Fitted on half of the images. On the rest it must gain `LEAST` of top-1 and more than chance would: a
    sign test over the images that one of the two orders gets right. So a pair of swapped classes is
    found too, which the check before a dump leaves to the user.
    """
    fitted, held = check.halves()
    order = np.asarray(
        best_class_map(check.labels[fitted], check.predictions[fitted], check.classes)
    )
    rest, predictions = check.labels[held], check.predictions[held]
    given, other = rest == predictions, order[rest] == predictions
    gained, lost = int((other & ~given).sum()), int((given & ~other).sum())
    if gained <= lost or other.mean() < given.mean() + LEAST:
        return None
    if binom.sf(gained - 1, gained + lost, 0.5) > SIGNIFICANCE:
        return None
    if Check(rest, np.where(other, rest, -1), check.classes).near_chance():
        return None
    return best_class_map(check.labels, check.predictions, check.classes)


def teacher_against_baseline(case: Case) -> Iterator[Finding]:
    """A teacher should be more accurate than its student becomes by labels alone.

    Clean test top-1 of the teacher, as its dump measured it on a sample of images, against the student's
    own training by cross-entropy. It must fall short by more than two standard errors of the sample:
    self-distillation (Furlanello et al. 2018) gains from equal teachers, and no published pair is near.
    """
    if case.baseline is None:
        return
    top1 = case.baseline.top1
    for store in case.stores:
        clean = (store.teacher.clean_top1 or {}).get("test")
        if clean is None:
            continue
        count = _clean_test_images(store)
        error = math.sqrt(max(clean * (1 - clean), 1 / count) / count)
        if clean + 2 * error < top1:
            yield Finding(
                "weak-teacher",
                f"{name(store)} has a top-1 of {percent(clean)} on clean test images (+- "
                f"{percent(error)}), the student reaches {percent(top1)} by labels alone "
                f"({case.baseline.path}): there is little to learn from it.",
                "a better teacher; if this one is known to be better, check --teacher looks for a "
                "mistake in its preprocessing.",
            )


def _clean_test_images(store: Store) -> int:
    """On how many the dump measured; stores that do not say it used as many as there may be."""
    counts = store.provenance.get("clean_images")
    count = counts.get("test") if isinstance(counts, dict) else None
    return count if isinstance(count, int) and count > 0 else sample_size(store.classes)


def student_against_baseline(case: Case) -> Iterator[Finding]:
    """A finished student should be no less accurate than its own training from labels alone.

    It must fall short by more than two standard errors of the difference, as for separate test sets: of
    students on one set, whose mistakes go together, that also covers what seeds make of it.
    """
    if case.baseline is None or case.fit is None or not case.fit.images:
        return
    labels, distilled = case.baseline.top1, case.fit.top1
    error = math.sqrt(
        sum(max(p * (1 - p), 1 / case.fit.images) for p in (labels, distilled)) / case.fit.images
    )
    if distilled + 2 * error < labels:
        yield Finding(
            "behind-labels",
            f"The student has a top-1 of {percent(distilled)} on {case.fit.images:,} test images, and "
            f"{percent(labels)} by labels alone ({case.baseline.path}): distillation made it worse.",
            "heed the other warnings first; then more weight for the labels (--alpha), more --epochs, "
            "which distillation needs more of, or a better teacher.",
        )


def teacher_preprocessing(case: Case) -> Iterator[Finding]:
    """Another normalisation, size or channel order with which the live teacher is clearly better."""
    if case.trials is None or (better := case.trials.better()) is None:
        return
    change, remedy, top1 = better
    yield Finding(
        "preprocessing",
        f"{name(case.first)} has a top-1 of {percent(case.trials.top1)} on "
        f"{len(case.trials.right)} clean images as it was dumped, and {percent(top1)} with {change}.",
        f"dump again: {remedy}." if remedy.startswith("--") else f"{remedy}.",
    )


def name(store: Store) -> str:
    """How findings name a store's teacher."""
    return f"The teacher {store.teacher.architecture} of {store.where}"

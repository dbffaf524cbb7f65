"""A teacher's top-1 on images as they are, not augmented: what is checked before its dump begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.preprocessing import Preprocessing
from kdcache.stages import stage
from kdcache.teachers.sanity import Check, clean_check, require_trained, sample_size
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.trials import LOWEST, TRIED, try_out
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError


def labelled_splits(source: DatasetSource, data: Dataset) -> dict[str, Dataset]:
    """The training and test split of a dataset, as far as they are there; `data` is one split."""
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = data if data.split == split else source.load(split)
        except DataError:
            continue
    return splits


class Clean(NamedTuple):
    """What a teacher is worth on clean images.

    Attributes:
        top1: by the name of the split.
        advice: how it would be clearly better, if a way is known.
        untried: that it is weak and other preprocessings were not tried, since the dump is too small.
    """

    top1: dict[str, float]
    advice: str | None = None
    untried: str | None = None


def clean_top1(
    teacher: Teacher,
    splits: Sequence[Dataset],
    allow_untrained: bool = False,
    size: int = 224,
    forwards: float = math.inf,
) -> Clean:
    """Top-1 on a sample of the clean images of each split; unlabelled ones are left out.

    The teacher is tested on all of them together: a test split may be too small to tell. One that is nearer
    to chance than to 1 is tried with other preprocessings too (`try_out`).

    Args:
        size: side of the central crop of images that differ in size: that of the views.
        forwards: of how many images it may cost; half of that is kept for trials where these would need it.

    Raises:
        MismatchError: the teacher guesses, or its classes are ordered otherwise; see
            `require_trained`.
    """
    checks: dict[str, Check] = {}
    spent = forwards / 2 if forwards >= 2 * TRIED * LOWEST else forwards
    for dataset in splits:
        images, labels = clean_images(dataset, size, spent / len(splits))
        if not len(labels):
            continue
        what = f"testing {teacher.architecture} on clean {dataset.split} images"
        with stage(what, "images", len(labels)) as advance:
            checks[dataset.split] = clean_check(teacher, images, labels)
            advance(len(labels))
        tried = dataset, images, labels
    top1 = {split: check.top1 for split, check in checks.items()}
    if not checks or allow_untrained:
        return Clean(top1)
    labels, predictions = (np.concatenate(parts) for parts in zip(*(
        (check.labels, check.predictions) for check in checks.values()
    ), strict=True))  # fmt: skip
    together = Check(labels, predictions, teacher.classes)
    left = forwards - len(together.labels)
    weak = together.low and splits[0].item is None
    tries = weak and left >= TRIED * LOWEST
    advice = _advice(teacher, *tried, left) if tries else None
    counts = " and ".join(f"{len(check.labels)} {split}" for split, check in checks.items())
    where = f"clean images of {splits[0].name} ({counts})"
    require_trained(teacher, together, where, advice)
    if not weak or tries:
        return Clean(top1, advice)
    return Clean(top1, untried=(
        f"{teacher.architecture} is nearer to guessing than to 1, and a dump as small as this tries no "
        "other preprocessing of it; once there is a store, `kdcache check STORE --dataset NAME --teacher "
        "TEACHER` does"
    ))  # fmt: skip


def _advice(
    teacher: Teacher,
    dataset: Dataset,
    images: torch.Tensor,
    labels: np.ndarray,
    forwards: float,
) -> str | None:
    try:
        measured = None if dataset.images is None else Preprocessing.measured(dataset.images)
    except DataError:  # a constant channel
        measured = None
    with stage(f"trying {teacher.architecture} with other preprocessings"):
        trials = try_out(teacher, images, labels, measured, forwards)
    if (better := trials.better()) is None:
        return None
    change, remedy, top1 = better
    instead = f"dump it with {remedy}" if remedy.startswith("--") else remedy
    return (
        f"{teacher.architecture} has a top-1 of {trials.top1:.1%} on {len(trials.right)} clean "
        f"{dataset.split} images, and {top1:.1%} with {change}: {instead}."
    )


def clean_images(
    dataset: Dataset, size: int = 224, most: float = math.inf
) -> tuple[torch.Tensor, np.ndarray]:
    """A sample of the labelled images, or other items, as they are, and their labels int64 (N,).

    Args:
        size: side of the central crop of images that differ in size.
        most: so many of them at most.
    """
    labelled = np.flatnonzero(dataset.labels >= 0)
    count = int(min(sample_size(dataset.classes), len(labelled), most))
    if not count:  # of no shape that matters
        return torch.zeros(0, 3, size, size, dtype=torch.uint8), np.zeros(0, np.int64)
    rows = labelled[np.arange(count) * len(labelled) // count]
    view = f"center-crop:size={size},resize={round(size * 256 / 224)}"
    view = "none" if dataset.image_shape or dataset.item else view
    plan = ViewPlan(dataset, make_augmentation(view, dataset), seed=0)
    with stage(f"decoding clean {dataset.split} images", "images", count) as advance:
        images = plan.images(rows, np.zeros(count, np.int64))
        advance(count)
    return images, dataset.labels[rows]

"""A teacher's top-1 on images as they are, not augmented: what is checked before its dump begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.evaluation.scores import CleanImages
from kdcache.preprocessing import Preprocessing
from kdcache.stages import stage
from kdcache.teachers.sanity import Check, clean_check, require_trained, sample_size
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.trials import LOWEST, TRIED, mean_and_std, try_out
from kdcache_stores import DataError, UsageError


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
        images: on how many of each.
        advice: how it would be clearly better, if a way is known.
        untried: whether it is weak, or its preprocessing assumed, and others were not tried: the dump is
            small, and the teacher slow.
    """

    top1: dict[str, float]
    images: dict[str, int]
    advice: str | None = None
    untried: bool = False


def clean_top1(
    teacher: Teacher,
    splits: Sequence[Dataset],
    allow_untrained: bool = False,
    size: int | None = None,
    forwards: float = math.inf,
    more: float = 0,
    assumed: bool = False,
) -> Clean:
    """Top-1 on a sample of the clean images of each split; unlabelled ones are left out.

    The teacher is tested on all of them together: a test split may be too small to tell. One that is nearer
    to chance than to 1, or whose preprocessing is assumed, is tested on more images if need be, and tried with
    other preprocessings (`try_out`).

    Args:
        size: side of the views, see `clean_images`.
        forwards: of how many images it may cost; half of that is kept for trials where these would need it.
        more: of how many it may cost instead where there is cause to look closer.
        assumed: nobody has said which preprocessing the teacher was trained with.

    Raises:
        MismatchError: the teacher guesses, or its classes are ordered otherwise; see `require_trained`.
        UsageError: its preprocessing is assumed, and another one fits it better.
    """
    spent = forwards / 2 if forwards >= 2 * TRIED * LOWEST else forwards
    tested = _tested(teacher, splits, size, spent)
    if allow_untrained or not tested:
        return _clean(tested)
    doubted = _together(tested, teacher).low or (assumed and splits[0].item is None)
    if doubted and more > forwards:
        forwards = more
        tested = _tested(teacher, splits, size, more / 2)
    together = _together(tested, teacher)
    left = forwards - len(together.labels)
    tries = doubted and splits[0].item is None and left >= TRIED * LOWEST
    best = max(tested, key=lambda part: part.check.top1)  # where differences show most
    better = _better(teacher, best, left) if tries else None
    counts = " and ".join(f"{len(part.labels)} {part.dataset.split}" for part in tested)
    where = f"clean images of {splits[0].name} ({counts})"
    require_trained(teacher, together, where, better and better.advice)
    if assumed and better is not None and better.option:
        assert isinstance(teacher.preprocessing, Preprocessing)  # only images have others to try
        raise UsageError(
            f"nothing says which pixels {teacher.architecture} was trained on, and what was assumed is not it: "
            f"{better.advice} To dump it as it is, give its own: "
            f"{mean_and_std(teacher.preprocessing)}"
        )
    untried = doubted and splits[0].item is None and not tries
    return _clean(tested)._replace(advice=better and better.advice, untried=untried)


class _Tested(NamedTuple):
    """Clean images of a split, their labels, and what the teacher predicts for them."""

    dataset: Dataset
    images: torch.Tensor
    labels: np.ndarray
    check: Check


def _tested(
    teacher: Teacher, splits: Sequence[Dataset], size: int | None, forwards: float
) -> list[_Tested]:
    """What the teacher predicts for clean images of each split that has labels."""
    tested = []
    for dataset in splits:
        images, labels = clean_images(dataset, size, forwards / len(splits))
        if not len(labels):
            continue
        what = f"testing {teacher.architecture} on clean {dataset.split} images"
        with stage(what, "images", len(labels)) as advance:
            check = clean_check(teacher, images, labels)
            tested.append(_Tested(dataset, images, labels, check))
            advance(len(labels))
    return tested


def _together(tested: Sequence[_Tested], teacher: Teacher) -> Check:
    labels = np.concatenate([part.check.labels for part in tested])
    predictions = np.concatenate([part.check.predictions for part in tested])
    return Check(labels, predictions, teacher.classes)


def _clean(tested: Sequence[_Tested]) -> Clean:
    return Clean(
        {part.dataset.split: part.check.top1 for part in tested},
        {part.dataset.split: len(part.labels) for part in tested},
    )


class _Better(NamedTuple):
    """A preprocessing that suits a teacher better: in a sentence, and whether an option gives it."""

    advice: str
    option: bool


def _better(teacher: Teacher, tested: _Tested, forwards: float) -> _Better | None:
    """The preprocessing that helps on the clean images of a split, if one does."""
    dataset = tested.dataset
    try:
        measured = None if dataset.images is None else Preprocessing.measured(dataset.images)
    except DataError:  # a constant channel
        measured = None
    with stage(f"trying {teacher.architecture} with other preprocessings"):
        trials = try_out(teacher, tested.images, tested.labels, measured, forwards)
    if (better := trials.better()) is None:
        return None
    change, remedy, top1 = better
    option = remedy.startswith("--")
    advice = (
        f"{teacher.architecture} has a top-1 of {trials.top1:.1%} on {len(trials.right)} clean "
        f"{dataset.split} images, and {top1:.1%} with {change}: "
        f"{f'dump it with {remedy}' if option else remedy}."
    )
    return _Better(advice, option)


def clean_images(
    dataset: Dataset, size: int | None = None, most: float = math.inf
) -> tuple[torch.Tensor, np.ndarray]:
    """A sample of the labelled images, or other items, un-augmented, and their labels int64 (N,).

    Args:
        size: side of the views: larger and smaller images are prepared as test images are, see
            `CleanImages`; None takes them as they are.
        most: so many of them at most.
    """
    labelled = np.flatnonzero(dataset.labels >= 0)
    count = int(min(sample_size(dataset.classes), len(labelled), most))
    if not count:  # of no shape that matters
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), np.zeros(0, np.int64)
    rows = labelled[np.arange(count) * len(labelled) // count]
    plan = CleanImages(dataset, rows, size).plan
    with stage(f"decoding clean {dataset.split} images", "images", count) as advance:
        images = plan.images(rows, np.zeros(count, np.int64))
        advance(count)
    return images, dataset.labels[rows]


def clean_side(dataset: Dataset, height: int, width: int) -> int | None:
    """The side that clean images are cropped to, for a teacher of views of height x width.

    None where they stay as they are: views that are not square, of images of one size.
    """
    return width if height == width or dataset.image_shape is None else None

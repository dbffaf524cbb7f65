"""Is this teacher the right one? Its top-1 on clean images, before anything is dumped.

The wrong weights, another normalisation or another order of classes give plausible-looking logits
and a worthless store; each of them shows in the accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from kdcache.models.classes import best_class_map
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import MismatchError

#: Clean images of a split that a teacher is tested on: at least, and at most, per class 5.
FEWEST, MOST, PER_CLASS = 500, 2000, 5

#: Chance explains an accuracy that it reaches at least this often.
SIGNIFICANCE = 1e-3


def sample_size(classes: int) -> int:
    """How many clean images of a split a teacher is tested on, where there are so many."""
    return min(max(FEWEST, PER_CLASS * classes), MOST)


@dataclass(frozen=True)
class Check:
    """What a teacher predicts on clean labelled images.

    Args:
        labels: int64 (N,), none of them -1.
        predictions: int64 (N,).
        classes: how many there are.
    """

    labels: np.ndarray
    predictions: np.ndarray
    classes: int

    @property
    def top1(self) -> float:
        """Share of right predictions, from 0 to 1."""
        return float((self.labels == self.predictions).mean())

    @property
    def chance(self) -> float:
        """Top-1 of always naming the most frequent class."""
        counts = np.bincount(self.labels, minlength=self.classes)
        return max(1 / self.classes, float(counts.max() / counts.sum()))

    @property
    def low(self) -> bool:
        """Whether it is nearer to chance than to 1."""
        return self.top1 < (self.chance + 1) / 2

    def near_chance(self) -> bool:
        """Whether guessing would reach this top-1 too often to call the teacher trained.

        Images so few that guessing could get all of them right tell nothing: False.
        """
        if self.chance ** len(self.labels) > SIGNIFICANCE:
            return False
        return _by_chance(self.labels == self.predictions, self.chance)

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Two halves of the images, drawn: every other image may be every other class."""
        drawn = np.random.Generator(np.random.Philox(0)).permutation(len(self.labels))
        return drawn[::2], drawn[1::2]

    def class_order(self) -> tuple[int, ...] | None:
        """The order of classes that explains the predictions better than the given one, if any.

        It is fitted on half of the images and counts only if it also holds on the rest: right there
        more often than chance, and twice as often as the given order.

        Returns:
            As a class map: the teacher's class for each class of the dataset.
        """
        fitted, held = self.halves()
        order = best_class_map(self.labels[fitted], self.predictions[fitted], self.classes)
        rest, predictions = self.labels[held], self.predictions[held]
        if not len(rest):
            return None
        right = np.asarray(order)[rest] == predictions
        given = float((rest == predictions).mean())
        if _by_chance(right, self.chance) or right.mean() < 2 * given:
            return None
        return best_class_map(self.labels, self.predictions, self.classes)


def _by_chance(right: np.ndarray, chance: float) -> bool:
    return bool(binom.sf(int(right.sum()) - 1, len(right), chance) > SIGNIFICANCE)


def clean_check(
    teacher: Teacher, images: Tensor, labels: Tensor | np.ndarray, batch_size: int = 250
) -> Check:
    """Run a teacher over clean images.

    Args:
        teacher: as it will be dumped.
        images: uint8 (N, C, H, W), on any device.
        labels: int64 (N,); images labelled -1 are left out.
        batch_size: images per forward.

    Raises:
        MismatchError: a label is not among the teacher's classes.
    """
    truth = np.asarray(labels, dtype=np.int64)
    if len(truth) and truth.max() >= teacher.classes:
        raise MismatchError(
            f"label {truth.max()} of the dataset is not among the {teacher.classes} classes "
            f"(from 0) of teacher {teacher.architecture}"
        )
    rows = torch.from_numpy(np.flatnonzero(truth >= 0))
    predictions = [
        teacher.logits(images[batch.to(images.device)].to(teacher.device)).argmax(1).cpu()
        for batch in torch.split(rows, batch_size)
        if len(batch)
    ]
    named = torch.cat(predictions).numpy() if predictions else np.zeros(0, np.int64)
    return Check(truth[rows.numpy()], named, teacher.classes)


def require_trained(teacher: Teacher, check: Check, where: str, advice: str | None = None) -> None:
    """Refuse a teacher that cannot be right.

    Args:
        teacher: as it will be dumped.
        check: what it predicts on clean images, several times as many as classes.
        where: names the images in the message, "1000 test images of cifar100" say.
        advice: what is known to help, a sentence.

    Raises:
        MismatchError: its classes are ordered otherwise than the dataset's, or its top-1 is what
            guessing gives.
    """
    order = check.class_order()
    if order is not None:
        moved = [f"{d} is its {t}" for d, t in enumerate(order) if d != t]
        more = f" and {len(moved) - 10} more" if len(moved) > 10 else ""
        reordered = float((np.asarray(order)[check.labels] == check.predictions).mean())
        raise MismatchError(
            f"teacher {teacher.architecture}: top-1 {check.top1:.1%} on {where}, but "
            f"{reordered:.1%} with its classes in another order: class {', '.join(moved[:10])}"
            f"{more}. Give the right order as --class-map FILE"
        )
    if check.near_chance():
        raise MismatchError(
            f"teacher {teacher.architecture}: top-1 {check.top1:.1%} on {where} cannot be told from guessing, "
            f"which has {check.chance:.1%} there on average. "
            + _without_weights(teacher)
            + (f"{advice} " if advice else "")
            + f"Check the weights and the preprocessing ({teacher.preprocessing}); "
            "--allow-untrained dumps it all the same"
        )


def _without_weights(teacher: Teacher) -> str:
    """A user's own function may load weights itself, or none."""
    name = teacher.architecture
    if ":" not in name or teacher.file_sha256 or teacher.weights_entry:
        return ""
    return f"If {name} loads no weights itself, name their file: {name}@FILE. "

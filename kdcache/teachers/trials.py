"""Why is a teacher worse than it should be? Other preprocessings, tried on a few clean images.

What it costs: about ten forward passes over `IMAGES` images of the views' own size, and one over `FEW` of each
larger size; a bound on it takes fewer images, and leaves out sizes that cost more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from kdcache.preprocessing import PREPROCESSINGS, Preprocessing
from kdcache.teachers.sanity import SIGNIFICANCE
from kdcache.teachers.teacher import Teacher

#: Sides that networks are commonly trained at, in pixels.
SIZES = (32, 64, 96, 224)
IMAGES, FEW = 500, 50

#: Trials of one teacher, about.
TRIED = 12

#: Images of each trial at least, where its cost is bounded: enough to see a mistake that costs most of them.
LOWEST = 24

#: What a mistake must cost to be reported. Measured on a resnet20 for CIFAR-100 (64% top-1): ImageNet's
#: normalisation costs nothing, pixels from -1 to 1 cost 9 points, BGR 25, pixels from 0 to 1 43.
LEAST = 0.02

Right = np.ndarray


@dataclass(frozen=True)
class Trials:
    """Which images a teacher gets right as it was dumped, and otherwise.

    Attributes:
        right: bool (N,), as dumped; in random order, so that the first few are a sample too.
        others: what was changed, how to dump it so -> bool (N,), or of the first few images alone.
    """

    right: Right
    others: dict[tuple[str, str], Right]

    @property
    def top1(self) -> float:
        """As dumped."""
        return float(self.right.mean())

    def better(self) -> tuple[str, str, float] | None:
        """The change that helps most, its remedy, and the top-1 with it; None if none helps.

        It must gain `LEAST` and more than chance would: a sign test over the images that only one of the
        two gets right, at the level `SIGNIFICANCE` over all that was tried.
        """
        if not self.others:
            return None
        gains = {k: r.mean() - self.right[: len(r)].mean() for k, r in self.others.items()}
        best = max(gains.values())
        # Of nearly equal ones the likeliest, which is tried first.
        name, remedy = next(k for k, gain in gains.items() if gain >= best - LEAST / 2)
        right = self.others[name, remedy]
        now = self.right[: len(right)]
        gained, lost = int((right & ~now).sum()), int((now & ~right).sum())
        likely = binom.sf(gained - 1, gained + lost, 0.5) * len(self.others)
        if gained <= lost or likely > SIGNIFICANCE or right.mean() < now.mean() + LEAST:
            return None
        return name, remedy, float(right.mean())


def try_out(
    teacher: Teacher,
    images: Tensor,
    labels: np.ndarray,
    measured: Preprocessing | None = None,
    forwards: float = math.inf,
) -> Trials:
    """Run a teacher over clean images, as it is and with each likely mistake undone.

    Args:
        teacher: with the preprocessing of its store.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), all known.
        measured: normalisation by the dataset's own mean and std.
        forwards: of how many images at the views' size it may cost about as much, where that is more than
            `LOWEST` for each trial.
    """
    count = int(min(IMAGES, max(LOWEST, forwards / TRIED)))
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))[:count]
    images, labels = images[torch.from_numpy(order)], labels[order]
    teacher = replace(teacher, compile=False)  # each size would be compiled anew

    def right(changed: Teacher, some: Tensor) -> Right:
        batches = torch.split(some, FEW)
        logits = torch.cat([changed.logits(b.to(teacher.device)).cpu() for b in batches])
        result: Right = logits.argmax(1).numpy() == labels[: len(some)]
        return result

    assert isinstance(
        teacher.preprocessing, Preprocessing
    )  # of images: of nothing else there are any
    now = teacher.preprocessing.size or images.shape[-1]
    others = {}
    for name, remedy, preprocessing in _preprocessings(teacher.preprocessing, measured, now):
        growth = ((preprocessing.size or now) / now) ** 2
        if growth > 1 and FEW * growth > forwards / TRIED:
            continue
        try:
            changed = replace(teacher, preprocessing=preprocessing)
            others[name, remedy] = right(changed, images[:FEW] if growth > 1 else images)
        except (RuntimeError, ValueError, AssertionError):  # a network for one size alone
            continue
    if images.shape[1] == 3:
        remedy = (
            "read the images with their channels in the other order (RGB, not BGR) and dump again"
        )
        others["the channels in reverse order", remedy] = right(teacher, images.flip(1))
    return Trials(right(teacher, images), others)


def _preprocessings(
    now: Preprocessing, measured: Preprocessing | None, side: int
) -> Iterator[tuple[str, str, Preprocessing]]:
    """(what is changed, the option of dump-teacher that does it, the preprocessing)."""

    def constant(mean: float, std: float) -> Preprocessing:
        return Preprocessing((mean,) * now.channels, (std,) * now.channels)

    known: dict[str, tuple[str, Preprocessing]] = {}
    if measured is not None:
        known["the normalisation measured on the dataset"] = _given(measured)
    for name, preprocessing in PREPROCESSINGS.items():
        known[f"the normalisation of {name}"] = (f"--normalize {name}", preprocessing)
    ranges = {"0 to 1": (0.0, 1.0), "-1 to 1": (0.5, 0.5), "0 to 255": (0.0, 1 / 255)}
    for name, (mean, std) in ranges.items():
        known[f"pixels from {name}"] = _given(constant(mean, std))
    for name, (option, preprocessing) in known.items():
        same = (preprocessing.mean, preprocessing.std) == (now.mean, now.std)
        if preprocessing.channels == now.channels and not same:
            yield name, option, replace(now, mean=preprocessing.mean, std=preprocessing.std)
    for size in SIZES:
        if size != side:
            yield f"images of {size} pixels", f"--size {size}", replace(now, size=size)


def _given(preprocessing: Preprocessing) -> tuple[str, Preprocessing]:
    return mean_and_std(preprocessing), preprocessing


def mean_and_std(preprocessing: Preprocessing) -> str:
    """The options that give a normalisation."""
    mean, std = (
        ",".join(f"{v:.6g}" for v in values) for values in (preprocessing.mean, preprocessing.std)
    )
    return f"--mean {mean} --std {std}"

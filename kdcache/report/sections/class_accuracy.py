"""Accuracy per class of the test split, the students' beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from kdcache.report.figures import INK, Figure, figure, legend, look
from kdcache.report.logits import TestLogits
from kdcache_stores.printable import printable

MOST = 20
"""Classes that are drawn; of more, those in which the students are furthest behind the teacher."""

Floats = NDArray[np.float64]


def class_labels(classes: int, names: Sequence[str] | None) -> list[str]:
    """What an axis says of each class: its name, or its number."""
    return [printable(name)[:18] for name in names] if names else [str(k) for k in range(classes)]


def class_accuracy(network: TestLogits) -> Floats:
    """Top-1 of each class in [0, 1], float64 (K,); NaN for a class without samples."""
    known = network.labels >= 0
    labels = network.labels[known].numpy()
    right = network.logits[known].argmax(1).numpy() == labels
    classes = network.logits.shape[1]
    rows = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[right], minlength=classes)
    shares: Floats = np.divide(hits, rows, out=np.full(classes, np.nan), where=rows > 0)
    return shares


def per_class_figure(
    students: Mapping[str, Sequence[TestLogits]],
    teacher: TestLogits | None,
    names: Sequence[str] | None,
) -> Figure | None:
    """A line per class: the teacher, and each group's mean over its seeds; None where nothing is labelled.

    Args:
        students: group's label -> a network per seed.
        names: of the classes.
    """
    means = {
        label: np.mean([class_accuracy(network) for network in networks], axis=0)
        for label, networks in students.items()
    }
    reference = None if teacher is None else class_accuracy(teacher)
    shown = [*means.values(), *([] if reference is None else [reference])]
    classes = np.flatnonzero(np.isfinite(shown[0])) if shown else np.zeros(0, np.int64)
    if not len(classes):
        return None
    best = np.max(list(means.values()), axis=0) if means else shown[0]
    # The hardest on top; beside a teacher those where even the best group is furthest behind it.
    behind = best if reference is None else best - reference
    order = classes[np.argsort(behind[classes], kind="stable")]
    drawn = order[:MOST]
    labels = class_labels(len(shown[0]), names)

    def draw(axes: Axes) -> None:
        places = np.arange(len(drawn))
        for index, (label, values) in enumerate(means.items()):
            axes.plot(100 * values[drawn], places, "o", color=look(index)["color"], alpha=0.85,
                      markersize=5, markeredgewidth=0, label=label)  # fmt: skip
        if reference is not None:
            axes.plot(100 * reference[drawn], places, "|", color=INK, markersize=13,
                      markeredgewidth=2, label="teacher")  # fmt: skip
        axes.set_yticks(places, [labels[k] for k in drawn])
        axes.set(xlabel="top-1 on the test split, %", ylabel="class", ylim=(len(drawn) - 0.4, -0.6))
        legend(axes, len(shown))

    worst = ", ".join(
        f"{labels[k]} ({', '.join(f'{n} {100 * v[k]:.1f} %' for n, v in means.items())})"
        for k in drawn[:3]
    )
    part = f"{len(drawn)} of {len(classes)}" if len(drawn) < len(classes) else "All"
    how = "furthest behind the teacher first" if reference is not None else "hardest first"
    columns = ["class", "name", *means, *([] if reference is None else ["teacher"])]
    return figure(
        "class-accuracy",
        "Accuracy per class",
        draw,
        alt=f"Top-1 per class of each group{'' if teacher is None else ' and of the teacher'}, {how}: {worst}.",
        caption=f"{part} classes, {how}; a group's value is the mean over its seeds.",
        columns=columns,
        rows=[(int(k), labels[k], *(float(values[k]) for values in shown)) for k in order],
        size=(4.6, 1.4 + 0.24 * len(drawn)),
    )

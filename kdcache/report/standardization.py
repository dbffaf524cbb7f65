"""The figures of logit standardization (Sun et al., CVPR 2024): scale, class means, toy case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from kdcache.methods.scaling import divergence, standardize
from kdcache.report.figures import COLOURS, INK, Figure, figure, legend
from kdcache.report.logits import TestLogits, class_means
from kdcache.report.page import Section, Table
from kdcache.report.sections.class_accuracy import MOST, class_labels, per_class_figure

BINS = 60
TEACHER = "#808080"

TOY_CLASSES = ("cat", "dog", "bird", "frog")
TOY = {
    "teacher": (1.0, 4.0, 3.0, 2.0),
    "student 1": (1.0, 2.8, 3.0, 2.0),
    "student 2": (0.1, 0.4, 0.3, 0.2),
}


def standardization_section(
    teacher: TestLogits | None,
    students: Mapping[str, Sequence[TestLogits]],
    names: Sequence[str] | None = None,
    toy: bool = False,
) -> Section:
    """Everything of the section; without a teacher, only what the students are.

    Args:
        students: group's label -> a network per seed; what is drawn of single networks is of the first.
        names: of the classes.
        toy: with the paper's toy case.
    """
    by_class = per_class_figure(students, teacher, names)
    first = [networks[0] for networks in students.values()]
    networks = [teacher, *first] if teacher else first
    figures = [by_class] if by_class else []
    figures += [joint_histogram(networks, teacher)] if networks else []
    tables = []
    if teacher is not None and first:
        maps, table = heatmaps(teacher, first, names)
        figures += maps
        tables.append(table)
    if toy:
        figures.append(toy_figure())
        tables.append(toy_table())
    return Section(
        "Logits of teacher and students",
        "Standardization lets a student match the teacher's relations between classes without matching "
        "the scale of its logits (Sun et al., CVPR 2024). All is measured on the test split without "
        "augmentation; scales and differences are drawn as in the paper.",
        tables=tables,
        figures=figures,
    )


def joint_histogram(networks: Sequence[TestLogits], teacher: TestLogits | None) -> Figure:
    """Bivariate histogram of the mean and biased std over classes of each sample's logits."""
    points = {
        network.label: torch.stack([network.logits.mean(1), network.logits.std(1, correction=0)])
        .double()
        .numpy()
        for network in networks
    }
    everything = np.concatenate(list(points.values()), axis=1)
    low, high = everything.min(axis=1), everything.max(axis=1)
    pad = 0.04 * np.maximum(high - low, 1e-6)
    edges = [np.linspace(low[i] - pad[i], high[i] + pad[i], BINS + 1) for i in (0, 1)]

    def draw(axes: Axes) -> None:
        handles = []
        for index, (label, (mean, std)) in enumerate(points.items()):
            own = teacher is not None and label == teacher.label
            colour = TEACHER if own else COLOURS[(index - (teacher is not None)) % len(COLOURS)]
            counts = np.histogram2d(mean, std, bins=edges)[0].T
            # The fuller a bin, the more opaque: networks that overlap stay visible.
            picture = np.empty((*counts.shape, 4))
            picture[..., :3] = to_rgb(colour)
            picture[..., 3] = np.where(counts > 0, 0.3 + 0.7 * np.sqrt(counts / counts.max()), 0)
            axes.imshow(picture, origin="lower", aspect="auto", interpolation="none",
                        extent=(*edges[0][[0, -1]], *edges[1][[0, -1]]))  # fmt: skip
            handles.append(Line2D([], [], marker="s", linestyle="", color=colour, label=label))
        axes.set(xlabel="mean of a sample's logits", ylabel="standard deviation (biased)",
                 ylim=(min(0, edges[1][0]), edges[1][-1]))  # fmt: skip
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3))

    stds = ", ".join(f"{label} {std.mean():.3g}" for label, (_, std) in points.items())
    return figure(
        "logit-scale",
        "Mean and spread of the logits",
        draw,
        alt=f"Bivariate histogram of logit mean and standard deviation. Average std: {stds}.",
        caption=f"One histogram per network over the test samples. Average std: {stds}.",
        columns=("network", "sample", "mean", "std"),
        rows=[
            (label, row, float(mean), float(std))
            for label, values in points.items()
            for row, (mean, std) in enumerate(values.T)
        ],
        size=(4.6, 3.8),
    )


def heatmaps(
    teacher: TestLogits, students: Sequence[TestLogits], names: Sequence[str] | None = None
) -> tuple[list[Figure], Table]:
    """|mean teacher logits - mean student logits| per true class, raw and Z-scored, per student.

    Logit vectors are averaged over the samples of each true class (after Z-scoring each, unbiased, for
    the second map); the diagonal is set to zero as in the paper. Colours share a scale per kind.
    """
    maps: dict[str, dict[str, np.ndarray]] = {"raw": {}, "standardized": {}}
    for student in students:
        for kind, (a, b) in {
            "raw": (teacher.logits, student.logits),
            "standardized": (standardize(teacher.logits), standardize(student.logits)),
        }.items():
            gap = np.abs(class_means(a, teacher.labels) - class_means(b, student.labels))
            np.fill_diagonal(gap, 0)
            maps[kind][student.label] = gap
    top = {kind: max(float(np.nanmax(gap)) for gap in gaps.values()) for kind, gaps in maps.items()}
    figures = [
        _heatmap(label, kind, maps[kind][label], top[kind], index, names)
        for index, label in enumerate(maps["raw"])
        for kind in maps
    ]
    rows = [
        [
            label,
            *(
                f"{value(maps[kind][label]):.3f}"
                for kind in maps
                for value in (np.nanmean, np.nanmax)
            ),
        ]
        for label in maps["raw"]
    ]
    columns = ["student", "raw, mean", "raw, max", "standardized, mean", "standardized, max"]
    return figures, Table("Difference between the mean logits of teacher and student, per true class",
                          columns, rows)  # fmt: skip


def _heatmap(
    label: str, kind: str, gap: np.ndarray, top: float, index: int, names: Sequence[str] | None
) -> Figure:
    classes = class_labels(len(gap), names)
    width = max(map(len, classes))

    def draw(axes: Axes) -> None:
        image = axes.imshow(gap, cmap="Reds", vmin=0, vmax=top or 1, interpolation="none")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.outline.set_visible(False)
        axes.grid(visible=False)
        if len(classes) <= MOST:
            places = range(len(classes))
            axes.set_xticks(places, classes, rotation=90 if width > 2 else 0, fontsize=8)
            axes.set_yticks(places, classes, fontsize=8)
        axes.set(xlabel="logit of class", ylabel="true class")

    mean, most = np.nanmean(gap), np.nanmax(gap)
    return figure(
        f"heatmap-{index}-{kind}",
        f"{label}: {kind} logits",
        draw,
        alt=f"Heatmap of the absolute difference between teacher and {label} in {kind} mean logits per "
        f"true class; mean {mean:.3f}, largest {most:.3f}.",
        caption=f"Mean {mean:.3f}, largest {most:.3f}; diagonal set to zero.",
        columns=("true_class", "logit_of_class", "difference"),
        rows=[(row, column, float(value)) for (row, column), value in np.ndenumerate(gap)],
        size=(3.3, 2.9),
        small=True,
    )


def toy_divergences() -> dict[str, dict[str, float]]:
    """KL(teacher || student) of the toy case in nats at temperature 1: raw, and Z-scored (unbiased)."""
    teacher = torch.tensor(TOY["teacher"])
    divergences = {}
    for name in ("student 1", "student 2"):
        student = torch.tensor(TOY[name])
        raw = divergence(student, teacher).item()
        scored = divergence(standardize(student), standardize(teacher)).item()
        divergences[name] = {"raw": raw, "standardized": scored}
    return divergences


def toy_table() -> Table:
    """Which student plain KD prefers, and which the standardized one."""
    rows = []
    for name, values in toy_divergences().items():
        prediction = TOY_CLASSES[int(np.argmax(TOY[name]))]
        rows.append(
            [
                f"{name} (predicts {prediction})",
                f"{values['raw']:.4f}",
                f"{abs(values['standardized']):.4f}",
            ]
        )
    prediction = TOY_CLASSES[int(np.argmax(TOY["teacher"]))]
    return Table(f"Toy case: KL from the teacher, which predicts {prediction}, in nats at temperature 1",
                 ["student", "raw logits", "standardized"], rows)  # fmt: skip


def toy_figure() -> Figure:
    """The logits of the toy case, raw and Z-scored."""
    scored = {name: standardize(torch.tensor(values)).tolist() for name, values in TOY.items()}
    places: list[tuple[str, str, dict[str, Any]]] = [
        ("raw", "", TOY),
        ("standardized", "Z ", scored),
    ]

    def draw(axes: Axes) -> None:
        colours = dict(zip(TOY, (INK, COLOURS[1], COLOURS[0]), strict=True))
        ticks = []
        for block, (_, prefix, vectors) in enumerate(places):
            for column, name in enumerate(TOY_CLASSES):
                x = block * 5 + column
                ticks.append((x, prefix + name))
                for offset, who in enumerate(TOY):
                    axes.bar(x + 0.27 * (offset - 1), vectors[who][column], 0.25, color=colours[who],
                             label=who if x == 0 else None)  # fmt: skip
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks], rotation=45)
        axes.set(xlabel="class", ylabel="logit | Z-score")
        axes.grid(visible=False, axis="x")
        legend(axes, len(TOY))

    return figure(
        "toy-case",
        "Toy case: the right prediction at the wrong scale",
        draw,
        alt="Bars of the logits of a teacher and two students over four classes, raw and standardized; "
        "standardized, student 2 equals the teacher.",
        caption="Student 2 ranks the classes as the teacher does at a tenth of the scale. By raw logits "
        "plain KD prefers student 1, whose prediction is wrong; Z-scored, student 2 is the teacher.",
        columns=("kind", "network", "class", "value"),
        rows=[
            (kind, who, name, value)
            for kind, _, vectors in places
            for who, values in vectors.items()
            for name, value in zip(TOY_CLASSES, values, strict=True)
        ],
    )

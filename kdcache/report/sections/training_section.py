"""How runs trained: curves over epochs, accuracy per group, and the table of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from kdcache.methods.table import without_teacher
from kdcache.report.collect import Difference, Group, Spread, baseline_of, difference
from kdcache.report.figures import INK, Figure, figure, legend, look, table_csv
from kdcache.report.page import Section, Table
from kdcache.report.sections.settings_table import settings_table

CURVES = {
    "test_top1": ("accuracy", "Test accuracy", "top-1 on the test split, %", 100, "linear"),
    "train_loss": ("loss", "Training loss", "loss of the method", 1, "log"),
    "test_nll": ("nll", "Test loss", "negative log-likelihood, nats", 1, "log"),
}

COLUMNS = {
    "last_top1": ("last, %", 100, 2),
    "best_top1": ("best, %", 100, 2),
    "seconds_per_epoch": ("s per epoch", 1, 3),
    "data_wait_fraction": ("data wait, %", 100, 1),
    "teacher_forwards": ("teacher forwards", 1, 0),
    "last_nll": ("NLL", 1, 3),
    "last_ece": ("ECE, %", 100, 2),
    "temperature": ("fitted T", 1, 3),
    "calibrated_nll": ("NLL at T", 1, 3),
    "calibrated_ece": ("ECE at T, %", 100, 2),
}


def training_section(
    groups: Sequence[Group],
    teacher: Group | None,
    calibrated: dict[str, dict[int, Any]],
    teacher_top1: float | None = None,
) -> Section:
    """Curves and table of some groups.

    Args:
        teacher: its run, for the table alone.
        calibrated: group's label -> seed -> temperature, calibrated_nll, calibrated_ece, for runs
            whose summaries lack them.
        teacher_top1: of the teacher on the test split, in [0, 1]; None: that of its run, if there is one.
    """
    figures = [curve(groups, name) for name in CURVES if _any(groups, name)]
    if any(group.values("last_top1") for group in groups):
        figures.insert(0, final_accuracy(groups))
    table, raw, notes = results(groups, teacher, calibrated, teacher_top1)
    unfinished = [
        f"{run.path.name} (seed {run.seed}) is not finished: {len(run.metrics)} of {run.epochs} epochs"
        for group in groups
        for run in group.runs
        if run.summary is None
    ]
    return Section(
        "Runs",
        f"{sum(len(group.runs) for group in groups)} runs in {len(groups)} groups; runs of a group "
        "differ only in their seed. Values are means ± standard deviations over the seeds.",
        tables=[table, settings_table(groups)],
        figures=figures,
        notes=[*notes, *unfinished],
        files={"runs.csv": raw},
    )


def warnings_of(groups: Sequence[Group]) -> list[str]:
    """The warnings of the runs with their remedies, once per group."""
    measured = {
        f"{group.label}: {warning['message']} Remedy: {warning['remedy']}": None
        for group in groups
        for run in group.runs
        for warning in (run.summary or {}).get("warnings", [])
    }
    return list(measured)


def _any(groups: Sequence[Group], name: str) -> bool:
    return any(run.last(name) is not None for group in groups for run in group.runs)


def series(group: Group, name: str) -> tuple[list[int], np.ndarray] | None:
    """The epochs in which all seeds have an entry of the metrics, and float64 (epochs, seeds)."""
    curves = [
        {r.get("epoch", i): r[name] for i, r in enumerate(run.metrics, 1) if name in r}
        for run in group.runs
    ]
    epochs = sorted(set.intersection(*map(set, curves)))
    if not epochs:
        return None
    return epochs, np.array([[values[e] for values in curves] for e in epochs], np.float64)


def curve(groups: Sequence[Group], name: str) -> Figure:
    """One line per group: the mean over its seeds in a band of one standard deviation."""
    stem, title, label, factor, scale = CURVES[name]
    shown = [(i, g, s) for i, g in enumerate(groups) if (s := series(g, name)) is not None]
    rows = []

    def draw(axes: Axes) -> None:
        for index, group, (epochs, values) in shown:
            values = values * factor
            mean = values.mean(axis=1)
            axes.plot(epochs, mean, label=group.label, **look(index),
                      marker="o" if len(epochs) == 1 else None)  # fmt: skip
            if values.shape[1] > 1:
                std = values.std(axis=1, ddof=1)
                low = mean - std if scale == "linear" else np.maximum(mean - std, mean / 10)
                axes.fill_between(epochs, low, mean + std, color=look(index)["color"], alpha=0.18,
                                  linewidth=0)  # fmt: skip
        axes.set(xlabel="epoch", ylabel=label, yscale=scale)
        if scale != "linear":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes, len(shown))

    for _, group, (epochs, values) in shown:
        for epoch, seeds in zip(epochs, values, strict=True):
            rows += [
                (group.label, run.seed, epoch, value)
                for run, value in zip(group.runs, seeds, strict=True)
            ]
    ends = ", ".join(f"{g.label} {v[-1].mean() * factor:.4g}" for _, g, (_, v) in shown)
    return figure(
        f"curve-{stem}",
        title,
        draw,
        alt=f"{title} over epochs, one line per group. In the last epoch: {ends}.",
        caption="Mean over seeds; the band is one standard deviation either side."
        + (" Losses of different methods have different scales." if name == "train_loss" else ""),
        columns=("group", "seed", "epoch", name),
        rows=rows,
    )


def final_accuracy(groups: Sequence[Group]) -> Figure:
    """Accuracy of the last epoch: a dot per seed, the mean and its standard deviation."""
    shown = [(i, g, v) for i, g in enumerate(groups) if (v := g.values("last_top1"))]

    def draw(axes: Axes) -> None:
        for place, (index, _, values) in enumerate(reversed(shown)):
            colour = look(index)["color"]
            points = [100 * value for value in values.values()]
            spread = Spread.of(points)
            assert spread is not None
            if spread.n > 1:
                axes.errorbar(spread.mean, place, xerr=spread.std, color=colour, capsize=4)
            axes.plot(points, [place] * len(points), "o", color=colour, alpha=0.5, markersize=5,
                      markeredgewidth=0)  # fmt: skip
            axes.plot(spread.mean, place, "|", color=INK, markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(shown)), [group.label for _, group, _ in reversed(shown)])
        axes.set(xlabel="top-1 after the last epoch, %", ylabel="group",
                 ylim=(-0.6, len(shown) - 0.4))  # fmt: skip
        axes.grid(visible=False, axis="y")

    means = ", ".join(f"{g.label} {100 * np.mean(list(v.values())):.2f} %" for _, g, v in shown)
    return figure(
        "accuracy-last",
        "Accuracy after the last epoch",
        draw,
        alt=f"Test accuracy after the last epoch for each group: {means}.",
        caption="A dot per seed; the bar is the mean, the whiskers one standard deviation.",
        columns=("group", "seed", "last_top1"),
        rows=[(g.label, seed, value) for _, g, v in shown for seed, value in v.items()],
        size=(4.6, 1.0 + 0.42 * len(shown)),
    )


def results(
    groups: Sequence[Group],
    teacher: Group | None,
    calibrated: dict[str, dict[int, Any]],
    teacher_top1: float | None = None,
) -> tuple[Table, str, list[str]]:
    """The table of groups, best first; the CSV with every run; and notes on how to read it."""

    def values_of(group: Group, name: str) -> dict[int, float]:
        extra = {
            s: figures[name]
            for s, figures in calibrated.get(group.label, {}).items()
            if name in figures
        }
        return extra | group.values(name)

    def order(group: Group) -> float:
        spread = Spread.of(group.values("last_top1").values())
        return -spread.mean if spread else math.inf

    own = Spread.of(teacher.values("last_top1").values()) if teacher else None
    reference = own.mean if own and teacher_top1 is None else teacher_top1
    everyone = [*groups, *([teacher] if teacher else [])]
    ranked = sorted(everyone, key=order)
    several = len({group.model for group in everyone}) > 1
    shown = {
        name: how
        for name, how in COLUMNS.items()
        if name == "last_top1" or any(values_of(group, name) for group in everyone)
    }
    lines: list[list[str]] = []
    paired: list[bool] = []
    for group in ranked:
        baseline = baseline_of(group, groups)
        theirs = baseline.values("last_top1") if baseline else {}
        gap = difference(group.values("last_top1"), theirs)
        paired += [gap.paired] if gap else []
        cells = [_cell(values_of(group, name), *v[1:]) for name, v in shown.items()]
        gained = "teacher" if group is teacher else _gap(gap, baseline, group)
        network = [group.model] * several
        closed = [_closed(gap, theirs, reference)] * (reference is not None)
        seeds = str(len(group.runs))
        lines.append([group.label, cells[0], gained, *closed, seeds, *network, *cells[1:]])
    last, *others = (heading for heading, _, _ in shown.values())
    closing = ["gap closed, %"] * (reference is not None)
    columns = [
        "method",
        last,
        "minus ce, points",
        *closing,
        "seeds",
        *["network"] * several,
        *others,
    ]
    notes = []
    if reference is not None:
        notes.append(
            f"The teacher's top-1 on the test split is {100 * reference:.2f} %. The gap closed is the part of "
            "its lead over ce that a student gains: 0 is ce, 100 the teacher."
        )
    if paired:
        how = (
            "seed by seed (a seed draws the same initial weights and samples in both groups)"
            if all(paired)
            else "seed by seed where both groups have the same seeds, else as for independent runs"
        )
        notes.append(f"The ± of a difference is its standard error, {how}.")
    if "last_nll" in shown:
        notes.append(
            "NLL (nats) and ECE (15 bins) are those of the last epoch; at T: after dividing the logits "
            "by the temperature that fits best (the test set, or samples that the run held out; at 100 % "
            "accuracy it runs to its lower bound of 0.02). Students of standardized logits "
            "have small logits, so only the latter compare."
        )
    if "best_top1" in shown:
        notes.append(
            "Best is the maximum over epochs, on the test set unless a run held samples out, which "
            "flatters; last involves no choice."
        )
    raw = table_csv(
        ["run", "method", "network", "seed", "epochs", *shown],
        [
            [run.path.name, group.label, group.model, run.seed, len(run.metrics)]
            + [values_of(group, name).get(run.seed) for name in shown]
            for group in everyone
            for run in group.runs
        ],
    )
    return Table("Results, best first", columns, lines), raw, notes


def _cell(values: dict[int, float], factor: float, digits: int) -> str:
    spread = Spread.of(value * factor for value in values.values())
    if spread is None:
        return "–"
    mean = f"{spread.mean:,.{digits}f}"
    return mean if math.isnan(spread.std) or digits == 0 else f"{mean} ± {spread.std:.{digits}f}"


def _closed(gap: Difference | None, baseline: dict[int, float], teacher: float | None) -> str:
    """The part of the teacher's lead over the baseline that a group gains, where the teacher leads."""
    if gap is None or teacher is None:
        return ""
    lead = teacher - fmean(baseline.values())
    return f"{100 * gap.mean / lead:.0f}" if lead > 0 else "–"


def _gap(gap: Difference | None, baseline: Group | None, group: Group) -> str:
    if gap is None or baseline is None:
        return "baseline" if without_teacher(group.method) else "no baseline"
    error = "" if math.isnan(gap.error) else f" ± {100 * gap.error:.2f}"
    return f"{100 * gap.mean:+.2f}{error}"

"""The section of a store: its teacher, how confident that is, how faithfully it is stored, what it saves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kdcache.break_even import break_even
from kdcache.report.figures import COLOURS, INK, Figure, figure
from kdcache.report.page import Section, Table
from kdcache.report.survey import Survey
from kdcache_stores import Store, describe
from kdcache_stores.printable import printable

BINS = 60
FEW_CLASSES = 20

_DISTRIBUTIONS = {
    "mean": ("Mean of the logits", "mean over classes of a row's logits"),
    "std": ("Spread of the logits", "standard deviation over classes (biased)"),
    "entropy": ("Uncertainty of the teacher", "entropy of the softmax at T=1, nats"),
}


def store_section(store: Store, name: str, statistics: Survey) -> Section:
    """The section of one store.

    Args:
        name: for the files, unique among the report's stores.
        statistics: from `survey`.
    """
    figures = [top1_per_view(name, statistics)] if statistics.top1 else []
    figures += [distribution(name, statistics, kind) for kind in _DISTRIBUTIONS]
    if statistics.top1:
        figures.append(per_class(name, statistics, store.plan.class_names))
    figures.append(variation(name, statistics))
    notes = []
    if len(statistics.views) < store.n_views or len(statistics.rows) < len(store):
        notes.append(
            f"The store is large: figures are from {len(statistics.views)} of {store.n_views} views and "
            f"{len(statistics.rows):,} of {len(store):,} samples, evenly spaced."
        )
    if not statistics.top1:
        notes.append("The samples have no labels, so there is no accuracy to show.")
    return Section(
        f"Store {name}",
        f"The outputs of {store.teacher.architecture.rpartition('/')[2]} to {store.n_views} views of "
        f"each of {len(store):,} samples of {store.plan.dataset} ({store.plan.split}).",
        tables=[facts(describe(store))],
        figures=figures,
        notes=notes,
    )


def plain_section(store: Store, name: str) -> Section:
    """A store without logits: what there is to know of it, and no figure, as all are of logits."""
    return Section(
        f"Store {name}",
        f"{', '.join(store.fields)} of {store.teacher.architecture.rpartition('/')[2]} for {store.n_views} "
        f"views of each of {len(store):,} samples of {store.plan.dataset} ({store.plan.split}).",
        tables=[facts(describe(store))],
    )


def facts(info: dict[str, Any]) -> Table:
    """What there is to know in words and numbers."""
    plan, teacher = info["plan"], info["teacher"]
    account = break_even(info)
    settings = ", ".join(f"{k} {v}" for k, v in plan["augmentation"].items() if k != "name")
    rows = [
        ["Views", f"{info['views']} of {plan['augmentation'].get('name')} ({settings or 'no options'}), "
                  f"seed {plan['seed']}"],
        ["Teacher", f"{teacher['architecture'].rpartition('/')[2]}, {teacher['precision']}, weights "
                    f"{teacher['weights_sha256'][:12]}"],
        ["Size", f"{info['nbytes']:,} bytes"],
    ]  # fmt: skip
    for name, field in info["fields"].items():
        rows += _field_facts(name, field)
    rows += [
        ["Spent once", f"{account.spent:,} teacher forwards"],
        [
            "Saved",
            f"{account.saved_per_epoch:,} forwards per student and epoch: {account.sentence()}",
        ],
        ["Content digest", info["digest"]],
    ]
    return Table(f"{plan['dataset']} {plan['split']}", ["", ""], rows)


def _field_facts(name: str, field: dict[str, Any]) -> list[list[str]]:
    encoding = dict(field["encoding"])
    encoded = encoding.pop("name") + "".join(f", {key} {value}" for key, value in encoding.items())
    shape = " x ".join(map(str, field["shape"]))
    rows = [[f"Field {name}", f"{shape}, {field['bytes_per_row']:.1f} bytes a row ({encoded})"]]
    if name == "logits":
        top1 = "no labels" if field["top1"] is None else f"{field['top1']:.2%}"
        rows.append(["Teacher's top-1 on the views", top1])
    if f := field["fidelity"]:
        rows.append([
            "Fidelity of the encoding",
            f"KL to the live logits, mean (worst) over {f['rows']:,.0f} rows: "
            f"{f['kl_t1_mean']:.2g} ({f['kl_t1_worst']:.2g}) nats at T=1, "
            f"{f['kl_t4_mean']:.2g} ({f['kl_t4_worst']:.2g}) at T=4, "
            f"{f['kl_z_mean']:.2g} ({f['kl_z_worst']:.2g}) Z-scored at τ=2; "
            f"same best class in {f['top1_agreement']:.3%}",
        ])  # fmt: skip
    if field["error"] is not None:
        through = field["head_kl"]
        logits = "" if through is None else f"; KL of the head's logits {through:.2g} at T=1"
        rows.append([f"Error of {name}", f"{field['error']:.2g} of its squared norm{logits}"])
    return rows


def top1_per_view(name: str, statistics: Survey) -> Figure:
    """The teacher's accuracy on each view."""
    views, values = list(statistics.top1), [100 * value for value in statistics.top1.values()]

    def draw(axes: Axes) -> None:
        axes.plot(views, values, "o" if len(views) > 1 else "D", color=COLOURS[0], markersize=4)
        axes.axhline(float(np.mean(values)), color=INK, linewidth=1, linestyle="--", alpha=0.6)
        margin = max(0.5, 0.4 * (max(values) - min(values)))
        axes.set(xlabel="view", ylabel="teacher's top-1, %",
                 ylim=(min(values) - margin, min(max(values) + margin, 100 + margin / 4)))  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return figure(
        f"{name}-top1",
        "Teacher's accuracy per view",
        draw,
        alt=f"Top-1 of the teacher on {len(views)} views: mean {np.mean(values):.2f} %, from "
        f"{min(values):.2f} % to {max(values):.2f} %.",
        caption=f"Mean {np.mean(values):.2f} % (dashed). A view far from the others deserves a look.",
        columns=("view", "top1"),
        rows=list(statistics.top1.items()),
    )


def distribution(name: str, statistics: Survey, kind: str) -> Figure:
    """Histogram over all rows of a statistic of their logits."""
    title, label = _DISTRIBUTIONS[kind]
    values = statistics.statistics[kind].astype(np.float64)
    counts, edges = np.histogram(values, bins=BINS)
    middle = np.quantile(values, [0.05, 0.5, 0.95])

    def draw(axes: Axes) -> None:
        axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=COLOURS[0], alpha=0.75)
        axes.axvline(middle[1], color=INK, linewidth=1, linestyle="--", alpha=0.6)
        axes.set(xlabel=label, ylabel="share of rows, %")
        if (
            kind == "entropy"
        ):  # a good teacher is confident of nearly all rows: the others would not show
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    words = (
        f"Median {middle[1]:.3g} (dashed), 5 % below {middle[0]:.3g}, 5 % above {middle[2]:.3g}."
    )
    return figure(
        f"{name}-{kind}",
        title,
        draw,
        alt=f"Histogram of the {label}. {words}",
        caption=f"{words} {len(values):,} rows.",
        columns=("from", "to", "rows"),
        rows=[
            (float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)
        ],
    )


def per_class(name: str, statistics: Survey, class_names: list[str] | None) -> Figure:
    """The teacher's accuracy on the samples of each class, worst first."""
    classes = np.flatnonzero(statistics.class_rows)
    values = 100 * statistics.class_hits[classes] / statistics.class_rows[classes]
    order = np.argsort(values, kind="stable")
    classes, values = classes[order], values[order]
    names = [printable(class_names[k]) if class_names else f"class {k}" for k in classes]
    few = len(classes) <= FEW_CLASSES

    def draw(axes: Axes) -> None:
        if few:
            axes.plot(values, range(len(classes)), "o", color=COLOURS[2])
            axes.set_yticks(range(len(classes)), names)
            axes.set(xlabel="teacher's top-1, %", ylabel="class")
            axes.invert_yaxis()
        else:
            axes.plot(range(1, len(classes) + 1), values, color=COLOURS[2])
            axes.set(xlabel="classes, worst first", ylabel="teacher's top-1, %")

    worst = ", ".join(f"{n} ({v:.1f} %)" for n, v in zip(names[:5], values[:5], strict=True))
    return figure(
        f"{name}-classes",
        "Teacher's accuracy per class",
        draw,
        alt=f"Top-1 of the teacher per class over all views, worst first: {worst}.",
        caption=f"Over all views. Hardest: {worst}.",
        columns=("class", "name", "rows", "top1"),
        rows=[
            (int(k), n, int(statistics.class_rows[k]), v / 100)
            for k, n, v in zip(classes, names, values, strict=True)
        ],
        size=(4.6, 3.3 if not few else 1.1 + 0.24 * len(classes)),
    )


def variation(name: str, statistics: Survey) -> Figure:
    """How much the logits of a sample change from view to view, for all samples in order."""
    values = np.sort(statistics.variation)[::-1]
    share = 100 * np.arange(1, len(values) + 1) / len(values)
    shown = np.unique(np.linspace(0, len(values) - 1, 500).round().astype(int))

    def draw(axes: Axes) -> None:
        axes.plot(share[shown], values[shown], color=COLOURS[3])
        axes.set(xlabel="samples, most varied first, %", ylabel="std of a logit over views (RMS)",
                 ylim=(0, None), xlim=(0, 100))  # fmt: skip

    return figure(
        f"{name}-variation",
        "What one view would miss",
        draw,
        alt="Standard deviation over views of the samples' logits, sorted: largest "
        f"{values[0]:.3g}, median {np.median(values):.3g}.",
        caption=f"Root mean square over classes of a logit's standard deviation over {len(statistics.views)} "
        f"views. Median {np.median(values):.3g}, largest {values[0]:.3g}.",
        columns=("row", "variation"),
        rows=[
            (int(row), float(v))
            for row, v in zip(statistics.rows, statistics.variation, strict=True)
        ],
    )

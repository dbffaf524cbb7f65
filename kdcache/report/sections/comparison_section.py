"""The table of `kdcache compare` as a page: a picture of size, latency and accuracy, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from kdcache.report.figures import COLOURS, Figure, figure
from kdcache.report.page import Heading, Section, Table, write_page

#: Area of the largest disc, in square points.
AREA = 900.0


def write_comparison(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write a page about what `kdcache.evaluation.comparison.compare` returns; the paths, page first."""
    size = next(iter(table["networks"][0]["latency"]))
    section = Section(
        "Size, latency and accuracy",
        f"{table['dataset']}, {table['split']}: {table['samples']:,} samples. Threads: {table['threads']}.",
        tables=[_numbers(table, size)],
        figures=[size_and_accuracy(table, size)],
    )
    return write_page(out, Heading("Comparison", "Runs and exported files."), [section], [])


def _numbers(table: Mapping[str, Any], size: str) -> Table:
    columns = ("network", "run by", "weights", "parameters", "multiply-adds", "bytes",
               f"ms, batch {size}: p50", "p95", "top-1", "NLL at T", "ECE at T")  # fmt: skip
    rows = [
        (
            row["network"],
            row["runtime"],
            row["dtype"],
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
            f"{row['file_bytes']:,}" if row["file_bytes"] else "-",
            *(f"{milliseconds:.2f}" for milliseconds in row["latency"][size].values()),
            f"{row['top1']:.2%}",
            f"{row['calibrated_nll']:.4f}",
            f"{row['calibrated_ece']:.2%}",
        )
        for row in table["networks"]
    ]
    return Table("Networks", columns, rows)


def size_and_accuracy(table: Mapping[str, Any], size: str) -> Figure:
    """A disc per network: across its latency at a batch size, up its top-1, its area the bytes of its file.

    Args:
        table: of `compare`.
        size: a key of its latencies.
    """
    networks = table["networks"]
    points = [
        (
            row["network"],
            row["latency"][size]["latency_p50_ms"],
            row["latency"][size]["latency_p95_ms"],
            100 * row["top1"],
            row["file_bytes"],
        )
        for row in networks
    ]
    largest = max((row["file_bytes"] or 0 for row in networks), default=0)

    def draw(axes: Axes) -> None:
        for index, (name, p50, p95, top1, held) in enumerate(points):
            colour = COLOURS[index % len(COLOURS)]
            area = AREA * (held or 0) / max(largest, 1)
            axes.plot([p50, p95], [top1, top1], color=colour, linewidth=1, alpha=0.5)
            axes.scatter([p50], [top1], s=max(area, 4.0), color=colour, alpha=0.6, label=name)
        axes.set_xscale("log")
        narrow = max(point[2] for point in points) < 10 * min(point[1] for point in points)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if narrow else "")
        axes.set_xlabel(f"latency in ms, batch {size}")
        axes.set_ylabel("top-1 (%)")
        axes.margins(0.15)
        for handle in axes.figure.legend(loc="outside lower center", ncols=1).legend_handles:
            handle.set_sizes([30.0])  # type: ignore[union-attr]

    best = max(points, key=lambda point: point[3])
    fastest = min(points, key=lambda point: point[1])
    return figure(
        "size-and-accuracy",
        "Size, latency and accuracy",
        draw,
        alt=f"{len(points)} networks. The best top-1 has {best[0]} with {best[3]:.2f}% at {best[1]:.2f} ms, "
        f"the fastest is {fastest[0]} with {fastest[3]:.2f}% at {fastest[1]:.2f} ms.",
        caption="The median latency, a line to the 95th percentile, and the size of the file as the area of "
        "the disc; further left is faster, further up is better.",
        columns=("network", "latency_p50_ms", "latency_p95_ms", "top1_percent", "file_bytes"),
        rows=points,
    )

"""Figures: drawn once by matplotlib, given as SVG for the page, PNG for slides and CSV for anyone else.

The page's SVG takes its ink from the page (`currentColor`), so one drawing reads in light and in dark.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

INK = "#1b1f24"
"""Colour of text, axes and whatever else is black in the light theme and white in the dark one."""

# Middle luminance: each has a contrast of 3:1 or more to white and to the page's dark grey.
COLOURS = ("#3b7dd8", "#d9622b", "#2a9d6a", "#a364c9", "#c2487f", "#8a7d1f", "#3c97a8", "#7d7d7d")
DASHES = ("-", "--", ":", "-.")

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Figure:
    """One figure in all its forms.

    Attributes:
        name: stem of its files.
        title: short.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        svg: an <svg> element to put in a page.
        png: the same on white, 200 dots per inch.
        csv: the values that are drawn.
        small: it stands beside its like, several in a row.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes
    csv: str
    small: bool = False


def figure(
    name: str,
    title: str,
    draw: Callable[[Axes], None],
    *,
    alt: str,
    caption: str = "",
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    size: tuple[float, float] = (4.6, 3.3),
    small: bool = False,
) -> Figure:
    """Draw a figure of one pair of axes.

    Args:
        draw: puts everything on the axes.
        columns, rows: what the CSV holds.
        size: inches; about as wide as a phone, so that its text stays legible there.
        small: see `Figure`.

    Raises:
        ValueError: an axis has no label.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        if not (axes.get_xlabel() and axes.get_ylabel()):
            raise ValueError(f"the figure {name} needs a label on both axes")
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.set_layout_engine("none")  # keeps what was just laid out
        canvas.savefig(png, format="png", dpi=200, facecolor="white")
    return Figure(
        name, title, alt, caption, _for_page(svg.getvalue(), name), png.getvalue(),
        table_csv(columns, rows), small,
    )  # fmt: skip


def _for_page(svg: str, name: str) -> str:
    """The <svg> element alone: ids unique in the page, ink of the page, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1",
                                                              svg, count=1), count=1)  # fmt: skip


def table_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV; floats in full precision, None empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def look(index: int) -> dict[str, Any]:
    """Colour and dash of the index-th series."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def legend(axes: Axes, entries: int) -> None:
    """Below the axes, so that it never covers what is drawn."""
    axes.figure.legend(loc="outside lower center", ncols=min(entries, 3))

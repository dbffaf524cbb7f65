"""Pages whose Python runs while the site is built, with the figures that it draws, and their equations.

A hook of MkDocs; `run` needs no more than kdcache. The blocks of a page share their names, from the
first to the last. Where a block leaves a `figure`, that is shown below it.
"""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

BLOCK = re.compile(r"^```python\n(.*?)^```\n", flags=re.M | re.S)
EQUATION = re.compile(r"^\$\$\n(.*?)\n\$\$$", flags=re.M | re.S)
INK = "#010203"
"""Drawn in this colour is what takes the colour of the page's text, light or dark."""
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "mathtext.fontset": "cm",
    "svg.hashsalt": "kdcache",
}


def run(markdown: str, place: str, names: dict[str, Any] | None = None) -> str:
    """The page with its figures in it.

    Args:
        markdown: of the page.
        place: of the page, for tracebacks.
        names: what its blocks may use at first, and what they leave.

    Raises:
        Exception: what a block raises, an assertion that does not hold above all.
    """
    names = {"__name__": "page"} if names is None else names

    def executed(block: re.Match[str]) -> str:
        above = "\n" * markdown.count("\n", 0, block.start(1))  # tracebacks name the page's lines
        exec(compile(above + block[1], place, "exec", dont_inherit=True), names)
        figure = names.pop("figure", None)
        return block[0] + (f"\n<figure>{svg(figure)}</figure>\n" if figure is not None else "")

    with matplotlib.rc_context(STYLE):
        return BLOCK.sub(executed, markdown)


def equation(tex: str) -> str:
    """One line of TeX, as far as Matplotlib knows it, as a figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.1, 0.1))
        figure.text(0, 0, f"${tex}$", fontsize=14)
        drawn = svg(figure)
    return f'<figure role="img" aria-label="{html.escape(tex)}">{drawn}</figure>'


def svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    file = io.StringIO()
    figure.savefig(
        file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
    )
    _, start, rest = file.getvalue().partition("<svg")
    return (start + rest).replace(INK, "currentColor").replace("\n", " ")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Run the explanations, and draw the equations of all pages."""
    if page.file.src_uri.startswith("explanation/"):
        markdown = run(markdown, page.file.src_uri)
    return EQUATION.sub(lambda match: equation(match[1]), markdown)

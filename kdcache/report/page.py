"""The report's page: one HTML file that needs nothing else, and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from kdcache.report.figures import Figure
from kdcache.runs import write_atomically
from kdcache_stores.printable import printable


@dataclass(frozen=True)
class Table:
    """A table of text; all columns but the first are set as numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Tile:
    """A small picture with a line or two under it."""

    png: bytes
    alt: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together, side by side, under a title."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Heading:
    """What stands above all sections.

    Attributes:
        title: of the page.
        intro: a sentence.
        made: when, with which version and by which command, a line each.
        warnings: what likely went wrong, each with its remedy.
    """

    title: str
    intro: str
    made: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        intro: a sentence or two.
        tables, figures, strips: what it shows, in this order.
        strips_intro: what the strips have in common.
        notes: how to read it, and what is not as one might expect.
        files: name -> text of further files to leave beside the page.
        pictures: name -> PNG of further files.
    """

    title: str
    intro: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    strips: Sequence[Strip] = ()
    strips_intro: str = ""
    notes: Sequence[str] = ()
    files: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)


def write_page(
    out: Path, heading: Heading, sections: Sequence[Section], left_out: Sequence[str]
) -> list[Path]:
    """Write ``index.html`` and a PNG and a CSV of each figure into a folder; the paths, page first."""
    out.mkdir(parents=True, exist_ok=True)
    beside: dict[str, str | bytes] = {}
    for section in sections:
        for figure in section.figures:
            beside[f"{figure.name}.png"] = figure.png
            beside[f"{figure.name}.csv"] = figure.csv
        beside.update(section.files)
        beside.update(section.pictures)
    page = out / "index.html"
    _write(page, render(heading, sections, left_out))
    for name, content in beside.items():
        _write(out / name, content)
    return [page, *(out / name for name in beside)]


def _write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, even while another process writes into the folder."""
    data = content if isinstance(content, bytes) else content.encode()
    write_atomically(path, lambda stream: stream.write(data))


def render(heading: Heading, sections: Sequence[Section], left_out: Sequence[str]) -> str:
    """The page as text."""
    css = files("kdcache.report").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#part-{i}">{_text(s.title)}</a>' for i, s in enumerate(sections))
    warnings = _told("warnings", "Warnings", heading.warnings)
    missing = _told("missing", "Left out", left_out)
    made = "".join(f"<br>{_text(line)}" for line in heading.made)
    title = _text(heading.title)
    body = "\n".join(_section(index, section) for index, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1><p>{_text(heading.intro)}{made}</p><nav>{links}</nav></header>\n"
        f"<main>\n{warnings}\n{body}\n{missing}\n</main>\n</body>\n</html>\n"
    )


def _told(kind: str, title: str, reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    items = "".join(f"<li>{_text(reason)}</li>" for reason in reasons)
    return f'<section class="told {kind}"><h2>{title}</h2><ul>{items}</ul></section>'


def _text(text: str) -> str:
    """Text as it may stand in the page and in an attribute: neither HTML nor a control."""
    return escape(printable(text))


def _section(index: int, section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>", f"<p>{_text(section.intro)}</p>"]
    parts += [_table(table) for table in section.tables]
    if section.notes:
        notes = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    for small, kind in ((False, "figures"), (True, "figures small")):
        figures = "\n".join(_figure(f) for f in section.figures if f.small is small)
        if figures:
            parts.append(f'<div class="{kind}">{figures}</div>')
    if section.strips:
        strips = "\n".join(_strip(strip) for strip in section.strips)
        parts.append(f'<p class="caption">{_text(section.strips_intro)}</p>')
        parts.append(f'<div class="strips">{strips}</div>')
    return f'<section id="part-{index}">\n' + "\n".join(parts) + "\n</section>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    kind = "facts" if len(table.columns) == 2 else "grid"
    thead = f"<thead><tr>{head}</tr></thead>" if kind == "grid" else ""
    return (
        f'<p class="caption">{_text(table.title)}</p><div class="scroll" tabindex="0">'
        f'<table class="{kind}">{thead}<tbody>{rows}</tbody></table></div>'
    )


def _figure(figure: Figure) -> str:
    svg = figure.svg.replace("<svg", f'<svg role="img" aria-label="{_text(figure.alt)}"', 1)
    caption = f"<p>{_text(figure.caption)}</p>" if figure.caption else ""
    return (
        f'<figure id="{figure.name}"><h3>{_text(figure.title)}</h3>{svg}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _strip(strip: Strip) -> str:
    tiles = "".join(_tile(tile) for tile in strip.tiles)
    return (
        f'<div class="strip"><h3>{_text(strip.title)}</h3>'
        f'<div class="tiles scroll" tabindex="0">{tiles}</div></div>'
    )


def _tile(tile: Tile) -> str:
    source = "data:image/png;base64," + base64.b64encode(tile.png).decode()
    lines = "<br>".join(_text(line) for line in tile.lines)
    return (
        f'<figure><img src="{source}" alt="{_text(tile.alt)}">'
        f"<figcaption>{lines}</figcaption></figure>"
    )

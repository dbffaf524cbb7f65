"""What people see (rich, on stderr) and what programs read (JSON, on stdout)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)


def emit(document: Any, as_json: bool) -> None:
    """Print the document on stdout if programs asked for it; null is what JSON has no number for."""
    if as_json:
        click.echo(json.dumps(_of_json(document), indent=2, allow_nan=False))


def _of_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _of_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_of_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str, quiet: bool = False) -> None:
    """A line for people, kept whole: paths and commands are never wrapped.

    It is one line whatever a name in it holds, so several are said one by one.
    """
    if not quiet:
        console.print(_plain(text), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is left-aligned and whose others are numbers.

    Without names of columns it is a page of facts: a name and a value a line.
    """
    page = not any(columns)
    made = Table(title=_plain(title), title_justify="left", title_style="bold", show_header=not page,
                 box=box.SIMPLE if page else box.ROUNDED)  # fmt: skip
    for index, column in enumerate(columns):
        left = index == 0 or page
        made.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(_plain, row))
    return made


def _plain(text: str) -> Text:
    """A text as it is: what looks like markup is not, and it stays on its line."""
    from kdcache_stores.printable import printable  # not before there is something to say

    return Text(printable(text))


class _Words(TextColumn):
    """A part of a bar that is text as it is."""

    def render(self, task: Task) -> Text:
        """What `progress` shows of a task."""
        return _plain(self.text_format.format(task=task))


def progress(quiet: bool, unit: str) -> Progress:
    """Bars that vanish when done, so that what stays on the screen is results."""
    return Progress(
        _Words("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Words("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=quiet
        or not console.is_terminal,  # in a log file they leave nothing but blank lines
    )


def percent(value: float) -> str:
    """0.9312 -> "93.12%"."""
    return f"{value:.2%}"


def size(count: float) -> str:
    """Bytes for people: 1.6 GB is 1.6e9 bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")

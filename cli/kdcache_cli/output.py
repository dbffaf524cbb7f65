"""What commands print: what they were asked for on stdout, as text or JSON; the way to it on stderr."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kdcache.stages import UnderWay

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)
PIPED = 10_000
"""Columns of a result that is read by a program or kept in a file: nothing is broken."""


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
    """A line on the way, kept whole: paths and commands are never wrapped.

    It is one line whatever a name in it holds, so several are said one by one.
    """
    if not quiet:
        stderr.print(_plain(text), soft_wrap=True)


def show_line(text: str, quiet: bool = False) -> None:
    """A line of what a command was asked for; otherwise as `say`."""
    if not quiet:
        stdout.print(_plain(text), soft_wrap=True)


def show_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A page of what a command was asked for: a name and a value a line."""
    page = Table(title=_plain(title), title_justify="left", title_style="bold", show_header=False,
                 box=box.SIMPLE)  # fmt: skip
    page.add_column()
    page.add_column(overflow="fold")
    for fact in facts:
        page.add_row(*map(_plain, fact))
    _print(page)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of what a command was asked for: words in its first column, numbers in the others.

    Where the terminal is too narrow for it, no word is broken: the words of its header stand below each
    other, then its first column takes several lines, and then each row is a page of its own.
    """
    width, rows = stdout.width if stdout.is_terminal else PIPED, list(rows)
    words = [[column] for column in columns]

    def least() -> list[int]:
        return [
            max(len(text) for text in (*words[i], *(row[i] for row in rows)))
            for i in range(len(columns))
        ]

    borders = 3 * len(columns) + 1
    if sum(least()) + borders > width:
        words = [column.split() or [""] for column in columns]
    first = max((len(word) for row in rows for word in row[0].split()), default=0)
    if first + sum(least()[1:]) + borders > width:
        for row in rows:
            show_facts(f"{title}: {row[0]}", list(zip(columns, row, strict=True))[1:])
        return
    made = Table(title=_plain(title), title_justify="left", title_style="bold", box=box.ROUNDED)
    for index, column in enumerate(words):
        left = index == 0
        made.add_column("\n".join(column), justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        made.add_row(*map(_plain, row))
    _print(made)


def _print(page: Table) -> None:
    """Print a table; where nobody looks, as wide as it needs to be and without blanks behind it."""
    if stdout.is_terminal:
        stdout.print(page)
        return
    wide = Console(highlight=False, width=PIPED)
    with wide.capture() as capture:
        wide.print(page)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


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
        console=stderr,
        transient=True,
        disable=quiet or not stderr.is_terminal,  # in a log file they leave nothing but blank lines
    )


class LogLines:
    """What bars would show, as lines now and then, where stderr is no terminal.

    Args:
        quiet: shown nowhere.
    """

    def __init__(self, quiet: bool) -> None:
        self.shown, self.told = not quiet and not stderr.is_terminal, time.monotonic()

    def __call__(self, text: str, after: float = 10.0) -> None:
        """Say it, if the last one, or the beginning, was ``after`` seconds ago."""
        now = time.monotonic()
        if self.shown and now - self.told >= after:
            self.told = now
            say(text)


class StageBars:
    """A bar for each stage before the first row or step; in a log, a line for one that took a second.

    Args:
        bars: where they are shown.
        quiet: shown nowhere.
    """

    def __init__(self, bars: Progress, quiet: bool) -> None:
        self.bars, self.quiet = bars, quiet
        self.tasks: dict[int, TaskID] = {}

    def __call__(self, stage: UnderWay) -> None:
        """A stage begins, goes on or ends."""
        rate = f"{stage.rate:,.0f} {stage.unit}/s" if stage.unit and stage.rate else ""
        if stage.over:
            if id(stage) in self.tasks:
                self.bars.remove_task(self.tasks.pop(id(stage)))
            if stage.seconds >= 1:
                counts = f": {stage.done:,} {stage.unit}, {rate}" if rate else ""
                say(f"{stage.what}: {stage.seconds:.1f} s{counts}", self.quiet)
            return
        if id(stage) not in self.tasks:
            self.tasks[id(stage)] = self.bars.add_task(stage.what, total=stage.total, note="")
        self.bars.update(self.tasks[id(stage)], completed=stage.done, note=rate)


def is_first() -> bool:
    """Whether this process prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


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

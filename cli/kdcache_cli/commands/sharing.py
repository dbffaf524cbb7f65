"""push, pull and cache: stores between this disk and where a team keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, show_line, size, stderr


@contextmanager
def transfer(quiet: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes with speed and time left; yields what takes (bytes done, bytes in all)."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


expect = groups.TEACHER.option(
    "--expect",
    metavar="DIGEST",
    help="Content digest that the store must have, before a byte is sent.",
)


@groups.command(
    "push",
    "kdcache push t.zarr s3://bucket/t.zarr",
    "kdcache push t.zarr hf://datasets/team/t",
)
@click.argument("store", type=options.STORE)
@click.argument("url")
@expect
@groups.OUTPUT.option(
    "--take-over", is_flag=True, help="Go on from a push that will not be repeated."
)
@common
def push(
    store: str, url: str, take_over: bool, expect: str | None, as_json: bool, quiet: bool
) -> None:
    """Copy a sealed STORE to URL: what is missing there, never over other data."""
    from kdcache_stores.share.push import push_store

    with transfer(quiet, "push") as progress:
        done = push_store(store, url, progress, take_over, expect=expect)
    report(done, "sent", as_json, quiet)


@groups.command(
    "pull",
    "kdcache pull s3://bucket/t.zarr t.zarr",
    "kdcache pull hf://datasets/team/t part.zarr --views 0:4 --expect DIGEST",
)
@click.argument("url")
@click.argument("folder")
@groups.VIEWS.option(
    "--views",
    metavar="A:B",
    callback=lambda ctx, param, value: value and view_range(value),
    help="Only the views A to B-1; the result is a valid store of those.",
)
@expect
@common
def pull(
    url: str,
    folder: str,
    views: tuple[int, int] | None,
    expect: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Copy the store at URL, or some of its views, into FOLDER, and verify it."""
    from kdcache_stores.share.pull import pull_store

    with transfer(quiet, "pull") as progress:
        done = pull_store(url, folder, views, progress, expect=expect)
    report(done, "fetched", as_json, quiet)


def report(done: Any, verb: str, as_json: bool, quiet: bool) -> None:
    """What was transferred, and what is there now."""
    emit(asdict(done), as_json)
    show_line(
        f"{done.where} is whole and verified: {done.sent} objects {verb} ({size(done.sent_bytes)}), "
        f"{done.skipped} were there",
        quiet,
    )
    show_line(f"content digest {done.digest}", quiet)


def view_range(text: str) -> tuple[int, int]:
    """ "2:6" -> (2, 6).

    Raises:
        click.BadParameter: not A:B with 0 <= A < B.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise click.BadParameter(f"{text!r}: expected A:B with A below B, such as 0:10")
    return int(first), int(last)


@groups.command(
    "cache",
    "kdcache cache",
    "kdcache cache --clear",
)
@groups.OUTPUT.option("--clear", is_flag=True, help="Remove everything in it.")
@common
def cache(clear: bool, as_json: bool, quiet: bool) -> None:
    """Show or clear the local cache of remote stores."""
    from kdcache_stores.objects.cache import ObjectCache

    objects = ObjectCache()
    state = objects.clear() if clear else objects.state()
    emit({**asdict(state), "cleared": clear}, as_json)
    show_line(
        f"{state.folder}: {state.objects} objects, {size(state.nbytes)} of {size(state.limit)}"
        + (", all removed" if clear else ""),
        quiet,
    )

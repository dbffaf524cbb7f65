"""ls, diff and card: stores stores, compared and introduced."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.commands.inspecting import encoding_text
from kdcache_cli.output import emit, percent, show_line, show_table, size


@groups.command(
    "ls",
    "kdcache ls stores",
    "kdcache ls s3://bucket",
)
@click.argument("place", default=".")
@common
def ls(place: str, as_json: bool, quiet: bool) -> None:
    """List the stores under PLACE: a folder, a bucket, or a web server with a catalogue."""
    from kdcache_stores.objects.urls import redact
    from kdcache_stores.share.store_list import list_stores

    stores = list_stores(place)
    emit([item.to_dict() for item in stores], as_json)
    if quiet:
        return
    if not stores:
        show_line(f"no stores under {redact(place)}")
    for plan, items in groupby(stores, key=lambda item: item.summary.get("plan", "")):
        show_line(f"plan {str(plan)[:12]}" if plan else "cannot be opened")
        for item in items:
            show_line(f"  {item.name}")
            for line in _facts(item):
                show_line(f"    {line}")


def _facts(item: Any) -> list[str]:
    """What the list says of a store."""
    summary = item.summary
    if item.problem is not None:
        return [item.problem]
    views = "? views"
    if "views" in summary:
        first, count = summary["first_view"], summary["views"]
        views = f"views {first} to {first + count - 1}" if first else f"{count} views"
    top1 = summary.get("top1")
    accuracy = "" if top1 is None else f", top-1 {percent(top1)}"
    kept = size(summary["nbytes"]) if "nbytes" in summary else "? bytes"
    return [
        f"{summary['dataset']} {summary['split']}, {summary['classes']} classes, {views}",
        f"teacher {summary['teacher']}{accuracy}",
        f"{encoding_text(summary['encoding'])}, {kept}, {'sealed' if summary['sealed'] else 'unfinished'}",
    ]


@groups.command(
    "diff",
    "kdcache diff a.zarr b.zarr",
    "kdcache diff a.zarr b.zarr --json",
)
@click.argument("a", type=options.STORE)
@click.argument("b", type=options.STORE)
@common
def diff(a: str, b: str, as_json: bool, quiet: bool) -> int:
    """Compare stores A and B: plan, teacher, and the logits of each view; exit 1 if they differ."""
    from kdcache_stores import open_store
    from kdcache_stores.share.compare import compare_stores

    with open_store(a) as first, open_store(b) as second:
        comparison = compare_stores(first, second)
    emit(comparison.to_dict(), as_json)
    code = 0 if comparison.same_content else 1
    for name in ("plan", "teacher", "encoding", "head"):
        same = getattr(comparison, f"same_{name}")
        show_line(f"{name}: {'the same' if same else 'differs'}", quiet)
    for name, left, right in comparison.differences:
        show_line(f"  {name}: {left!r} and {right!r}", quiet)
    show_line(f"views: {len(comparison.equal_views)} equal, {len(comparison.differing_views)} differ, "
        f"{len(comparison.only_a)} only in the first, {len(comparison.only_b)} only in the second",
        quiet)  # fmt: skip
    for name, reason in comparison.not_compared.items():
        show_line(f"{'fields' if name == '*' else name} not compared: {reason}", quiet)
    if comparison.field_differences and not quiet:
        rows = [
            (
                str(d.view),
                d.field,
                f"{d.error_mean:.3g}",
                "" if d.kl_mean is None else f"{d.kl_mean:.3g}",
                "" if d.kl_worst is None else f"{d.kl_worst:.3g}",
                "" if d.top1_agreement is None else percent(d.top1_agreement),
            )
            for d in comparison.field_differences
        ]
        columns = ("view", "field", "squared error", "KL(A, B) mean", "worst", "same top-1")
        show_table("views that differ (relative error; nats)", columns, rows)
    return code


@groups.command(
    "card",
    "kdcache card t.zarr",
    "kdcache card t.zarr --license cc-by-4.0",
)
@click.argument("store", type=options.STORE)
@groups.OUTPUT.option(
    "--license", default="other", show_default=True, help="Licence of the logits."
)
@groups.OUTPUT.option("--url", help="Where the store is or will be published.")
@common
def card(store: str, license: str, url: str | None, as_json: bool, quiet: bool) -> None:
    """Write README.md and croissant.json into a STORE."""
    from kdcache_stores.share.card import write_card

    written = write_card(store, license, url)
    emit(written, as_json)
    show_line("wrote " + " and ".join(written), quiet)

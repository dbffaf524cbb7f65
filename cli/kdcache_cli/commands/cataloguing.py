"""ls, diff and card: stores stores, compared and introduced."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.commands.inspecting import encoding_text
from kdcache_cli.output import answer, emit, percent, show, size, table


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
        answer(f"no stores under {redact(place)}")
    columns = ("store", "dataset", "classes", "views", "teacher", "top-1", "encoding", "size", "")
    for plan, items in groupby(stores, key=lambda item: item.summary.get("plan", "")):
        title = f"plan {str(plan)[:12]}" if plan else "cannot be opened"
        shown = table(title, columns, [row(item) for item in items])
        shown.columns[0].no_wrap = True
        shown.columns[0].min_width = max(len(item.name) for item in stores)
        show(shown)


def row(item: Any) -> list[str]:
    """One store in the list."""
    summary = item.summary
    if item.problem is not None:
        return [item.name, *[""] * 7, item.problem]
    views = "?"
    if "views" in summary:
        first = summary["first_view"]
        views = f"{first}:{first + summary['views']}" if first else str(summary["views"])
    top1 = summary.get("top1")
    return [
        item.name,
        f"{summary['dataset']} {summary['split']}",
        str(summary["classes"]),
        views,
        summary["teacher"],
        "" if top1 is None else percent(top1),
        encoding_text(summary["encoding"]),
        size(summary["nbytes"]) if "nbytes" in summary else "?",
        "sealed" if summary["sealed"] else "unfinished",
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
        answer(f"{name}: {'the same' if same else 'differs'}", quiet)
    for name, left, right in comparison.differences:
        answer(f"  {name}: {left!r} and {right!r}", quiet)
    answer(f"views: {len(comparison.equal_views)} equal, {len(comparison.differing_views)} differ, "
        f"{len(comparison.only_a)} only in the first, {len(comparison.only_b)} only in the second",
        quiet)  # fmt: skip
    for name, reason in comparison.not_compared.items():
        answer(f"{'fields' if name == '*' else name} not compared: {reason}", quiet)
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
        show(table("views that differ (relative error; nats)", columns, rows))
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
    answer("wrote " + " and ".join(written), quiet)

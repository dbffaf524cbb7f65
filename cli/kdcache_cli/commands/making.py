"""Stores and tables made without a teacher: seal, import, export-views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache_cli import options
from kdcache_cli.app import common
from kdcache_cli.commands.inspecting import page
from kdcache_cli.dump_page import command_line
from kdcache_cli.output import console, emit, say, size, table


@click.command("seal")
@click.argument("store", type=options.LOCAL_PATH)
@click.option("--views", type=click.IntRange(1), help="Where a sealed store grew: its views now.")
@common
def seal(store: Path, views: int | None, as_json: bool, quiet: bool) -> None:
    """Finish a STORE that `dump-teacher --part i/n` jobs filled.

    Refused while a shard is missing; the message says which.
    """
    from kdcache_stores import describe, open_store, reopen

    with reopen(store, views) as writer:
        writer.seal()
    with open_store(store) as opened:
        info = describe(opened)
    emit(info, as_json)
    if not quiet:
        console.print(table(f"store {store}", ("", ""), page(info)))


@click.command("import")
@click.argument("file", type=options.LOCAL_PATH)
@click.option("--out", required=True, type=options.LOCAL_PATH, help="The store.")
@options.dataset_name("Whose keys FILE names: needed to train from the store.")
@options.data_root
@click.option("--split", default="train", show_default=True, help="With --dataset.")
@click.option(
    "--augment",
    default="none",
    show_default=True,
    help="With --dataset: the views that the logits are of; none: the images as they are.",
)
@click.option("--seed", type=options.SEED, default=0, show_default=True, help="Of these views.")
@click.option(
    "--encoding",
    default="float16",
    show_default=True,
    callback=lambda c, p, v: options.encodings((v,)),
    help="Of the logits.",
)
@click.option("--hash-keys", is_flag=True, help="Store the SHA-256 of each key, not the key.")
@common
def import_logits(
    file: Path,
    out: Path,
    encoding: dict[str, str],
    hash_keys: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Make a store of FILE, an .npz with logits (N, K) or (views, N, K), keys and labels.

    With --dataset students can be trained from it: keys may come in any order. Without, it is one
    fixed view of an unnamed dataset.
    """
    from kdcache_stores import describe, import_npz

    how: dict[str, Any] = {"encoding": encoding, "hash_keys": hash_keys}
    if given["dataset"] is None:
        store = import_npz(file, out, **how)
    else:
        from kdcache.dumping.imported import import_for

        data = options.source(given).load(given.pop("split"))
        for remark in data.remarks:
            say(remark, quiet)
        store = import_for(data, file, out, **given, command=command_line(), **how)
    with store:
        info = describe(store)
    emit(info, as_json)
    if not quiet:
        console.print(table(f"store {out}", ("", ""), page(info)))


@click.command("export-views")
@options.dataset
@click.option("--split", help="train, test or unlabeled [default: train, or that of --store].")
@click.option("--store", help="Take plan and views of this store.")
@click.option("--augment", help="Without --store: as for dump-teacher.")
@click.option("--seed", type=options.SEED, help="Without --store: of the views [default: 0].")
@click.option("--views", type=click.IntRange(1), help="How many [default: the store's].")
@click.option("--out", required=True, type=options.LOCAL_PATH, help="A .parquet file.")
@common
def export_views(out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write what was drawn for every view: crops, flips, operations, partners.

    A reader that has no kdcache can make the same views from this table.
    """
    from kdcache.dumping.plans import choose_plan
    from kdcache.views.export import write_parameters

    plan, views = choose_plan(options.source(given), **given)
    rows = write_parameters(plan, range(views), out)
    emit({"file": str(out), "rows": rows, "plan": plan.to_store().digest}, as_json)
    say(f"{out}: {rows:,} rows, {size(out.stat().st_size)}", quiet)

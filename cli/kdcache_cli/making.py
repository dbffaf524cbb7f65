"""Stores and tables made without a teacher: seal, import, export-views."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli import options
from kdcache_cli.app import common
from kdcache_cli.output import console, emit, say, size, table
from kdcache_cli.stores import page


@click.command("seal")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--views", type=click.IntRange(1), help="Where a sealed store grew: its views now.")
@common
def seal(store: Path, views: int | None, as_json: bool, quiet: bool) -> None:
    """Finish a STORE that `dump-teacher --part i/n` jobs filled.

    Refused while a shard is missing; the message says which.
    """
    from kdcache_stores import open_store, reopen

    with reopen(store, views) as writer:
        writer.seal()
    with open_store(store) as opened:
        info = opened.info()
    emit(info, as_json)
    if not (quiet or as_json):
        console.print(table(f"store {store}", ("", ""), page(info)))


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The store.")
@click.option("--encoding", default="float16", show_default=True)
@click.option("--hash-keys", is_flag=True, help="Store the SHA-256 of each key, not the key.")
@common
def import_logits(
    file: Path, out: Path, encoding: str, hash_keys: bool, as_json: bool, quiet: bool
) -> None:
    """Make a store of one fixed view from FILE, an .npz with logits (N, K), keys and labels."""
    from kdcache_stores import import_npz

    with import_npz(file, out, encoding=encoding, hash_keys=hash_keys) as store:
        info = store.info()
    emit(info, as_json)
    if not (quiet or as_json):
        console.print(table(f"store {out}", ("", ""), page(info)))


@click.command("export-views")
@options.dataset
@click.option("--split", default="train", show_default=True, help="train, test or unlabeled.")
@click.option("--store", type=click.Path(path_type=Path), help="Take plan and views of this store.")
@click.option("--augment", help="Without --store: as for dump-teacher.")
@click.option("--seed", type=options.SEED, help="Without --store: of the views [default: 0].")
@click.option("--views", type=click.IntRange(1), help="How many [default: the store's].")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .parquet file.")
@common
def export_views(
    dataset: str,
    data_root: Path | None,
    download: bool,
    split: str,
    store: Path | None,
    augment: str | None,
    seed: int | None,
    views: int | None,
    out: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write what was drawn for every view: crops, flips, operations, partners.

    A reader that has no kdcache can make the same views from this table.
    """
    from kdcache.dumping.targets import asked_plan, stored_plan
    from kdcache.views.export import write_parameters

    if store is not None:
        plan, count = stored_plan(store, dataset, data_root, download, augment, seed)
    else:
        plan, count = asked_plan(dataset, split, data_root, download, augment, seed or 0, views)
    rows = write_parameters(plan, range(views or count), out)
    emit({"file": str(out), "rows": rows, "plan": plan.to_store().digest}, as_json)
    say(f"{out}: {rows:,} rows, {size(out.stat().st_size)}", quiet or as_json)

"""Stores and tables made without a teacher: seal, import, export-views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.commands.inspecting import page
from kdcache_cli.dump_page import command_line
from kdcache_cli.output import emit, say, show_facts, show_line, size


@groups.command(
    "seal",
    "kdcache seal t.zarr",
    "kdcache seal t.zarr --json",
)
@click.argument("store", type=options.LOCAL_PATH)
@groups.VIEWS.option(
    "--views", type=click.IntRange(1), help="Where a sealed store grew: its views now."
)
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
        show_facts(f"store {store}", page(info))


@groups.command(
    "import",
    "kdcache import logits.npz --dataset cifar100 --out t.zarr",
    "kdcache import logits.npz --out t.zarr --encoding float32",
)
@click.argument("file", type=options.LOCAL_PATH)
@groups.OUTPUT.option("--out", required=True, type=options.LOCAL_PATH, help="The store.")
@options.dataset_name("Whose keys FILE names: needed to train from the store.")
@options.data_root
@groups.DATA.option("--split", default="train", show_default=True, help="With --dataset.")
@groups.VIEWS.option(
    "--augment",
    type=options.AUGMENTATION,
    default="none",
    show_default=True,
    help="With --dataset: the views that the logits are of; none: the images as they are.",
)
@groups.VIEWS.option(
    "--seed", type=options.SEED, default=0, show_default=True, help="Of these views."
)
@groups.OUTPUT.option(
    "--encoding",
    default="float16",
    show_default=True,
    callback=lambda c, p, v: options.encodings((v,)),
    help="Of the logits.",
)
@groups.OUTPUT.option(
    "--hash-keys", is_flag=True, help="Store the SHA-256 of each key, not the key."
)
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
        show_facts(f"store {out}", page(info))


@groups.command(
    "export-views",
    "kdcache export-views --store t.zarr --out views.parquet",
    "kdcache export-views --dataset cifar100 --views 8 --out views.parquet",
)
@options.dataset_name(
    "Name; see `kdcache list datasets` [default: that of --store, if it is one of these]."
)
@options.data_root
@options.download
@groups.DATA.option(
    "--split", help="train, test or unlabeled [default: train, or that of --store]."
)
@groups.VIEWS.option("--store", type=options.STORE, help="Take plan and views of this store.")
@groups.VIEWS.option(
    "--augment", type=options.AUGMENTATION, help="Without --store: as for dump-teacher."
)
@groups.VIEWS.option(
    "--seed", type=options.SEED, help="Without --store: of the views [default: 0]."
)
@groups.VIEWS.option("--views", type=click.IntRange(1), help="How many [default: the store's].")
@groups.OUTPUT.option("--out", required=True, type=options.LOCAL_PATH, help="A .parquet file.")
@common
def export_views(out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write what was drawn for every view: crops, flips, operations, partners.

    A reader that has no kdcache can make the same views from this table.
    """
    from kdcache.data.loading import DATASETS
    from kdcache.dumping.plans import choose_plan
    from kdcache.views.export import write_parameters
    from kdcache_stores import open_store

    if given["dataset"] is None:
        named = None
        if given["store"] is not None:
            with open_store(given["store"]) as store:
                named = store.plan.dataset
        if named not in DATASETS:
            of = f": {given['store']} is of {named}, which is yours to point to" if named else ""
            raise click.UsageError(f"Missing option '--dataset'{of}.")
        given["dataset"] = named
    plan, views = choose_plan(options.source(given), **given)
    rows = write_parameters(plan, range(views), out)
    emit({"file": str(out), "rows": rows, "plan": plan.to_store().digest}, as_json)
    show_line(f"{out}: {rows:,} rows, {size(out.stat().st_size)}", quiet)

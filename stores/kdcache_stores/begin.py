"""Beginning a store, or taking up one that was begun: its header, its arrays, its samples."""

from __future__ import annotations

import math
import os

from kdcache_stores.canonical import first_difference, parse_json
from kdcache_stores.errors import DataError, FormatError, MismatchError, StoreInUse
from kdcache_stores.files import LocalFiles, is_temporary
from kdcache_stores.header import FORMAT, Header, read_header
from kdcache_stores.layout import ArrayLayout, choose_shard_rows, read_layout
from kdcache_stores.manifest import CARD, ROOT, SAMPLES
from kdcache_stores.nouns import Samples
from kdcache_stores.samples import read_samples, write_samples


def require_place(files: LocalFiles) -> None:
    """Raise `StoreInUse` if the folder is a file, or holds something that is no store."""
    if os.path.isfile(files.root):
        raise StoreInUse(f"{files.where} is a file, and a store is a folder: choose another name")
    if files.size(ROOT) is None:
        extra = [key for key in files.walk() if not is_temporary(key) and key != CARD]
        if extra:
            raise StoreInUse(
                f"{files.where} holds {extra[0]} and is no kdcache store: choose an empty folder"
            )


def begin(files: LocalFiles, header: Header) -> Header:
    """Claim the folder for this header, or find that it was begun with an equal one.

    Returns the header that is there, with the provenance of whoever began it. Raises `StoreInUse`
    if the folder holds something else, `MismatchError` naming the first difference.
    """
    require_place(files)
    if files.size(ROOT) is None:
        files.publish(ROOT, header.document())
    found = read_header(parse_json(files.get(ROOT), f"{files.where}/{ROOT}"), files.where)
    if found.minor > FORMAT[1]:
        raise FormatError(
            f"{files.where} has format {FORMAT[0]}.{found.minor}; this kdcache writes {FORMAT[0]}."
            f"{FORMAT[1]} at most: go on with a version of kdcache that knows it"
        )
    difference = first_difference(found.comparable(), header.comparable(), "store")
    if difference:
        name, present, asked = difference
        raise MismatchError(
            f"{files.where} was begun with {name.removeprefix('store.')} = {present!r}, "
            f"this dump has {asked!r}: use the same settings to go on, or another folder"
        )
    return found


def choose_layouts(
    files: LocalFiles, header: Header, views: int, shard_rows: int | None
) -> list[ArrayLayout]:
    """The arrays of all fields, in shards of the size that the store was begun with, if it was.

    Raises `MismatchError` if `shard_rows` asks for another size.
    """
    arrays = [
        (field.name, spec)
        for field in header.fields.values()
        for spec in field.encoding.arrays(field.shape)
    ]
    values = max(math.prod(field.shape) for field in header.fields.values())
    rows = choose_shard_rows(header.samples, [spec for _, spec in arrays], values, shard_rows)
    there = _shard_rows_there(
        files, header, ArrayLayout.choose(*arrays[0], views, header.samples, rows)
    )
    if there is not None:
        if shard_rows is not None and there != rows:
            raise MismatchError(
                f"{files.where} was begun with shards of {there} rows, this dump has {rows}: "
                "use the same, or another folder"
            )
        rows = there
    return [ArrayLayout.choose(name, spec, views, header.samples, rows) for name, spec in arrays]


def _shard_rows_there(files: LocalFiles, header: Header, first: ArrayLayout) -> int | None:
    where = f"{files.where}/{first.metadata_key}"
    try:
        document = parse_json(files.get(first.metadata_key), where)
        return read_layout(document, first.field, first.spec, header.samples, where).shard_rows
    except (FileNotFoundError, FormatError):
        return None  # not written yet, or damaged: `ensure_metadata` writes it


def ensure_metadata(
    files: LocalFiles, header: Header, layouts: list[ArrayLayout], samples: Samples
) -> None:
    """Publish what an unfinished store needs beside its shards; replace what differs."""
    for field in header.fields.values():
        files.publish(field.metadata_key, field.document(), replace=True)
    for layout in layouts:
        files.publish(layout.metadata_key, layout.document(), replace=True)
    if not _holds(files, header, samples):
        files.put(SAMPLES, write_samples(samples), replace=True)


def _holds(files: LocalFiles, header: Header, samples: Samples) -> bool:
    """Whether `samples.parquet` holds these samples, whichever version of Arrow wrote it."""
    try:
        table = read_samples(files.get(SAMPLES), header.samples, header.plan.classes, SAMPLES)
        there = Samples(table["key"].to_pylist(), table["label"].to_numpy(), samples.hashed)
    except (FileNotFoundError, FormatError, DataError):
        return False
    return there.fingerprint == samples.fingerprint

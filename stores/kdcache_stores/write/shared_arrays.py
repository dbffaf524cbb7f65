"""Arrays that rows share: per store, fitted before any shard; per sample, taken from view 0.

Those per store are published by whoever is first, and read back by everyone. Those per sample are
objects of the shard of view 0 and committed with it. The record of every later shard names both with
their SHA-256, so a shard never outlives what it was encoded with. In the manifest their kind is "once".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from kdcache_stores.encodings.protocol import Array
from kdcache_stores.errors import CorruptStore
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.format.manifest import Entry, sha256
from kdcache_stores.format.shards import ShardReader, encode_shard
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.types import Shard


@dataclass(frozen=True)
class Shared:
    """Shared arrays by name, as the rows of one shard need them, and their entries."""

    arrays: dict[str, Array]
    entries: tuple[Entry, ...]


def shared_entry(layout: ArrayLayout, shard: Shard, data: bytes) -> Entry:
    """The entry of an object that rows share; per sample, with the rows that it is of."""
    key = layout.key(shard.view, shard.index)
    entry = Entry(key, len(data), sha256(data), "once")
    if layout.spec.per == "store":
        return entry
    return replace(entry, index=shard.index, start=shard.start, stop=shard.stop)


def load_shared(files: LocalFiles, layouts: Iterable[ArrayLayout], shard: Shard) -> Shared:
    """A field's arrays per store, and for views after the first those per sample.

    Raises `FileNotFoundError`, `CorruptStore`.
    """
    arrays, entries = {}, []
    for layout in layouts:
        if layout.spec.per == "store" or (layout.spec.per == "sample" and shard.view > 0):
            arrays[layout.spec.name], entry = _load(files, layout, shard)
            entries.append(entry)
    return Shared(arrays, tuple(entries))


def _load(files: LocalFiles, layout: ArrayLayout, shard: Shard) -> tuple[Array, Entry]:
    key = layout.key(shard.view, shard.index)
    data = files.get(key)
    reader = ShardReader(layout, data, f"{files.where}/{key}")
    entry = shared_entry(layout, shard, data)
    if layout.spec.per == "store":
        return reader.single(), entry
    starts = range(0, shard.rows, layout.chunk_rows)
    parts = [reader.rows(range(i, min(i + layout.chunk_rows, shard.rows))) for i in starts]
    return np.concatenate(parts), entry


def is_published(files: LocalFiles, layouts: Iterable[ArrayLayout]) -> bool:
    """Whether every array per store is there and whole."""
    try:
        load_shared(files, layouts, Shard(0, 0, 0, 1))
    except (FileNotFoundError, CorruptStore):
        return False
    return True


def publish_shared(files: LocalFiles, layout: ArrayLayout, values: Array) -> None:
    """Publish an array per store, unless it is there and whole."""
    key = layout.key(0, 0)
    data = encode_shard(layout, values[None])
    try:
        files.put(key, data)
    except FileExistsError:
        if not is_published(files, [layout]):
            files.put(key, data, replace=True)

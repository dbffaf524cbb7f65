"""What an encoding keeps once: arrays per store, learned before any shard; per sample, with view 0.

The arrays per store are published by whoever is first, and read back by everyone. Those per sample
are objects of the shard of view 0 and committed with it. The record of every later shard names both
with their SHA-256, so a shard never outlives what it was encoded with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encoding import Array, Encoding, Floats, LearnedEncoding
from kdcache_stores.errors import CorruptStore
from kdcache_stores.files import LocalFiles
from kdcache_stores.layout import ArrayLayout
from kdcache_stores.manifest import Entry, sha256
from kdcache_stores.nouns import Shard
from kdcache_stores.shards import ShardReader, encode_shard

LESSON = (256, 1024)
"""Samples at least and at most that an encoding learns from. At 8 views of 100 classes, 256 cost 2.7% of the
bytes over 4,096, and 1,024 cost 0.4%."""


def lesson_rows(samples: int, classes: int) -> NDArray[np.int64]:
    """The rows to learn from, spread evenly over the dataset: the same ones for every writer.

    An eighth of them, so that two more views of these hardly lengthen a dump; where there are
    many, enough to tell which directions of `classes` dimensions are never used.
    """
    least, most = LESSON
    count = min(max(samples // 8, least), max(most, 4 * classes), samples)
    return np.linspace(0, samples - 1, count).round().astype(np.int64)


def once_entry(layout: ArrayLayout, shard: Shard, data: bytes) -> Entry:
    """The entry of an object that is kept once; per sample, with the rows that it is of."""
    key = layout.key(shard.view, shard.index)
    entry = Entry(key, len(data), sha256(data), "once")
    if layout.spec.per == "store":
        return entry
    return replace(entry, index=shard.index, start=shard.start, stop=shard.stop)


@dataclass(frozen=True)
class Once:
    """Arrays kept once, by name, as the rows of one shard need them, and their entries."""

    arrays: dict[str, Array]
    entries: tuple[Entry, ...]


def load_once(files: LocalFiles, layouts: Iterable[ArrayLayout], shard: Shard) -> Once:
    """A field's arrays per store, and for views after the first those per sample.

    Raises `FileNotFoundError`, `CorruptStore`.
    """
    arrays, entries = {}, []
    for layout in layouts:
        if layout.spec.per == "store" or (layout.spec.per == "sample" and shard.view > 0):
            arrays[layout.spec.name], entry = _load(files, layout, shard)
            entries.append(entry)
    return Once(arrays, tuple(entries))


def _load(files: LocalFiles, layout: ArrayLayout, shard: Shard) -> tuple[Array, Entry]:
    key = layout.key(shard.view, shard.index)
    data = files.get(key)
    reader = ShardReader(layout, data, f"{files.where}/{key}")
    entry = once_entry(layout, shard, data)
    if layout.spec.per == "store":
        return reader.rows(range(1))[0], entry
    starts = range(0, shard.rows, layout.chunk_rows)
    parts = [reader.rows(range(i, min(i + layout.chunk_rows, shard.rows))) for i in starts]
    return np.concatenate(parts), entry


def is_learned(files: LocalFiles, layouts: Iterable[ArrayLayout]) -> bool:
    """Whether every array per store is there and whole."""
    try:
        load_once(files, layouts, Shard(0, 0, 0, 1))
    except (FileNotFoundError, CorruptStore):
        return False
    return True


def publish_learned(
    files: LocalFiles, encoding: Encoding, layouts: Iterable[ArrayLayout], rows: Floats
) -> None:
    """Learn a field's arrays per store and publish them, unless another writer was first."""
    assert isinstance(encoding, LearnedEncoding)
    learned = encoding.learn(rows)
    for layout in layouts:
        if layout.spec.per == "store":
            key = layout.key(0, 0)
            data = encode_shard(layout, learned[layout.spec.name][None])
            try:
                files.put(key, data)
            except FileExistsError:
                if not is_learned(files, [layout]):
                    files.put(key, data, replace=True)

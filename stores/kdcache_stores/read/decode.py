"""From the bytes of a shard to rows, checksums and conversion on all cores at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import Array, CheckedEncoding, Encoding, Floats
from kdcache_stores.errors import CorruptStore, UsageError
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.format.shards import ShardReader
from kdcache_stores.read.sealed_objects import SealedObjects
from kdcache_stores.types import Shard

Selection = slice | NDArray[np.integer[Any]] | Iterable[int] | None


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Wanted:
    """Which rows are read and where they go: a range of rows, or any rows in any order.

    Args:
        rows: a slice, integers (negative ones count from the end), or None for all.
        count: number of rows that there are.
        where: how errors name the store.
    """

    def __init__(self, rows: Selection, count: int, where: str) -> None:
        if rows is None:
            rows = slice(None)
        self._span: range | None = None
        if isinstance(rows, slice):
            span = range(*rows.indices(count))
            if span.step == 1:
                self._span, self.count = span, len(span)
                return
            numbers = np.array(span, dtype=np.int64)
        else:
            given = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise UsageError("rows must be a slice or a sequence of integers")
            numbers = given.astype(np.int64)
            if numbers.size and not -count <= numbers.min() <= numbers.max() < count:
                raise UsageError(
                    f"{where} has rows 0 to {count - 1}, "
                    f"asked for {numbers.min()} to {numbers.max()}"
                )
            numbers = np.where(numbers < 0, numbers + count, numbers)
        self.count = len(numbers)
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]

    def within(self, start: int, stop: int) -> tuple[Any, Any] | None:
        """Of the rows in [start, stop): (which, counted from start, and their places), or None."""
        if self._span is not None:
            low, high = max(start, self._span.start), min(stop, self._span.stop)
            if low >= high:
                return None
            first = self._span.start
            return slice(low - start, high - start), slice(low - first, high - first)
        low, high = (int(i) for i in np.searchsorted(self._sorted, (start, stop)))
        if low == high:
            return None
        return self._sorted[low:high] - start, self._order[low:high]


@dataclass(frozen=True)
class Destination:
    """Where the rows that are read go.

    Args:
        shape: of a row.
        decoded: float32 (rows, *shape), or None where they are decoded only to be checked.
        encoded: (rows, *spec.shape) for each array whose rows are wanted as they are stored.
    """

    shape: tuple[int, ...]
    decoded: Floats | None
    encoded: Mapping[str, Array]


def read_shards(
    source: SealedObjects,
    shards: Iterable[Shard],
    layouts: list[ArrayLayout],
    encoding: Encoding,
    wanted: Wanted,
    out: Destination,
) -> None:
    """Read the wanted rows of these shards of one field into `out`.

    Raises `CorruptStore` if a shard is not what the manifest or its checksums say, or holds values
    that were never written.
    """
    touched = [shard for shard in shards if wanted.within(shard.start, shard.stop)]
    source.objects.prefetch(
        layout.key(shard.view, shard.index) for shard in touched for layout in layouts
    )
    with ThreadPoolExecutor(max(2, cores())) as pool:
        for shard in touched:
            _read_shard(source, shard, layouts, encoding, wanted, out, pool)


def _read_shard(
    source: SealedObjects,
    shard: Shard,
    layouts: list[ArrayLayout],
    encoding: Encoding,
    wanted: Wanted,
    out: Destination,
    pool: ThreadPoolExecutor,
) -> None:
    checks: list[Future[None]] = []
    loaded: dict[str, tuple[ArrayLayout, bytes, str]] = {}
    for layout in layouts:
        key = layout.key(shard.view, shard.index)
        data, stamp = source.load(key)
        if stamp is not None:
            checks.append(pool.submit(source.confirm, key, data, stamp))
        loaded[layout.spec.name] = layout, data, f"{source.where}/{key}"
    try:
        readers = {name: ShardReader(*arguments) for name, arguments in loaded.items()}
    except CorruptStore:
        _wait(checks)
        raise
    blocks = [
        pool.submit(_decode_block, readers, encoding, rows, wanted, out, shard.start)
        for rows in _blocks(layouts, shard)
        if wanted.within(shard.start + rows.start, shard.start + rows.stop)
    ]
    _wait([*checks, *blocks])


def check_rows(
    readers: dict[str, ShardReader],
    layouts: list[ArrayLayout],
    encoding: Encoding,
    shape: tuple[int, ...],
    shard: Shard,
    labels: NDArray[np.int64],
) -> None:
    """Decode a shard of a field, a chunk at a time, and keep nothing.

    Raises `CorruptStore` for what is invalid.

    Args:
        readers: of each array of the field, by its name.
        layouts, encoding: of the field.
        shape: of its rows.
        labels: int64 (shard.rows,).
    """
    where = next(iter(readers.values())).where
    blocks = list(_blocks(layouts, shard))
    space = np.empty((len(blocks[0]), *shape), np.float32)
    for rows in blocks:
        out = space[: len(rows)]
        arrays = _arrays(readers, rows, slice(None))
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                encoding.decode(arrays, out)
                finite = bool(np.isfinite(out.sum()) or np.isfinite(out).all())
            if finite and isinstance(encoding, CheckedEncoding):
                encoding.check(arrays, labels[rows.start : rows.stop])
        except CorruptStore as error:
            raise CorruptStore(f"{where}: {error}") from None
        if not finite:
            raise _not_finite(readers, rows, shard.start)


def _wait(futures: list[Future[None]]) -> None:
    """Wait for all, the SHA-256 first: its error names the damage, a block's error only a symptom of it."""
    for future in futures:
        future.result()


def _blocks(layouts: list[ArrayLayout], shard: Shard) -> Iterator[range]:
    """Runs of rows of a shard that lie within one chunk of every array."""
    step = min(layout.chunk_rows for layout in layouts if layout.spec.per != "store")
    for start in range(0, shard.rows, step):
        yield range(start, min(start + step, shard.rows))


def _decode_block(
    readers: dict[str, ShardReader],
    encoding: Encoding,
    rows: range,
    wanted: Wanted,
    out: Destination,
    shard_start: int,
) -> None:
    part = wanted.within(shard_start + rows.start, shard_start + rows.stop)
    assert part is not None
    which, places = part
    arrays = _arrays(readers, rows, which)
    if out.decoded is not None and isinstance(places, slice):
        target = out.decoded[places]
    else:
        count = places.stop - places.start if isinstance(places, slice) else len(places)
        target = np.empty((count, *out.shape), np.float32)
    encoding.decode(arrays, target)
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(target.sum())  # far cheaper than asking each value
    if suspicious and not np.isfinite(target).all():
        raise _not_finite(readers, rows, shard_start)
    if out.decoded is not None and not isinstance(places, slice):
        out.decoded[places] = target
    for name, kept in out.encoded.items():
        kept[places] = arrays[name]


def _arrays(readers: dict[str, ShardReader], rows: range, which: Any) -> dict[str, Array]:
    """Some rows of every array of a field; all of an array per store."""
    return {
        name: reader.single() if reader.per_store else reader.rows(rows)[which]
        for name, reader in readers.items()
    }


def _not_finite(readers: dict[str, ShardReader], rows: range, shard_start: int) -> CorruptStore:
    where = next(iter(readers.values())).where
    return CorruptStore(
        f"{where}: rows {shard_start + rows.start} to {shard_start + rows.stop - 1} hold "
        "values that were never written"
    )

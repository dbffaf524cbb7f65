"""From the rows of one shard to the objects that hold them, and their entries in the manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.fidelity import (
    decode_some,
    head_kl,
    measure,
    relative_error,
    require_faithful,
)
from kdcache_stores.encodings.protocol import Array, FittedEncoding, Floats
from kdcache_stores.errors import DataError
from kdcache_stores.format.head import Head, sees
from kdcache_stores.format.header import Field, Header
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.format.manifest import Entry, sha256
from kdcache_stores.format.shards import encode_shard
from kdcache_stores.types import Samples, Shard
from kdcache_stores.write.shared_arrays import Shared, shared_entry


@dataclass(frozen=True)
class Packed:
    """Objects by key, and the entries of all that is needed to decode them."""

    objects: dict[str, bytes]
    entries: tuple[Entry, ...]


def pack(
    field: Field,
    layouts: list[ArrayLayout],
    shard: Shard,
    rows: Floats,
    labels: NDArray[np.int64],
    known: Shared,
    minor: int,
    head: Head | None = None,
    faithful: bool = False,
) -> Packed:
    """Encode one shard of one field.

    Args:
        field: the field.
        layouts: its arrays.
        shard: which rows of which view.
        rows: float32 (shard.rows, *shape).
        labels: int64 (shard.rows,).
        known: what rows share and is there already.
        minor: version of the store's format.
        head: that of the store, if it has one.
        faithful: refuse an encoding that loses the differences between logits, see `require_faithful`.
    """
    encoded = _encode(field, rows, labels, shard, known.arrays)
    specs = field.encoding.arrays(field.shape)
    kept = {spec.name for spec in specs if spec.per != "row"}
    shared = {name: a for name, a in (known.arrays | encoded).items() if name in kept}
    measures = _measure(field, rows, labels, shared, minor, head)
    if faithful and field.is_logits:
        with _located(field, shard):
            require_faithful(field.encoding, rows, labels, shared)
    objects, entries = {}, list(known.entries)
    for layout in (layout for layout in layouts if layout.spec.name in encoded):
        key = layout.key(shard.view, shard.index)
        objects[key] = data = encode_shard(layout, encoded[layout.spec.name])
        if layout.spec.per == "sample":
            entries.append(shared_entry(layout, shard, data))
        else:
            place = vars(shard)
            entries.append(Entry(key, len(data), sha256(data), "shard", **place, **measures))
            measures = {}
    return Packed(objects, tuple(entries))


def _encode(
    field: Field, rows: Floats, labels: NDArray[np.int64], shard: Shard, shared: Mapping[str, Array]
) -> dict[str, Array]:
    """Encode a few megabytes of rows at a time: encodings work in float64."""
    encoding, parts = field.encoding, []
    per = {spec.name: spec.per for spec in encoding.arrays(field.shape)}
    step = max(1, 2**22 // math.prod(field.shape))
    with _located(field, shard):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            own = {name: a[part] if per[name] == "sample" else a for name, a in shared.items()}
            based: dict[str, Array] = {}
            if shard.view == 0 and isinstance(encoding, FittedEncoding):
                based = encoding.base(rows[part], own)
            parts.append(based | encoding.encode(rows[part], labels[part], own | based))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def _located(field: Field, shard: Shard) -> Iterator[None]:
    """Say which field and shard a `DataError` is of."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{field.name} of {shard}: {error}") from None


def _measure(
    field: Field,
    rows: Floats,
    labels: NDArray[np.int64],
    shared: Mapping[str, Array],
    minor: int,
    head: Head | None,
) -> dict[str, Any]:
    """What the manifest says of the first array of a field: see `Entry`."""
    if field.is_logits:
        known = labels >= 0
        return {
            "labelled": int(known.sum()),
            "correct": int((rows.argmax(axis=1)[known] == labels[known]).sum()),
            "fidelity": measure(*decode_some(field.encoding, rows, labels, shared)),
        }
    if field.has_error and minor >= 1:
        pair = decode_some(field.encoding, rows, labels, shared)
        measured = {"error": relative_error(*pair)}
        return measured | ({"head_kl": head_kl(*pair, *head)} if head and sees(head, field) else {})
    return {}


def check_rows(
    header: Header, samples: Samples, shard: Shard, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """The rows of each field in float32; raises `DataError` unless they fit and are finite."""
    if arrays.keys() != header.fields.keys():
        raise DataError(f"expected the fields {sorted(header.fields)}, found {sorted(arrays)}")
    result = {}
    for name, field in header.fields.items():
        values = np.asarray(arrays[name])
        expected = (shard.rows, *field.shape)
        if values.shape != expected or values.dtype.kind != "f":
            raise DataError(
                f"{name} of {shard} must be floats {expected}, found {values.dtype} {values.shape}"
            )
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(values, dtype=np.float32)
        if not np.isfinite(rows).all():
            row = shard.start + int(np.argwhere(~np.isfinite(rows))[0][0])
            raise DataError(
                f"{name} of view {shard.view}, row {row} (key {samples.keys[row]!r}) "
                "is not finite in float32: a store holds finite values only"
            )
        result[name] = rows
    return result

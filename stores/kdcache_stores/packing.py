"""From the rows of one shard to the objects that hold them, and their entries in the manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encoding import Array, Floats, LearnedEncoding
from kdcache_stores.errors import DataError
from kdcache_stores.fidelity import measure_encoding, require_faithful
from kdcache_stores.header import Field, Header
from kdcache_stores.layout import ArrayLayout
from kdcache_stores.manifest import Entry, sha256
from kdcache_stores.nouns import Samples, Shard
from kdcache_stores.once import Once, once_entry
from kdcache_stores.shards import encode_shard


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
    known: Once,
    classes: int,
    judge: bool = False,
) -> Packed:
    """Encode one shard of one field.

    Args:
        field: the field.
        layouts: its arrays.
        shard: which rows of which view.
        rows: float32 (shard.rows, *shape).
        labels: int64 (shard.rows,).
        known: what is kept once and is there already.
        classes: K; rows of this shape are logits, and measured.
        judge: refuse an encoding that loses what the logits say, see `require_faithful`.
    """
    encoded = _encode(field, rows, labels, shard, known.arrays)
    specs = field.encoding.arrays(field.shape)
    kept = {spec.name for spec in specs if spec.per != "row"}
    once = {name: a for name, a in (known.arrays | encoded).items() if name in kept}
    measures: dict[str, Any] = {}
    if field.shape == (classes,):
        measures = _measure(field, rows, labels, once)
        if judge:
            with _located(field, shard):
                require_faithful(field.encoding, rows, labels, once)
    objects, entries = {}, list(known.entries)
    for layout in (layout for layout in layouts if layout.spec.name in encoded):
        key = layout.key(shard.view, shard.index)
        objects[key] = data = encode_shard(layout, encoded[layout.spec.name])
        if layout.spec.per == "sample":
            entries.append(once_entry(layout, shard, data))
        else:
            place = vars(shard)
            entries.append(Entry(key, len(data), sha256(data), "shard", **place, **measures))
            measures = {}
    return Packed(objects, tuple(entries))


def _encode(
    field: Field, rows: Floats, labels: NDArray[np.int64], shard: Shard, once: Mapping[str, Array]
) -> dict[str, Array]:
    """Encode a few megabytes of rows at a time: encodings work in float64."""
    encoding, parts = field.encoding, []
    per = {spec.name: spec.per for spec in encoding.arrays(field.shape)}
    step = max(1, 2**22 // math.prod(field.shape))
    with _located(field, shard):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            own = {name: a[part] if per[name] == "sample" else a for name, a in once.items()}
            based: dict[str, Array] = {}
            if shard.view == 0 and isinstance(encoding, LearnedEncoding):
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
    field: Field, rows: Floats, labels: NDArray[np.int64], once: Mapping[str, Array]
) -> dict[str, Any]:
    known = labels >= 0
    return {
        "labelled": int(known.sum()),
        "correct": int((rows.argmax(axis=1)[known] == labels[known]).sum()),
        "fidelity": measure_encoding(field.encoding, rows, labels, once),
    }


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


def check_lesson(field: Field, lesson: NDArray[np.int64], values: NDArray[Any]) -> Floats:
    """The rows to learn from in float32; raises `DataError` unless they fit and are finite."""
    expected = (len(lesson), *field.shape)
    if values.shape[1:] != expected or not 1 <= len(values) <= 2 or values.dtype.kind != "f":
        raise DataError(
            f"{field.name}: expected floats of one or two views, {expected} each, to learn from, "
            f"found {values.dtype} {values.shape}"
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(values, dtype=np.float32)
    if not (finite := np.isfinite(rows)).all():
        view, position = (int(i) for i in np.argwhere(~finite)[0][:2])
        raise DataError(
            f"{field.name} of view {view}, row {lesson[position]} is not finite in float32: there "
            "is nothing to learn from it"
        )
    return rows

"""Where things lie in a store: shards and chunks of an array, its Zarr v3 metadata, its keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdcache_stores.encodings.protocol import DENSE_BYTES, ArraySpec
from kdcache_stores.errors import FormatError, UsageError
from kdcache_stores.format.canonical_json import Json, first_difference, pretty_json
from kdcache_stores.types import Shard

SHARD_BYTES = 64 * 2**20
"""No array's shard is larger, before compression."""
SHARD_ROWS = 65_536
"""No shard holds more rows unless it is asked to: parts, ranks and interrupts need grain."""
CHUNK_BYTES = 2**20
"""No chunk is larger, before compression, unless a single row is."""
SHARED_BYTES = 256 * 2**20
"""No array per store, which is a single row, is larger."""

_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_COLUMNS = {"name": "transpose", "configuration": {"order": [0, 2, 1]}}
_NAMES = ("view", "sample")


def choose_shard_rows(
    samples: int, specs: Sequence[ArraySpec], values: int, at_most: int | None = None
) -> int:
    """Rows per shard, the same for every array: as few shards as the limits allow.

    Args:
        samples: N.
        specs: all arrays of the store.
        values: values per row of the widest field, decoded.
        at_most: rows per shard, instead of `SHARD_ROWS`.

    Returns rows, a multiple of the number of chunks of each array, which is a power of two.
    """
    widest = max(spec.row_bytes for spec in specs if spec.per != "store")
    if widest > SHARD_BYTES:
        raise UsageError(f"a row of {widest} bytes does not fit a shard of {SHARD_BYTES} bytes")
    dense = max(DENSE_BYTES // (4 * values), 1)
    limit = min(SHARD_BYTES // widest, dense, at_most or SHARD_ROWS, samples)
    shards = math.ceil(samples / limit)
    while True:
        rows = math.ceil(samples / shards)
        chunks = _chunks(rows, widest)
        rows = math.ceil(rows / chunks) * chunks
        if rows * widest <= SHARD_BYTES or rows == 1:
            return rows
        shards += 1


def _chunks(rows: int, row_bytes: int) -> int:
    """The power of two of chunks that a shard of `rows` rows is cut into, at least a row each."""
    wanted = math.ceil(rows * row_bytes / CHUNK_BYTES)
    return int(min(1 << (wanted - 1).bit_length(), 1 << (rows.bit_length() - 1)))


def each_shard(views: range, samples: int, shard_rows: int) -> Iterator[Shard]:
    """All shards of these views, in order, one at a time: however many are claimed, none is kept."""
    for view in views:
        for index, start in enumerate(range(0, samples, shard_rows)):
            yield Shard(view, index, start, min(start + shard_rows, samples))


def shards_of(views: range, samples: int, shard_rows: int) -> list[Shard]:
    """All shards of these views, in order."""
    return list(each_shard(views, samples, shard_rows))


def _blosc(spec: ArraySpec) -> dict[str, Json]:
    return {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            # Byte planes of codes are Huffman-coded; searching for matches costs more. In bit
            # planes it pays: eight codes are one byte, and most of them are zeros.
            "clevel": 5 if spec.columns else 2,
            "shuffle": "bitshuffle" if spec.columns else "shuffle",
            "typesize": np.dtype(spec.dtype).itemsize,
            "blocksize": 0,
        },
    }


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a field: shape (views, samples, *spec.shape), one Zarr shard per (view, shard).

    Args:
        field: name of the field.
        spec: what the encoding says of the array.
        views: V; 1 if rows share it.
        samples: N; 1 if all rows share it.
        shard_rows: rows per shard.
        chunk_rows: rows per chunk; divides `shard_rows`.
    """

    field: str
    spec: ArraySpec
    views: int
    samples: int
    shard_rows: int
    chunk_rows: int

    @classmethod
    def choose(
        cls, field: str, spec: ArraySpec, views: int, samples: int, shard_rows: int
    ) -> ArrayLayout:
        """The layout with chunks of at most `CHUNK_BYTES`."""
        if spec.per != "row":
            views = 1
        if spec.per == "store":
            samples = shard_rows = 1
        chunks = _chunks(shard_rows, spec.row_bytes)
        while shard_rows % chunks:
            chunks //= 2
        return cls(field, spec, views, samples, shard_rows, shard_rows // chunks)

    @property
    def path(self) -> str:
        """Path of the array in the store."""
        return f"{self.field}/{self.spec.name}"

    @property
    def metadata_key(self) -> str:
        """Key of the array's `zarr.json`."""
        return f"{self.path}/zarr.json"

    @property
    def chunks(self) -> int:
        """Chunks per shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def most_bytes(self) -> int:
        """No shard is larger: chunks that do not compress, each with its checksums, and the index."""
        return self.shard_rows * self.spec.row_bytes + 64 * self.chunks + 4

    def key(self, view: int, index: int) -> str:
        """Key of the array's part of a shard; what rows share is part of several."""
        view = view if self.spec.per == "row" else 0
        index = 0 if self.spec.per == "store" else index
        return "/".join([self.path, "c", str(view), str(index), *("0" for _ in self.spec.shape)])

    def metadata(self) -> dict[str, Json]:
        """The array's Zarr v3 metadata."""
        trailing = list(self.spec.shape)
        single = np.dtype(self.spec.dtype).itemsize == 1
        endian = {"name": "bytes"} if single else _ENDIAN
        columns = [_COLUMNS] if self.spec.columns else []
        blosc = [_blosc(self.spec)] if self.spec.compressed or self.spec.columns else []
        sharding = {
            "chunk_shape": [1, self.chunk_rows, *trailing],
            "codecs": [*columns, endian, *blosc, _CRC32C],
            "index_codecs": [_ENDIAN, _CRC32C],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.views, self.samples, *trailing],
            "data_type": self.spec.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1, self.shard_rows, *trailing]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if math.isnan(self.spec.fill) else self.spec.fill,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": [*_NAMES, *(f"d{axis}" for axis in range(len(trailing)))],
        }

    def document(self) -> bytes:
        """The bytes of `zarr.json`."""
        return pretty_json(self.metadata())

    def grown(self, views: int) -> ArrayLayout:
        """The same array with another number of views."""
        return replace(self, views=views) if self.spec.per == "row" else self


def read_layout(
    document: dict[str, Json],
    field: str,
    spec: ArraySpec,
    samples: int,
    where: str,
    values: int = 1,
) -> ArrayLayout:
    """The layout that an array's `zarr.json` states; a row of its field has `values` values.

    Only row counts are taken from the document; all else must be what this format version writes.
    Raises `FormatError` naming the first member that differs.
    """

    def integer(value: Any, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**48:
            raise FormatError(f"{where}: {what} must be a positive integer, found {value!r:.60}")
        return value

    try:
        views = document["shape"][0]
        shard_rows = document["chunk_grid"]["configuration"]["chunk_shape"][1]
        sharding = document["codecs"][0]["configuration"]
        chunk_rows = sharding["chunk_shape"][1]
        codecs = [codec["name"] for codec in [*document["codecs"], *sharding["codecs"]]]
    except (KeyError, IndexError, TypeError):
        raise FormatError(f"{where}: no metadata of a sharded Zarr v3 array") from None
    known = {"sharding_indexed", "transpose", "bytes", "crc32c", "blosc"}
    if unknown := [name for name in codecs if not isinstance(name, str) or name not in known]:
        raise FormatError(
            f"{where}: codec {unknown[0]!r:.40} is not known to this kdcache "
            f"({', '.join(sorted(known))}): a newer version may read it"
        )
    layout = ArrayLayout(
        field,
        spec,
        integer(views, "shape[0]") if spec.per == "row" else 1,
        1 if spec.per == "store" else samples,
        1 if spec.per == "store" else integer(shard_rows, "rows per shard"),
        1 if spec.per == "store" else integer(chunk_rows, "rows per chunk"),
    )
    expected = layout.metadata()
    if difference := first_difference({**document, "attributes": {}}, expected, "zarr.json"):
        name, stated, wanted = difference
        raise FormatError(f"{where}: {name} must be {wanted!r:.120}, found {stated!r:.120}")
    if layout.shard_rows % layout.chunk_rows:
        raise FormatError(f"{where}: {shard_rows} rows per shard are no multiple of {chunk_rows}")
    if layout.chunk_rows > 1 and layout.chunk_rows * spec.row_bytes > 2 * CHUNK_BYTES:
        raise FormatError(
            f"{where}: chunks of {chunk_rows} rows are larger than {CHUNK_BYTES} bytes"
        )
    if layout.shard_rows > 1 and 4 * layout.shard_rows * values > DENSE_BYTES:
        raise FormatError(
            f"{where}: the rows of a shard are larger than {DENSE_BYTES} bytes as float32"
        )
    limit = SHARED_BYTES if spec.per == "store" else SHARD_BYTES
    if layout.shard_rows * spec.row_bytes > limit:
        raise FormatError(f"{where}: shards of {shard_rows} rows are larger than {limit} bytes")
    return layout

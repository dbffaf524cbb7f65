"""The bytes of one shard: written by zarr-python, read directly.

A shard is what Zarr v3 calls `sharding_indexed`: its chunks one after another, each followed by its
crc32c, then an index of little-endian uint64 pairs (offset, bytes), then the index's crc32c.
Reading it directly is faster than zarr-python on the same bytes, and a store's metadata never
chooses which code runs.
"""

from __future__ import annotations

from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import CorruptStore
from kdcache_stores.format.canonical_json import pretty_json
from kdcache_stores.format.layout import ArrayLayout


def encode_shard(layout: ArrayLayout, values: NDArray[Any]) -> bytes:
    """The bytes of a shard that holds `values`, (rows, *spec.shape), rows at most `shard_rows`."""
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    alone = ArrayLayout(
        layout.field, layout.spec, 1, len(values), layout.shard_rows, layout.chunk_rows
    )
    objects: dict[str, Any] = {"zarr.json": cpu.Buffer.from_bytes(pretty_json(alone.metadata()))}
    # By default Zarr drops chunks that equal the fill value.
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(store=MemoryStore(objects), mode="r+")
        array[0] = np.ascontiguousarray(values, dtype=layout.spec.dtype)
    (key,) = objects.keys() - {"zarr.json"}
    return bytes(objects[key].to_bytes())


class ShardReader:
    """Chunks of one shard, each checked against its crc32c when it is read.

    Args:
        layout: of the shard's array.
        data: the shard's bytes, or a map of them.
        where: how errors name the shard.
    """

    def __init__(self, layout: ArrayLayout, data: bytes | mmap, where: str) -> None:
        from google_crc32c import value as crc32c

        self._crc32c = crc32c
        self._layout = layout
        self._data = np.frombuffer(data, np.uint8)
        self.where = where
        self.per_store = layout.spec.per == "store"
        self._chunks: dict[int, NDArray[Any]] = {}
        size = 16 * layout.chunks + 4
        if len(data) < size:
            raise CorruptStore(f"{where}: {len(data)} bytes are too few for an index of {size}")
        self._index = np.frombuffer(self._checked(len(data) - size, size, "index"), "<u8")
        self._index = self._index.reshape(layout.chunks, 2)

    def rows(self, rows: range) -> NDArray[Any]:
        """Rows of the shard that lie in one chunk, a read-only view of it.

        The chunk is kept for others of its rows, unless these are all of them.
        """
        number, first = divmod(rows.start, self._layout.chunk_rows)
        if len(rows) == self._layout.chunk_rows:
            return self._chunk(number)
        return self._kept(number)[first : first + len(rows)]

    def single(self) -> NDArray[Any]:
        """The one row of an array per store."""
        result: NDArray[Any] = self._kept(0)[0]
        return result

    def offsets(self) -> NDArray[np.int64]:
        """Where each chunk of an uncompressed array begins in the bytes, (chunks,)."""
        for number in range(self._layout.chunks):
            self._chunk(number)
        return self._index[:, 0].astype(np.int64)

    def _kept(self, number: int) -> NDArray[Any]:
        if number not in self._chunks:
            self._chunks[number] = self._chunk(number)
        return self._chunks[number]

    def _chunk(self, number: int) -> NDArray[Any]:
        """One chunk, (chunk_rows, *spec.shape), a read-only view of the bytes where possible."""
        layout = self._layout
        offset, size = (int(value) for value in self._index[number])
        what = f"chunk {number}"
        if offset == size == 2**64 - 1:
            raise CorruptStore(f"{self.where}: {what} was never written")
        if size <= 4 or offset + size > len(self._data):
            raise CorruptStore(f"{self.where}: {what} lies outside the shard")
        expected = layout.chunk_rows * layout.spec.row_bytes
        payload = self._checked(offset, size, what)
        if layout.spec.compressed or layout.spec.columns:
            payload = self._decompressed(payload, expected, what)
        if len(payload) != expected:
            raise CorruptStore(
                f"{self.where}: {what} holds {len(payload)} bytes, expected {expected}"
            )
        values = payload.view(np.dtype(layout.spec.dtype).newbyteorder("<"))
        if layout.spec.columns:
            return values.reshape(*layout.spec.shape, layout.chunk_rows).T
        return values.reshape(layout.chunk_rows, *layout.spec.shape)

    def _checked(self, offset: int, size: int, what: str) -> NDArray[np.uint8]:
        """The bytes before a trailing crc32c, once they agree with it."""
        payload = self._data[offset : offset + size - 4]
        stored = int.from_bytes(self._data[offset + size - 4 : offset + size].tobytes(), "little")
        if self._crc32c(payload) != stored:
            raise CorruptStore(f"{self.where}: the crc32c of {what} does not agree with its bytes")
        return payload

    def _decompressed(self, payload: NDArray[np.uint8], size: int, what: str) -> NDArray[np.uint8]:
        """The chunk before Blosc, if its header says that it has the size that it must have."""
        from numcodecs import blosc

        head = np.frombuffer(payload[4:16].tobytes().ljust(12, b"\0"), "<u4")
        if (int(head[0]), int(head[2])) != (
            size,
            len(payload),
        ):  # Blosc trusts its header unchecked
            raise CorruptStore(
                f"{self.where}: {what} states {head[0]} bytes in {head[2]}, "
                f"expected {size} in {len(payload)}"
            )
        out = np.empty(size, np.uint8)
        try:
            blosc.decompress(np.ascontiguousarray(payload), out)
        except (RuntimeError, ValueError) as error:
            raise CorruptStore(f"{self.where}: {what} does not decompress: {error}") from None
        return out

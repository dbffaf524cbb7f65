"""Single rows of a field in any order: the step of a data loader, not that of a whole view.

`Store.read` reads and decodes whole shards. Here a shard is brought into a form once, in which any row
is one copy away, and stays mapped: of float16 and float32 its own file, whose SHA-256 is checked as
ever; of all else a file of decoded rows in a folder that all processes share.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import Floats
from kdcache_stores.errors import CorruptStore, StoreError, UnknownName, UsageError
from kdcache_stores.format.shards import ShardReader
from kdcache_stores.objects.files import LocalFiles, Stamp
from kdcache_stores.objects.locking import lock_file
from kdcache_stores.read.reader import Store
from kdcache_stores.types import Shard

DECODED_VIEWS = 2
"""Views whose decoded rows are kept: the one that is read, and the one before or after it."""


class DecodedFolder:
    """A folder of decoded shards, for this process and its workers; it goes with its maker.

    Args:
        parent: where to make it; by default the system's folder for temporary files.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        self.path = tempfile.mkdtemp(prefix="kdcache-rows-", dir=parent)
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked worker inherits the finalizer, and not the folder
        shutil.rmtree(path, ignore_errors=True)


class _Mapped(NamedTuple):
    """Rows of one shard in mapped bytes."""

    windows: NDArray[np.void]
    """(bytes - row bytes + 1,): the row that begins at each byte, as one value of so many bytes."""
    offsets: NDArray[np.int64]
    chunk_rows: int
    path: str
    stamp: Stamp | None

    def take(self, rows: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Values (B, values per row) of rows counted from the start of the shard."""
        chunks, within = np.divmod(rows, self.chunk_rows)
        starts = self.offsets[chunks] + within * self.windows.itemsize
        values: NDArray[Any] = self.windows[starts].view(dtype)
        return values.reshape(len(rows), -1)

    @property
    def changed(self) -> bool:
        """Whether the file is another one, or was written to."""
        status = os.stat(self.path)
        return self.stamp != (status.st_size, status.st_ino, status.st_mtime_ns)


class RandomRows:
    """Rows of one field of a store, in any order; safe to pickle and to fork.

    Args:
        store: any.
        field: name of the field.
        folder: shared by everyone who reads the same rows; not needed where `mapped`.

    Attributes:
        mapped: whether rows come from the shards' own files: float16 and float32 on this machine.
        decoded_bytes: size of the decoded rows that are kept in `folder`; 0 where `mapped`.
    """

    def __init__(self, store: Store, field: str, folder: DecodedFolder | None) -> None:
        if field not in store.fields:
            raise UnknownName("field", field, store.fields)
        self.store, self.field = store, field
        item = store.fields[field]
        self._shape = item.shape
        local = isinstance(store.source.objects, LocalFiles)
        self.mapped = local and item.encoding.name in ("float16", "float32")
        name = item.encoding.name if self.mapped else "float32"
        self._dtype = np.dtype(name).newbyteorder("<")  # as numbers lie in a store
        self._row_bytes = int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize
        if not self.mapped and folder is None:
            raise UsageError(f"{item.encoding.name} needs a folder for decoded rows")
        self._folder = folder
        self.decoded_bytes = 0 if self.mapped else DECODED_VIEWS * len(store) * self._row_bytes
        self._shards: dict[tuple[int, int], _Mapped] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def read(self, view: int, rows: NDArray[np.int64]) -> NDArray[np.float16] | Floats:
        """Some rows of a view, in the order and as often as they are asked for.

        Args:
            view: one of the store's.
            rows: int64 (B,), from 0 on.

        Returns (B, *shape), float16 as it is stored where such rows are `mapped` (NumPy is slow at
        widening it), float32 otherwise. Raises `CorruptStore`, `UsageError` as `Store.read` does.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self.store):
            raise UsageError(
                f"{self.store.where} has rows 0 to {len(self.store) - 1}, asked for {rows.min()} "
                f"to {rows.max()}"
            )
        step = self.store.shard_rows
        if len(self.store) <= step:
            values = self._shard(view, 0).take(rows, self._dtype)
        else:
            numbers = rows // step
            values = np.empty((len(rows), self._row_bytes // self._dtype.itemsize), self._dtype)
            for number in np.unique(numbers):
                here = numbers == number
                shard = self._shard(view, int(number))
                values[here] = shard.take(rows[here] - number * step, self._dtype)
        return values.reshape(len(rows), *self._shape)

    def _shard(self, view: int, number: int) -> _Mapped:
        known = self._shards.get((view, number))
        if known is not None and not (self.mapped and known.changed):
            return known
        if view not in self.store.view_range:
            held = self.store.view_range
            raise UsageError(
                f"{self.store.where} has views {held.start} to {held.stop - 1}, asked for {view}"
            )
        shard = self.store.shards(view)[number]
        if self.mapped:
            made = self._map_own(shard)
        else:
            kept = {v for v, _ in self._shards} | {view}
            for old in sorted(kept - {view}, key=lambda v: abs(v - view))[DECODED_VIEWS - 1 :]:
                self._forget(old)
            made = self._map_decoded(shard)
        self._shards[view, number] = made
        return made

    def _map_own(self, shard: Shard) -> _Mapped:
        """The shard's file itself, once its SHA-256 and its values are found good."""
        (layout,) = self.store.layouts[self.field]
        key = layout.key(shard.view, shard.index)
        source = self.store.source
        assert isinstance(source.objects, LocalFiles)
        data, stamp = source.mapped(key)
        where = f"{source.where}/{key}"
        offsets = ShardReader(layout, data, where).offsets()
        mapped = self._windows(data, offsets, layout.chunk_rows, source.objects.path(key), stamp)
        for start in range(0, shard.rows, layout.chunk_rows):
            rows = np.arange(start, min(start + layout.chunk_rows, shard.rows))
            if not np.isfinite(mapped.take(rows, self._dtype)).all():
                raise CorruptStore(
                    f"{where}: rows {shard.start + start} to {shard.start + rows[-1]} hold values "
                    "that were never written"
                )
        return mapped

    def _windows(
        self, data: mmap.mmap, offsets: NDArray[np.int64], rows: int, path: str, stamp: Stamp | None
    ) -> _Mapped:
        count, row = len(data) - self._row_bytes + 1, np.dtype(f"V{self._row_bytes}")
        windows = np.ndarray((count,), row, data, strides=(1,))
        return _Mapped(windows, offsets, rows, path, stamp)

    # ---- decoded rows ----------------------------------------------------------------------------

    def _file(self, view: int, number: int) -> Path:
        assert self._folder is not None
        name = f"{self.store.teacher.digest[:16]}-{self.field}-{view}-{number}"
        return Path(self._folder.path, name)

    def _map_decoded(self, shard: Shard) -> _Mapped:
        path = self._file(shard.view, shard.index)
        with open(path.with_name("lock"), "ab") as lock:  # the first who comes decodes
            lock_file(lock.fileno(), path.parent)
            if not path.exists():
                self._decode(shard, path)
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._windows(data, np.zeros(1, np.int64), shard.rows, str(path), None)

    def _decode(self, shard: Shard, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            with open(part, "w+b") as file:
                _reserve(file.fileno(), shard.rows * self._row_bytes)
                data = mmap.mmap(file.fileno(), 0)
                out = np.frombuffer(data, np.float32).reshape(shard.rows, *self._shape)
                self.store.read(shard.view, slice(shard.start, shard.stop), self.field, out)
        except OSError as error:
            raise StoreError(
                f"{self.store.where}: decoded rows of {self.field} need {self.decoded_bytes} bytes in "
                f"{path.parent}: {error}. Make room there, or name another folder"
            ) from error
        os.replace(part, path)

    def _forget(self, view: int) -> None:
        """Let go of a view; whoever still reads its files does so until they let go."""
        for key in [key for key in self._shards if key[0] == view]:
            with suppress(FileNotFoundError):
                os.unlink(self._file(*key))
            del self._shards[key]


def _reserve(handle: int, nbytes: int) -> None:
    """Make a file so long, on a full disk with an error now and not in the middle of a write to its map."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, nbytes)
    else:  # macOS
        free = os.fstatvfs(handle)
        if free.f_bavail * free.f_frsize < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(handle, nbytes)

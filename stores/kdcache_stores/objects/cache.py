"""Objects of remote stores kept on this disk, by their SHA-256: bounded, shared, checked on use.

Files are named by the digest of their content, so that stores share what they have in common, and any
number of processes may fill and empty one folder at once: a file appears whole or not at all, and one
that is removed while another process reads it stays readable there. The least recently used go first.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kdcache_stores.errors import UsageError
from kdcache_stores.format.manifest import sha256
from kdcache_stores.objects.locking import lock_file

DEFAULT_SIZE = 20 * 10**9
"""Bytes that the cache may take unless KDCACHE_CACHE_SIZE says otherwise."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_STALE = 24 * 3600.0


def parse_size(text: str) -> int:
    """ "20GB" -> 20,000,000,000; raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?[bB]?)\s*", text)
    unit = match[2].upper() if match else "?"
    unit = unit + "B" if unit in ("K", "M", "G", "T") else unit
    if match is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is no size: expected bytes, or a number with kB, MB, GB or TB")
    return int(float(match[1]) * _UNITS[unit])


def default_folder() -> Path:
    """KDCACHE_CACHE, or `kdcache` in the user's cache folder."""
    if folder := os.environ.get("KDCACHE_CACHE"):
        return Path(folder)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kdcache" / "objects"


def default_size() -> int:
    """KDCACHE_CACHE_SIZE, or `DEFAULT_SIZE`; bytes."""
    text = os.environ.get("KDCACHE_CACHE_SIZE")
    return parse_size(text) if text else DEFAULT_SIZE


@dataclass(frozen=True)
class CacheState:
    """What a cache holds: number of objects, bytes, and the bytes it may hold."""

    folder: str
    objects: int
    nbytes: int
    limit: int


class ObjectCache:
    """A folder of objects named by their SHA-256.

    Args:
        folder: where; made when first written to.
        limit: bytes that it may hold; 0 keeps nothing.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit: int | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.limit = default_size() if limit is None else limit
        self._added: int | None = None  # bytes since this process last looked; None: never looked

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise UsageError(f"{digest!r:.80} is no SHA-256")
        return self.folder / digest[:2] / digest

    def get(self, digest: str, size: int) -> bytes | None:
        """The object, if it is here and whole; a damaged one is dropped."""
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == size:
                    data = file.read()
                    if sha256(data) == digest:
                        with suppress(OSError):
                            os.utime(path)
                        return data
        except OSError:  # not here, or a cache that cannot be read: the server has it
            return None
        with suppress(OSError):
            path.unlink()
        return None

    def has(self, digest: str) -> bool:
        """Whether an object of this name is here, unread."""
        return self._path(digest).exists()

    def put(self, digest: str, data: bytes) -> None:
        """Keep an object, and drop the least recently used ones beyond the limit.

        A cache that cannot be written (a full disk, a read-only folder) keeps nothing: the caller has
        the bytes.
        """
        if len(data) > self.limit:
            return
        path = self._path(digest)
        temporary = path.with_name(f".{digest}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            return

    def _make_room(self, size: int) -> None:
        """Look at the folder again once this process added a fiftieth of the limit."""
        if self._added is not None and self._added + size < self.limit // 50:
            self._added += size
            return
        with self._locked():
            self._evict(self.limit - max(size, self.limit // 50))
        self._added = size

    def _evict(self, limit: int) -> None:
        self._drop_stale()
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= max(limit, 0):
                return
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every object."""
        return (
            (used, size, path) for used, size, path in self._all() if _DIGEST.fullmatch(path.name)
        )

    def _drop_stale(self) -> None:
        """Remove what crashed writers left."""
        for used, _, path in self._all():
            if path.name.endswith(".tmp") and time.time() - used > _STALE:
                path.unlink(missing_ok=True)

    def _all(self) -> Iterator[tuple[float, int, Path]]:
        """(time of change, bytes, path) of every file, also of those that others are writing."""
        with suppress(FileNotFoundError):
            for folder in os.scandir(self.folder):
                if len(folder.name) != 2 or not folder.is_dir(follow_symlinks=False):
                    continue
                for file in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        stat = file.stat(follow_symlinks=False)
                        yield stat.st_mtime, stat.st_size, Path(file.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as file:
            lock_file(file.fileno(), self.folder)
            yield

    def state(self) -> CacheState:
        """What it holds."""
        files = list(self._files())
        return CacheState(
            str(self.folder), len(files), sum(size for _, size, _ in files), self.limit
        )

    def clear(self) -> CacheState:
        """Remove every object; returns what it held."""
        before = self.state()
        if self.folder.exists():
            with self._locked():
                self._evict(0)
        return before

"""A store behind a URL, as the reader sees it: objects that the manifest promises, cached and read ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kdcache_stores.errors import CorruptStore
from kdcache_stores.format.manifest import MANIFEST, SEAL, Entry, sha256
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.cache import ObjectCache
from kdcache_stores.objects.files import LocalFiles, Objects, Stamp, check_key
from kdcache_stores.objects.urls import local_path

CONNECTIONS = 16
"""Objects on their way at once: 50 ms of latency cost 3 ms per object."""
AHEAD = 512 * 2**20
"""Bytes that wait at most for the reader that they were fetched for."""

_TRIES = 6
_LIMITS = {SEAL: 2**10, MANIFEST: 2**30}


def open_objects(path: Any, cache_size: int | None = None) -> Objects:
    """The objects below a path or URL.

    Args:
        path: a folder, or a URL that `Bucket` takes, or file://.
        cache_size: bytes of remote objects kept on this disk; 0 keeps none; None as configured.
    """
    local = local_path(path)
    return LocalFiles(local) if local is not None else RemoteFiles(str(path), cache_size)


class RemoteFiles:
    """The objects below one URL. Safe for threads; pickles as its URL, without what it fetched.

    Once told what the manifest says (`expect`), an object has the size and the SHA-256 stated there or
    is asked for again; no request is made to learn a size, and nothing larger is taken into memory.

    Args:
        url: of the store.
        cache_size: bytes of the local cache; 0 for none; None as configured.
    """

    def __init__(self, url: str, cache_size: int | None = None) -> None:
        self.bucket = Bucket(url)
        self.where = self.bucket.where
        self._cache_size = cache_size
        self._cache = ObjectCache(limit=cache_size)
        self.keeps = self._cache.limit > 0
        self._entries: dict[str, Entry] = {}
        self._begin()

    def _begin(self) -> None:
        """Nothing on its way. Again in a forked process, which inherits neither threads nor locks."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[str] = deque()
        self._coming: dict[str, Future[bytes]] = {}
        self._coming_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.bucket.url, "size": self._cache_size, "entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["size"])  # type: ignore[misc]
        self._entries = state["entries"]

    def expect(self, entries: Mapping[str, Entry]) -> None:
        """Take note of what the manifest lists; its `card` objects may change afterwards."""
        self._entries = {key: entry for key, entry in entries.items() if entry.kind != "card"}

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if there is none: as the manifest says, if it is known."""
        entry = self._entries.get(check_key(key))
        return entry.size if entry is not None else self.bucket.size(key)

    def stamp(self, key: str) -> Stamp | None:
        """Size and, if the manifest says it, SHA-256: what `get` gives has that or raises."""
        entry = self._entries.get(check_key(key))
        if entry is not None:
            return entry.size, entry.sha256
        size = self.bucket.size(key)
        return None if size is None else (size,)

    def get(self, key: str, most: int | None = None) -> bytes:
        """The object's bytes; raises `FileNotFoundError`, `CorruptStore`, `RemoteError`."""
        if self._pid != os.getpid():
            self._begin()
        entry = self._entries.get(key)
        if entry is None:
            return self.bucket.get(key, min(_LIMITS.get(key, 2**26), most or 2**30))
        with self._lock:
            coming = self._coming.pop(key, None)
            if coming is None and key in self._waiting:
                self._waiting.remove(key)
        try:
            return coming.result() if coming is not None else self._fetch(entry)
        finally:
            if coming is not None:
                with self._lock:
                    self._coming_bytes -= entry.size
            self._start_waiting()

    def _fetch(self, entry: Entry) -> bytes:
        """From the cache, or from the server until it is what the manifest says."""
        data = self._cache.get(entry.sha256, entry.size) if self._cache.limit else None
        if data is not None:
            return data
        # A growth may be replacing metadata: the reader then decides about what differs from the manifest.
        metadata = entry.kind == "metadata"
        problem = ""
        for _ in range(_TRIES):
            try:
                data = self.bucket.get(entry.key, 2**26 if metadata else entry.size)
            except FileNotFoundError:
                raise CorruptStore(f"{self.where}/{entry.key} is missing") from None
            except CorruptStore as error:
                problem = str(error)
                continue
            if len(data) == entry.size and sha256(data) == entry.sha256:
                self._cache.put(entry.sha256, data)
                return data
            problem = f"{len(data)} bytes with the SHA-256 {sha256(data)}"
        if metadata and data is not None:
            return data
        raise CorruptStore(
            f"{self.where}/{entry.key} is damaged: {_TRIES} times the server sent other bytes than "
            f"the manifest's {entry.size} with the SHA-256 {entry.sha256}, at last {problem}"
        )

    # ---- reading ahead ---------------------------------------------------------------------------

    def prefetch(self, keys: Iterable[str]) -> None:
        """Start to fetch objects that are about to be read, in this order, a bounded number at once."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            known = {*self._waiting, *self._coming}
            self._waiting.extend(key for key in keys if key in self._entries and key not in known)
        self._start_waiting()

    def _start_waiting(self) -> None:
        with self._lock:
            while self._waiting:
                entry = self._entries[self._waiting[0]]
                if self._coming and (
                    self._coming_bytes + entry.size > AHEAD or len(self._coming) >= 2 * CONNECTIONS
                ):
                    return
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="kdcache-fetch")
                self._waiting.popleft()
                self._coming_bytes += entry.size
                self._coming[entry.key] = self._pool.submit(self._fetch, entry)

    def forget(self) -> None:
        """Drop what was fetched ahead and not read."""
        with self._lock:
            self._waiting.clear()
            for key in list(self._coming):
                self._coming.pop(key).cancel()
                self._coming_bytes -= self._entries[key].size

    def close(self) -> None:
        """End the threads; the object can still be used afterwards."""
        self.forget()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

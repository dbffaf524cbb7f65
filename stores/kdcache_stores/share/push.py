"""Pushing a sealed, verified store: what is missing there, never over other data, the seal last.

The first object is the root, created only if there is none: it claims the place. Every object is created,
never overwritten; one that is there already must be equal. So a push that was interrupted is repeated, and
two at once either write the same bytes or one of them is refused.

A store that is sealed there grows as one on a disk does: new shards, an announcement of the new manifest
(created only if there is none, which makes it the lock), longer arrays, the manifest, the seal. Readers
find the old or the new store at each moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdcache_stores.errors import (
    CorruptStore,
    StoreInUse,
    StoreNotFound,
    UnfinishedStore,
    UsageError,
)
from kdcache_stores.format.canonical_json import first_difference
from kdcache_stores.format.manifest import (
    ANNOUNCEMENT,
    CARD,
    CROISSANT,
    MANIFEST,
    ROOT,
    SEAL,
    Entry,
    seal_text,
    sha256,
)
from kdcache_stores.format.records import announced, announcement
from kdcache_stores.objects import hub
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.files import Disk, LocalFiles, is_leftover
from kdcache_stores.objects.urls import join, local_path, redact, split_url
from kdcache_stores.read.reader import Store, open_store
from kdcache_stores.read.verifying import verify
from kdcache_stores.share.catalog import announce_store

CONNECTIONS = 8

LOCK = "records/transfer.lock"
"""Held by whoever copies a store into a folder."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull did.

    Args:
        where: the target, without credentials.
        digest: content digest of the store that is there now.
        sent, sent_bytes: objects and bytes transferred.
        skipped: objects that were there already.
    """

    where: str
    digest: str
    sent: int
    sent_bytes: int
    skipped: int


def push_store(
    path: str | os.PathLike[str],
    url: str,
    progress: Progress | None = None,
    take_over: bool = False,
    disk: Disk | None = None,
    expect: str | None = None,
) -> Transfer:
    """Push a store to a folder or URL, and note it in the catalogue there.

    Args:
        path: a sealed store on this disk.
        url: where it shall lie: a path, file://, s3://, gs://, az:// or hf://datasets/...
        progress: called with (bytes done, bytes in all).
        take_over: go on where another push to this place was interrupted that will not be repeated.
        disk: the system calls to write with, where the target is on this disk.
        expect: the content digest that the store must have; `MismatchError` for another one.

    Raises `UnfinishedStore` and `CorruptStore` for a store that is not sealed or not whole,
    `StoreInUse` if other data is there or another push is at work, `RemoteError`.
    """
    local = local_path(path)
    if local is None:
        raise UsageError(f"{redact(str(path))}: only a store on this disk is pushed; pull it first")
    with open_store(local, expect=expect) as store:
        report = verify(store)
        if not report.ok:
            raise CorruptStore(
                f"{store.where} is damaged and is not pushed: {report.problems[0].message}"
            )
        done = _push_to_hub(store, url) if url.startswith("hf://") else None
        if done is None:
            done = _run(_Push(store, _place(url, disk), progress, take_over))
        announce_store(url, store)
    return done


def _place(url: str, disk: Disk | None) -> LocalFiles | Bucket:
    folder = local_path(url)
    if folder is not None:
        return LocalFiles(folder, disk)
    if split_url(url).scheme in ("http", "https"):
        raise UsageError(
            f"{redact(url)}: a web server only serves; push to the folder or bucket behind it"
        )
    return Bucket(url)


def _run(push: _Push) -> Transfer:
    """On a disk one push at a time, which also clears away what a killed one left."""
    if isinstance(push.place, Bucket):
        return push.run()
    with push.place.lock(LOCK, wait=True):
        done = push.run()
        push.place.clean()
        return done


class _Push:
    def __init__(
        self,
        store: Store,
        place: LocalFiles | Bucket,
        progress: Progress | None,
        take_over: bool,
    ) -> None:
        self.store, self.place, self.take_over = store, place, take_over
        self.source = store.source.objects
        self.entries = {k: e for k, e in store.source.entries.items() if e.kind != "card"}
        self.manifest = self.source.get(MANIFEST)
        self.progress = progress or (lambda done, total: None)
        self.total = sum(entry.size for entry in self.entries.values())
        self.done = self.sent = self.sent_bytes = self.skipped = 0
        self.claimed = False

    def run(self) -> Transfer:
        target = self._sealed_target()
        metadata = [entry for entry in self.entries.values() if entry.kind == "metadata"]
        others = [entry for entry in self.entries.values() if entry.kind != "metadata"]
        if target is None:
            self._claim()
            self._send_all(metadata, replace=self.take_over)
            self._send_all(others)
            self._create(MANIFEST, self.manifest)
            self._create(SEAL, self._seal)
        elif self._holds_all(target):
            self.skipped = len(self.entries)
        else:
            self._send_all(others)
            self._grow(metadata)
        self._replace_cards()
        digest = self._verify_target()
        return Transfer(self.place.where, digest, self.sent, self.sent_bytes, self.skipped)

    @property
    def _seal(self) -> bytes:
        return seal_text(sha256(self.manifest))

    # ---- what is there -------------------------------------------------------------------------

    def _sealed_target(self) -> Store | None:
        """The sealed store that is there and of which this one is a growth, or None."""
        if self.place.size(SEAL) is None:
            return None
        from kdcache_stores.objects.remote import open_objects

        url = self.place.url if isinstance(self.place, Bucket) else self.place.root
        target = Store(open_objects(url, 0))
        mine, theirs = self.store, target
        if difference := first_difference(theirs.header.to_dict(), mine.header.to_dict(), "store"):
            if theirs.digest == mine.digest:
                return target  # the same outputs, dumped at another time
            name, present, expected = difference
            raise self._refused(
                f"its {name.removeprefix('store.')} is {present!r:.80}, not {expected!r:.80}"
            )
        for key, entry in target.source.entries.items():
            own = self.entries.get(key)
            if entry.kind in ("shard", "head") and own is not None and own.sha256 != entry.sha256:
                raise self._refused(f"{key} holds other values")
        if not (
            set(theirs.view_range) <= set(mine.view_range)
            or set(mine.view_range) <= set(theirs.view_range)
        ):
            raise self._refused(
                f"it holds the views {_views(theirs)}, this one {_views(mine)}: neither holds all of "
                "the other's"
            )
        return target

    def _holds_all(self, target: Store) -> bool:
        return set(self.store.view_range) <= set(target.view_range)

    def _claim(self) -> None:
        """Take the place with the root, or find that a push of this store took it."""
        if self.place.size(ROOT) is None:
            first = (
                self.place.first_keys(8)
                if isinstance(self.place, Bucket)
                else list(self.place.walk())
            )
            extra = [key for key in first if not (key in (CARD, CROISSANT) or is_leftover(key))]
            if extra and self.place.size(ROOT) is None:  # else another push of it was faster
                raise StoreInUse(
                    f"{self.place.where} holds {extra[0]} and is no store: push to an empty prefix"
                )
        self.claimed = self._create(ROOT, self.source.get(ROOT))

    def _refused(self, why: str) -> StoreInUse:
        return StoreInUse(
            f"{self.place.where} already holds another store: {why}. Push to another place"
        )

    # ---- sending -------------------------------------------------------------------------------

    def _send_all(self, entries: Iterable[Entry], replace: bool = False) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            sending = [pool.submit(self._send, entry, replace) for entry in entries]
            try:
                for entry, future in zip(entries, sending, strict=True):
                    if future.result():
                        self.sent, self.sent_bytes = self.sent + 1, self.sent_bytes + entry.size
                    else:
                        self.skipped += 1
                    self.done += entry.size
                    self.progress(self.done, self.total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _send(self, entry: Entry, replace: bool) -> bool:
        """Whether the object had to be sent."""
        if self._is_equal(entry):
            return self.claimed and entry.key == ROOT  # it was sent to take the place
        data = self.source.get(entry.key)
        if sha256(data) != entry.sha256:
            raise CorruptStore(f"{self.store.where}/{entry.key} changed while it was pushed")
        if replace:
            self.place.put(entry.key, data, replace=True)
            return True
        return self._create(entry.key, data)

    def _is_equal(self, entry: Entry) -> bool:
        """Whether an equal object is there: by the digest noted with it, or by reading it."""
        if isinstance(self.place, Bucket):
            size, noted = self.place.noted(entry.key) or (None, None)
            if noted is not None:
                return (size, noted) == (entry.size, entry.sha256)
        else:
            size = self.place.size(entry.key)
        if size != entry.size:
            return False
        try:
            return sha256(self.place.get(entry.key)) == entry.sha256
        except (FileNotFoundError, CorruptStore):
            return False

    def _create(self, key: str, data: bytes) -> bool:
        """Create an object; one that is there must be equal. Whether it was created."""
        try:
            self.place.put(key, data)
            return True
        except FileExistsError:
            pass
        if self.place.size(key) == len(data) and self.place.get(key) == data:
            return False
        if self.take_over and key not in (ROOT, SEAL):
            self.place.put(key, data, replace=True)
            return True
        raise StoreInUse(
            f"{self.place.where} holds another {key}: another store is there, or its push is at work "
            "or was interrupted. Choose another place; or, if that push will never go on and was of "
            "this same dump, --take-over"
        )

    def _grow(self, metadata: list[Entry]) -> None:
        lock = announcement(sha256(self.manifest), self.store.view_range.stop)
        self._create(ANNOUNCEMENT, lock)
        for entry in metadata:
            if not self._is_equal(entry):
                self.place.put(entry.key, self.source.get(entry.key), replace=True)
        self.place.put(MANIFEST, self.manifest, replace=True)
        self.place.put(SEAL, self._seal, replace=True)
        if announced(self.place.get(ANNOUNCEMENT)) == sha256(self.manifest):
            self.place.remove(ANNOUNCEMENT)

    def _replace_cards(self) -> None:
        for key in (CARD, CROISSANT):
            if self.source.size(key) is not None:
                self.place.put(key, self.source.get(key), replace=True)

    def _verify_target(self) -> str:
        """Read the store's metadata back, and compare every object's size and noted digest."""
        from kdcache_stores.objects.remote import open_objects

        url = self.place.url if isinstance(self.place, Bucket) else self.place.root
        with Store(open_objects(url, 0)) as target, ThreadPoolExecutor(CONNECTIONS) as pool:
            entries = [e for e in target.source.entries.values() if e.kind != "card"]
            for entry, fine in zip(entries, pool.map(self._is_equal, entries), strict=True):
                if not fine:
                    raise CorruptStore(f"{self.place.where}/{entry.key} is not what was sent")
            return target.digest


def _push_to_hub(store: Store, url: str) -> Transfer:
    """The Hub takes a store in one commit, and skips what it has by digest itself."""
    from kdcache_stores.objects.remote import RemoteFiles

    objects = RemoteFiles(url, 0)
    try:
        with Store(objects) as target:
            if target.digest == store.digest:
                return Transfer(target.where, target.digest, 0, 0, len(store.source.entries))
            if first_difference(target.header.identity, store.header.identity, "store") or (
                target.view_digests != store.view_digests[: target.n_views]
            ):
                raise StoreInUse(
                    f"{target.where} already holds another store: push to another place"
                )
    except UnfinishedStore:
        raise StoreInUse(
            f"{redact(url)} holds an unfinished store: push to another place"
        ) from None
    except StoreNotFound:
        folders, files = hub.children(url)
        extra = [name for name in (*folders, *files) if name not in (".gitattributes", CARD)]
        if extra:
            raise StoreInUse(
                f"{redact(url)} holds {extra[0]} and is no store: push to an empty folder"
            ) from None
    root = Path(store.where)
    keys = [*store.source.entries, MANIFEST, SEAL]
    keys += [key for key in (CARD, CROISSANT) if key not in keys and (root / key).exists()]
    hub.commit(url, {key: join(store.where, key) for key in keys}, f"Store {store.digest[:12]}")
    with Store(RemoteFiles(url, 0)) as target:
        if target.digest != store.digest:
            raise CorruptStore(f"{target.where} is not what was sent")
        return Transfer(target.where, target.digest, len(keys), store.nbytes, 0)


def _views(store: Store) -> str:
    return f"{store.view_range.start} to {store.view_range.stop - 1}"

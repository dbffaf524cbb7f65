"""Pulling a store, or some of its views, to this disk: what is missing here, checked, the seal last."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from kdcache_stores.errors import CorruptStore, FormatError, StoreInUse, UsageError
from kdcache_stores.format.head import head_documents
from kdcache_stores.format.manifest import (
    ANNOUNCEMENT,
    CARD,
    CROISSANT,
    MANIFEST,
    RECORDS,
    ROOT,
    SEAL,
    Entry,
    Part,
    sha256,
    write_manifest,
)
from kdcache_stores.format.records import announcement, is_of_a_dump, write_probes
from kdcache_stores.objects.files import Disk, LocalFiles, is_leftover
from kdcache_stores.objects.urls import local_path, redact
from kdcache_stores.read.reader import Store, open_store
from kdcache_stores.read.verifying import verify
from kdcache_stores.share.push import LOCK, Progress, Transfer
from kdcache_stores.write.sealing import finish_seal

CONNECTIONS = 8


def pull_store(
    url: str | os.PathLike[str],
    path: str | os.PathLike[str],
    views: tuple[int, int] | None = None,
    progress: Progress | None = None,
    disk: Disk | None = None,
    expect: str | None = None,
) -> Transfer:
    """Fetch a store, or the views `views[0]` to `views[1]` - 1 of it, as a valid store.

    Args:
        url: a store, sealed: a path or a URL.
        path: folder; empty, or with an interrupted pull or fewer views of the same store.
        views: which; None for all. The views keep their numbers, the manifest says of what they are a
            part, and the digests of the views are those of the whole.
        progress: called with (bytes done, bytes in all).
        disk: the system calls to write with.
        expect: the content digest that the store at `url` must have.

    Everything is checked against the manifest, again after the last object was written. Raises
    `MismatchError` for another digest,
    `StoreInUse` if the folder holds something else, `UsageError` for views that there are not,
    `CorruptStore`, `RemoteError`.
    """
    folder = local_path(path)
    if folder is None:
        raise UsageError(f"{redact(str(path))}: a store is pulled to this disk; push it from here")
    with open_store(url, expect=expect, cache_size=0) as store:
        held = store.view_range
        chosen = range(*views) if views is not None else held
        if not len(chosen) or chosen[0] not in held or chosen[-1] not in held:
            raise UsageError(
                f"{store.where} holds the views {held.start}:{held.stop}, asked for "
                f"{chosen.start}:{chosen.stop}"
            )
        pull = _Pull(store, LocalFiles(folder, disk), chosen, progress)
        with pull.files.lock(LOCK):
            sent, sent_bytes, skipped = pull.run()
    with Store(pull.files) as made:
        report = verify(made)
        if not report.ok:
            raise CorruptStore(
                f"{made.where} is damaged after the pull: {report.problems[0].message}. Pull it again"
            )
        return Transfer(made.where, made.digest, sent, sent_bytes, skipped)


class _Pull:
    def __init__(
        self, store: Store, files: LocalFiles, views: range, progress: Progress | None
    ) -> None:
        self.store, self.files, self.views = store, files, views
        self.progress = progress or (lambda done, total: None)
        self.sent = self.sent_bytes = self.skipped = 0

    def run(self) -> tuple[int, int, int]:
        fetched, made = self._plan()
        entries = {entry.key: entry for entry in fetched}
        entries |= {key: entry for key, (entry, _) in made.items()}
        manifest = write_manifest(entries.values(), self._part())
        if self._is_here(manifest):
            self._restore(fetched, made)
        else:
            self._claim()
            self._fetch_all(entry for entry in fetched if entry.key != ROOT)
            # From here on as a growth goes: whoever reads what was here before still can.
            announced = announcement(sha256(manifest), self.views.stop)
            self.files.put(ANNOUNCEMENT, announced, replace=True)
            for key, (_, data) in made.items():
                self.files.put(key, data, replace=True)
            self.files.put(MANIFEST, manifest, replace=True)
        # Also where an earlier pull stopped here: what it had yet to do is done.
        for key in list(self.files.walk("probes")):
            if key not in entries and not is_leftover(key):
                self.files.remove(key)
        self._fetch_cards()
        finish_seal(self.files, sha256(manifest))
        return self.sent, self.sent_bytes, self.skipped

    # ---- what it shall hold --------------------------------------------------------------------

    def _part(self) -> Part | None:
        store, views = self.store, self.views
        if views == store.view_range:
            return store.part
        whole = store.part
        of = (whole.of, whole.views) if whole is not None else (store.digest, store.n_views)
        return Part(views.start, views.stop, *of)

    def _plan(self) -> tuple[list[Entry], dict[str, tuple[Entry, bytes]]]:
        """The entries taken over as they are, and the objects made here: (entry, bytes) by key."""
        entries = [e for e in self.store.source.entries.values() if e.kind != "card"]
        if self.views == self.store.view_range:
            metadata = [e for e in entries if e.kind == "metadata" and e.key != ROOT]
            made = {e.key: (e, self.store.source.get(e.key)) for e in metadata}
            return [e for e in entries if e.key not in made], made
        fetched = [e for e in entries if e.key == ROOT or e.kind in ("samples", "once", "head")]
        fetched += [e for e in entries if e.kind == "shard" and e.view in self.views]
        documents = {f.metadata_key: f.document() for f in self.store.fields.values()}
        for layouts in self.store.layouts.values():
            documents |= {a.metadata_key: a.grown(self.views.stop).document() for a in layouts}
        if (head := self.store.header.head) is not None:
            documents |= head_documents(head)
        made = {key: (_entry(key, data, "metadata"), data) for key, data in documents.items()}
        probes = [probe for probe in self.store.probes if probe.view in self.views]
        if probes:
            key, data = f"probes/{self.views.start}-{self.views.stop}.parquet", write_probes(probes)
            made[key] = _entry(key, data, "probes"), data
        return fetched, made

    def _is_here(self, manifest: bytes) -> bool:
        """Whether the folder holds this very store, sealed, however damaged its other objects are."""
        files = self.files
        if any(files.size(key) is None for key in (ROOT, SEAL, MANIFEST)):
            return False
        return files.get(ROOT) == self.store.source.get(ROOT) and files.get(MANIFEST) == manifest

    def _claim(self) -> None:
        """See that the folder is empty, an interrupted pull, or a sealed store of which this is a growth."""
        files, root = self.files, self.store.source.get(ROOT)
        if files.size(ROOT) is None:
            extra = [key for key in files.walk() if not is_leftover(key)]
            if extra:
                raise StoreInUse(f"{files.where} holds {extra[0]}: pull into an empty folder")
            files.put(ROOT, root)
        elif files.get(ROOT) != root:
            raise StoreInUse(f"{files.where} holds another store: pull into an empty folder")
        if files.size(SEAL) is None:
            if any(map(is_of_a_dump, files.walk(RECORDS))):
                raise StoreInUse(
                    f"{files.where} holds an unfinished dump: pull into an empty folder"
                )
            return
        present = Store(files)
        if not set(present.view_range) <= set(self.views):
            raise StoreInUse(
                f"{files.where} holds the views {present.view_range.start}:{present.view_range.stop}; pull "
                "at least those, or into an empty folder"
            )

    # ---- fetching ------------------------------------------------------------------------------

    def _fetch_all(self, chosen: Iterable[Entry]) -> None:
        entries = list(chosen)
        total, done = sum(entry.size for entry in entries), 0
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            coming = [pool.submit(self._fetch, entry) for entry in entries]
            try:
                for entry, future in zip(entries, coming, strict=True):
                    if future.result():
                        self.sent, self.sent_bytes = self.sent + 1, self.sent_bytes + entry.size
                    else:
                        self.skipped += 1
                    done += entry.size
                    self.progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _fetch(self, entry: Entry) -> bool:
        """Whether the object had to be fetched."""
        source = self.store.source
        files = self.files
        if files.size(entry.key) == entry.size and sha256(files.get(entry.key)) == entry.sha256:
            return False
        self.files.put(entry.key, source.get(entry.key), replace=True)
        return True

    def _restore(self, fetched: Iterable[Entry], made: dict[str, tuple[Entry, bytes]]) -> None:
        """Fetch what a whole copy of this very store has lost, or holds damaged."""
        self._fetch_all(entry for entry in fetched if entry.key != ROOT)
        for key, (entry, data) in made.items():
            if self.files.size(key) == entry.size and sha256(self.files.get(key)) == entry.sha256:
                self.skipped += 1
            else:
                self.files.put(key, data, replace=True)
                self.sent, self.sent_bytes = self.sent + 1, self.sent_bytes + entry.size
        self.skipped += 1  # the root, by which it is this store

    def _fetch_cards(self) -> None:
        """The pages for people describe the whole store, so a part goes without."""
        if self.views != self.store.view_range:
            return
        for key in (CARD, CROISSANT):
            try:
                data = self.store.source.objects.get(key)
            except (FileNotFoundError, FormatError):
                continue
            self.files.put(key, data, replace=True)


def _entry(key: str, data: bytes, kind: str) -> Entry:
    return Entry(key, len(data), sha256(data), kind)

"""Verification: every object of a store against the manifest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import CorruptStore, KDCacheError, StoreError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.header import HEAD
from kdcache_stores.format.layout import ArrayLayout, each_shard
from kdcache_stores.format.manifest import CARD, CROISSANT, MANIFEST, SAMPLES, SEAL, Entry
from kdcache_stores.format.shards import ShardReader
from kdcache_stores.objects.files import LocalFiles, is_temporary
from kdcache_stores.read.decode import check_rows, cores
from kdcache_stores.read.reader import Store
from kdcache_stores.read.sealed_objects import SealedObjects
from kdcache_stores.types import Samples, Shard

Progress = Callable[[int, int], None]
"""Called with (bytes checked, bytes in all)."""


@dataclass(frozen=True)
class Problem:
    """One damaged object: its key, what is wrong, and for a shard its view and rows."""

    key: str
    message: str
    view: int | None = None
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What verification found.

    Args:
        where: the store.
        digest: its content digest.
        objects, nbytes: how much was checked.
        problems: damaged objects, by key.
        rewrite: (view, start, stop) of the shards that a repairing dump would write again.
        notes: what is no damage but should not be there: temporary files, unknown objects.
    """

    where: str
    digest: str
    objects: int
    nbytes: int
    problems: list[Problem] = field(default_factory=list)
    rewrite: list[tuple[int, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every object is what was written."""
        return not self.problems

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON."""
        return {**asdict(self), "ok": self.ok, "rewrite": [list(shard) for shard in self.rewrite]}


def verify(store: Store, progress: Progress | None = None) -> VerifyReport:
    """Check size and SHA-256 of every object, the samples against the plan, probes, head.

    Every row is decoded as well: what the format calls invalid is a problem, whatever its SHA-256.
    Each object is read once. A core works on one shard of one field at a time, and keeps nothing of it.

    Args:
        store: an open store.
        progress: called with (bytes checked, bytes in all).

    A store whose manifest or metadata is damaged raises already when it is opened.
    """
    source = store.source
    entries = [entry for entry in source.entries.values() if entry.kind != "card"]
    total = sum(entry.size for entry in entries)
    report = VerifyReport(store.where, store.digest, len(entries), total)
    done = 0
    for nbytes, problems in _checked(store, entries):
        report.problems.extend(problems)
        done += nbytes
        if progress is not None:
            progress(done, total)
    damaged = {problem.key.split("/")[0] for problem in report.problems}
    contents = ((SAMPLES, _check_samples), ("probes", require_probes), (HEAD, _check_head))
    for key, check_content in contents:
        message = _message(lambda: check_content(store))  # noqa: B023
        if message is not None and key not in damaged:
            report.problems.append(Problem(key, message))
    report.rewrite.extend(_lost(source, {problem.key for problem in report.problems}))
    report.problems.sort(key=lambda problem: problem.key)
    report.notes.extend(_extra_files(source))
    return report


_Checked = tuple[int, list[Problem]]
"""How many bytes were checked, and what is wrong with them."""


def _checked(store: Store, entries: Sequence[Entry]) -> Iterator[_Checked]:
    """Check the objects of no array first, then shard by shard: its views side by side, on all cores."""
    layouts = [layout for arrays in store.layouts.values() for layout in arrays]
    # What a shard's views share lies beside its first view.
    runs = [
        [replace(first, view=view) for view in store.view_range]
        for first in each_shard(range(1), len(store), store.shard_rows)
    ]
    arrays = dict.fromkeys(
        layout.key(shard.view, shard.index)
        for run in runs
        for shard in run
        for layout in sorted(layouts, key=lambda layout: layout.spec.per == "row")
    )
    others = [entry for entry in entries if entry.key not in arrays]
    store.source.objects.prefetch([*(entry.key for entry in others), *arrays])
    growing = store.source.announced() is not None
    for entry in others:
        if growing and entry.kind == "metadata":
            yield entry.size, []  # checked when the store was opened; a growth may be replacing it
        else:
            yield _read(store.source, entry)[1]
    labels = store.labels if _message(lambda: store.labels) is None else None
    shared: dict[str, ShardReader | None] = {}
    waiting: deque[Future[_Checked]] = deque()
    with ThreadPoolExecutor(cores()) as pool:
        for run in runs:
            shared = {key: item for key, item in shared.items() if item is None or item.per_store}
            for layout in layouts:
                key = layout.key(0, run[0].index)
                if layout.spec.per != "row" and key not in shared:
                    shared[key], checked = _reader(store, layout, run[0])
                    yield checked
            for shard in run:
                waiting.append(pool.submit(_check_shard, store, shard, shared, labels))
                if len(waiting) > 2 * cores():
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(source: SealedObjects, entry: Entry) -> tuple[bytes | None, _Checked]:
    """An object; None if it is not what the manifest says."""
    try:
        data, stamp = source.load(entry.key)
        source.confirm(entry.key, data, stamp)
    except KDCacheError as error:
        place = (entry.view, entry.start, entry.stop)
        return None, (entry.size, [Problem(entry.key, str(error), *place)])
    return data, (entry.size, [])


def _reader(store: Store, layout: ArrayLayout, shard: Shard) -> tuple[ShardReader | None, _Checked]:
    """An array's part of a shard; None if it is damaged."""
    entry = store.source.entry(layout.key(shard.view, shard.index))
    data, (nbytes, problems) = _read(store.source, entry)
    if data is None:
        return None, (nbytes, problems)
    try:
        return ShardReader(layout, data, f"{store.where}/{entry.key}"), (nbytes, [])
    except CorruptStore as error:
        place = (entry.view, entry.start, entry.stop)
        return None, (nbytes, [Problem(entry.key, str(error), *place)])


def _check_shard(
    store: Store,
    shard: Shard,
    shared: Mapping[str, ShardReader | None],
    labels: NDArray[np.int64] | None,
) -> _Checked:
    """Check a shard's objects and, where all of a field and its labels are sound, the field's rows."""
    total, problems = 0, []
    for name, layouts in store.layouts.items():
        readers: dict[str, ShardReader | None] = {}
        for layout in layouts:
            if layout.spec.per == "row":
                readers[layout.spec.name], (nbytes, damage) = _reader(store, layout, shard)
                total += nbytes
                problems += damage
            else:
                readers[layout.spec.name] = shared[layout.key(0, shard.index)]
        sound = {key: reader for key, reader in readers.items() if reader is not None}
        if len(sound) < len(readers) or labels is None:
            continue
        own = labels[shard.start : shard.stop]
        message = _message(lambda: _check_rows(store, shard, name, sound, own))  # noqa: B023
        if message is not None:
            key = layouts[0].key(shard.view, shard.index)
            problems.append(Problem(key, message, shard.view, shard.start, shard.stop))
    return total, problems


def _check_rows(
    store: Store,
    shard: Shard,
    name: str,
    readers: dict[str, ShardReader],
    labels: NDArray[np.int64],
) -> None:
    """Decode all rows of a field in a shard, and check what decoding does not need."""
    field, layouts = store.fields[name], store.layouts[name]
    check_rows(readers, layouts, field.encoding, field.shape, shard, labels)
    stated = store.source.entry(layouts[0].key(shard.view, shard.index)).labelled
    if stated is not None and stated != (counted := int((labels >= 0).sum())):
        raise CorruptStore(
            f"{store.where}: the manifest counts {stated} labelled rows in {shard}, there are {counted}"
        )


def _lost(source: SealedObjects, damaged: set[str]) -> list[tuple[int, int, int]]:
    """The shards that are damaged, or were encoded with a shared object that is."""
    entries = [source.entries[key] for key in damaged if key in source.entries]
    shared = {entry.index for entry in entries if entry.kind == "once"}
    lost = {
        (entry.view or 0, entry.start or 0, entry.stop or 0)
        for entry in source.entries.values()
        if entry.kind == "shard" and (entry.key in damaged or shared & {None, entry.index})
    }
    return sorted(lost)


def _message(check: Callable[[], object]) -> str | None:
    try:
        check()
    except KDCacheError as error:
        return str(error)
    return None


def _check_samples(store: Store) -> None:
    fingerprint = Samples(store.keys, store.labels, store.keys_hashed).fingerprint
    if fingerprint != store.plan.fingerprint:
        raise CorruptStore(
            f"{store.where}/{SAMPLES}: keys and labels give the fingerprint {fingerprint}, "
            f"the plan says {store.plan.fingerprint}"
        )


def require_probes(store: Store) -> None:
    """Raise `CorruptStore` for a probe of a row or view that the store does not hold."""
    for probe in store.probes:
        if not (0 <= probe.row < len(store) and probe.view in store.view_range):
            raise CorruptStore(f"{store.where}: a probe of row {probe.row}, view {probe.view}")


def _check_head(store: Store) -> None:
    _ = store.head  # raises unless it is finite


def _extra_files(source: SealedObjects) -> list[str]:
    """What lies in the folder beside the store's objects, one sentence each."""
    if not isinstance(source.objects, LocalFiles):
        return []
    known = {*source.entries, MANIFEST, SEAL, CARD, CROISSANT}
    notes = []
    try:
        for key in source.objects.walk():
            if is_temporary(key):
                notes.append(f"{key} was left by an interrupted writer and may be deleted")
            elif key not in known:
                notes.append(f"{key} is not in the manifest and is never read")
    except StoreError as error:  # a folder that cannot be listed holds nothing of the store
        notes.append(str(error))
    return notes

"""Verification: every object of a store against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from kdcache_stores.errors import CorruptStore, KDCacheError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.header import HEAD
from kdcache_stores.format.layout import each_shard
from kdcache_stores.format.manifest import CARD, CROISSANT, MANIFEST, SAMPLES, SEAL, Entry
from kdcache_stores.objects.files import LocalFiles, is_temporary
from kdcache_stores.read.decode import check_shard, cores
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
    """Check size and SHA-256 of every object on all cores, the samples against the plan, probes, head.

    Every row is decoded as well: what the format calls invalid is a problem, whatever its SHA-256.

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
    growing = source.announced() is not None
    source.objects.prefetch(entry.key for entry in entries)
    with ThreadPoolExecutor(cores()) as pool:

        def check(entry: Entry) -> str | None:
            if growing and entry.kind == "metadata":
                return None  # checked when the store was opened; a growth may be replacing it
            return _message(lambda: source.confirm(entry.key, *source.load(entry.key)))

        for entry, message in zip(entries, pool.map(check, entries), strict=True):
            if message is not None:
                place = (entry.view, entry.start, entry.stop)
                report.problems.append(Problem(entry.key, message, *place))
            done += entry.size
            if progress is not None:
                progress(done, total)
    broken = {problem.key for problem in report.problems}
    for shard in _sound_shards(store, broken) if _message(lambda: store.labels) is None else ():
        report.problems.extend(_invalid(store, shard))
    damaged = {problem.key.split("/")[0] for problem in report.problems}
    contents = ((SAMPLES, _check_samples), ("probes", _check_probes), (HEAD, _check_head))
    for key, check_content in contents:
        message = _message(lambda: check_content(store))  # noqa: B023
        if message is not None and key not in damaged:
            report.problems.append(Problem(key, message))
    report.rewrite.extend(_lost(source, {problem.key for problem in report.problems}))
    report.problems.sort(key=lambda problem: problem.key)
    report.notes.extend(_extra_files(source))
    return report


def _sound_shards(store: Store, damaged: set[str]) -> Iterator[Shard]:
    """The shards of which all objects are what was written, and may still break the format."""
    shared = {store.source.entries[key].index for key in damaged if _is_shared(store, key)}
    lost = {
        (entry.view, entry.index)
        for key in damaged
        if (entry := store.source.entries[key]).kind == "shard"
    }
    for shard in each_shard(store.view_range, len(store), store.shard_rows):
        if (shard.view, shard.index) not in lost and not shared & {None, shard.index}:
            yield shard


def _is_shared(store: Store, key: str) -> bool:
    return store.source.entries[key].kind == "once"


def _invalid(store: Store, shard: Shard) -> Iterator[Problem]:
    """What of a shard breaks the format though its bytes are those that the manifest states."""
    for name in store.fields:
        key = store.layouts[name][0].key(shard.view, shard.index)
        message = _message(lambda: _check_rows(store, shard, name))  # noqa: B023
        if message is not None:
            yield Problem(key, message, shard.view, shard.start, shard.stop)


def _check_rows(store: Store, shard: Shard, name: str) -> None:
    """Decode all rows of a shard, a chunk at a time, and check what decoding does not need."""
    field, layouts = store.fields[name], store.layouts[name]
    labels = store.labels[shard.start : shard.stop]
    check_shard(store.source, shard, layouts, field.encoding, field.shape, labels)
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


def _check_probes(store: Store) -> None:
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
    for key in source.objects.walk():
        if is_temporary(key):
            notes.append(f"{key} was left by an interrupted writer and may be deleted")
        elif key not in known:
            notes.append(f"{key} is not in the manifest and is never read")
    return notes

"""Verification: every object of a store against the manifest, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from kdcache_stores.canonical import Json
from kdcache_stores.errors import KDCacheError
from kdcache_stores.manifest import Entry

if TYPE_CHECKING:
    from kdcache_stores.reader import LogitStore

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
class Report:
    """What verification found.

    Args:
        where: the store.
        digest: its content digest.
        objects, nbytes: how much was checked.
        problems: damaged objects, by key.
        notes: what is no damage but should not be there: temporary files, unknown objects.
    """

    where: str
    digest: str
    objects: int
    nbytes: int
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every object is what was written."""
        return not self.problems

    @property
    def rewrite(self) -> list[tuple[int, int, int]]:
        """(view, start, stop) of the shards that a repairing dump would rewrite, sorted."""
        shards = {(p.view, p.start, p.stop) for p in self.problems if p.view is not None}
        return sorted(
            (view, start or 0, stop or 0) for view, start, stop in shards if view is not None
        )

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON."""
        return {**asdict(self), "ok": self.ok, "rewrite": [list(shard) for shard in self.rewrite]}


def verify_store(store: LogitStore, progress: Progress | None = None) -> Report:
    """Check size and SHA-256 of every object, and that samples, probes and digests agree.

    A store that cannot be opened at all raises when it is opened; this finds the rest.
    """
    entries = [entry for entry in store.entries.values() if entry.kind != "card"]
    total = sum(entry.size for entry in entries)
    report = Report(store.where, store.digest, len(entries), total)
    done = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for entry, message in zip(entries, pool.map(store.check, entries), strict=True):
            if message is not None:
                report.problems.append(_problem(entry, message))
            done += entry.size
            if progress is not None:
                progress(done, total)
    for what, check in (("samples.parquet", store.check_samples), ("probes", lambda: store.probes)):
        try:
            check()
        except KDCacheError as error:
            if not any(problem.key.startswith(what) for problem in report.problems):
                report.problems.append(Problem(what, str(error)))
    report.problems.sort(key=lambda problem: problem.key)
    report.notes.extend(store.strangers())
    return report


def _problem(entry: Entry, message: str) -> Problem:
    return Problem(entry.key, message, entry.view, entry.start, entry.stop)

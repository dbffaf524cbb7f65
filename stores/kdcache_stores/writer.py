"""Writing a store: shard by shard, each committed for good, resumed, sealed last."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.begin import begin, ensure_metadata, make_header
from kdcache_stores.canonical import Json
from kdcache_stores.errors import (
    StoreInUse,
    UnfinishedStore,
    UsageError,
)
from kdcache_stores.files import Disk, LocalFiles
from kdcache_stores.header import Field
from kdcache_stores.layout import ArrayLayout
from kdcache_stores.manifest import RECORDS, SEAL, Entry
from kdcache_stores.nouns import FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.once import Once, is_learned, lesson_rows, load_once, publish_learned
from kdcache_stores.outstanding import Outstanding
from kdcache_stores.packing import check_lesson, check_rows, pack
from kdcache_stores.reader import LogitStore
from kdcache_stores.records import Record, record_key
from kdcache_stores.repair import unseal_damaged
from kdcache_stores.sealing import SEALING, finish_seal, seal_store, tidy

_KEPT = ("shard", "once", "probes")
"""Kinds of objects that a growth leaves as they are."""


class StoreWriter:
    """Opens, resumes, grows or repairs a store. A context manager; only `seal` ever seals.

    Args:
        path: folder of the store; made if missing.
        plan: the view plan; its fingerprint must be that of `samples`.
        teacher: whose outputs these are.
        samples: keys and labels, in row order.
        views: how many views the store shall hold; more than a sealed store holds grows it.
        fields: what is stored per row and view, by name.
        config: what a resumed dump must share (batch size, ...), plain JSON.
        provenance: time, command, versions, device: kept, in no digest, compared with nothing.
            "time" is filled in (from SOURCE_DATE_EPOCH, if set).
        shard_rows: rows per shard at most; by default as many as 64 MiB hold.
        hash_keys: publish the SHA-256 of each key instead of the key.
        repair: check every committed byte first; damaged shards are pending again, and the store
            is unfinished until it is sealed anew.
        disk: the system calls to write with.

    Raises `MismatchError` if a store of another plan, teacher, field, encoding or configuration is
    there, `StoreInUse` if the folder holds something else, `DataError` and `UsageError` for
    arguments that do not fit together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        plan: Plan,
        teacher: Teacher,
        samples: Samples,
        views: int,
        fields: Mapping[str, FieldSpec],
        config: Mapping[str, Json] | None = None,
        provenance: Mapping[str, Json] | None = None,
        shard_rows: int | None = None,
        hash_keys: bool = False,
        repair: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self.views = views
        self.samples = samples.hash_keys() if hash_keys else samples
        header = make_header(plan, teacher, self.samples, views, fields, config, provenance,
                             shard_rows)  # fmt: skip
        self.files = files = LocalFiles(path, disk)
        self.header = begin(files, header)
        if repair:
            unseal_damaged(files, header)
        # Looked at before anything is written: what is refused leaves the store as it was.
        self._work = Outstanding(files, self.header, views, shard_rows, thorough=repair)
        if self._work.base is None:
            ensure_metadata(files, self.header, self._work.layouts, self.samples)
        else:
            self._complete_seal(self._work.base)
        self._judged = False

    def _complete_seal(self, base: LogitStore) -> None:
        """The last steps of a seal that was interrupted."""
        if base.source.announced() == base.source.manifest_sha256:
            finish_seal(self.files, base.source.manifest_sha256)
        tidy(self.files, base.n_views)

    @classmethod
    def from_arrays(
        cls,
        path: str | os.PathLike[str],
        arrays: Mapping[str, NDArray[Any]] | NDArray[Any],
        **options: Any,
    ) -> LogitStore:
        """Write arrays that are in memory; see `kdcache_stores.imports.write_arrays`."""
        from kdcache_stores.imports import write_arrays

        return write_arrays(path, arrays, **options)

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return Path(self.files.root)

    @property
    def shards(self) -> list[Shard]:
        """All shards that the store shall hold."""
        return self._work.shards

    @property
    def sealed(self) -> bool:
        """Whether the store is finished, with all of the views asked for."""
        return self._work.sealed

    @property
    def done(self) -> int:
        """How many shards are committed."""
        return len(self.shards) - len(self.pending())

    def pending(self, part: tuple[int, int] = (0, 1)) -> list[Shard]:
        """The shards that are not committed yet.

        Args:
            part: (i, n) restricts the answer to the i-th (from 0) of n disjoint parts of all
                shards, the same whatever is committed already.
        """
        return self._work.pending(part)

    # ---- learning --------------------------------------------------------------------------------

    def _of(self, field: Field) -> list[ArrayLayout]:
        return [layout for layout in self._work.layouts if layout.field == field.name]

    @property
    def learns(self) -> bool:
        """Whether an encoding learns before the first shard, and needs view 0 before others."""
        return self._work.learns

    @property
    def lesson(self) -> NDArray[np.int64] | None:
        """Rows whose outputs `prepare` needs before the first `write`, or None if it needs none."""
        if not self.learns or self.sealed or is_learned(self.files, self._work.layouts):
            return None
        return lesson_rows(len(self.samples), self.header.plan.classes)

    def prepare(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Let the encodings learn from the rows of `lesson`; every writer goes on with the first's.

        Args:
            arrays: per field, float (v, rows, *shape): views 0 and 1 of the rows of `lesson`, or
                view 0 alone where the plan has just one.

        Raises `DataError` if an encoding cannot reach what is asked of it on these rows.
        """
        lesson = lesson_rows(len(self.samples), self.header.plan.classes)
        for name, field in self.header.fields.items():
            if field.learns:
                rows = check_lesson(field, lesson, np.asarray(arrays[name]))
                publish_learned(self.files, field.encoding, self._of(field), rows)

    # ---- writing ---------------------------------------------------------------------------------

    def write(
        self, shard: Shard, arrays: Mapping[str, NDArray[Any]], probes: Sequence[Probe] = ()
    ) -> int:
        """Commit one shard: all of its rows, for every field.

        Args:
            shard: one of `pending()`.
            arrays: per field, float (shard.rows, *shape), finite; kept in the field's encoding.
            probes: proofs of the pixels of some of these rows.

        Returns the bytes of the shard's objects.

        Raises `DataError` for another shape, type or a value that is not finite, and for the first
        shard where the encoding loses what the logits say (`require_faithful`); `StoreInUse` if
        another writer committed this shard with other values, `StoreError` if the disk is full.
        """
        if shard not in self.shards or self._work.is_sealed(shard):
            raise UsageError(f"{shard} is no pending shard of {self.files.where}")
        rows = check_rows(self.header, self.samples, shard, arrays)
        labels = self.samples.labels[shard.start : shard.stop]
        classes = self.header.plan.classes
        objects: dict[str, bytes] = {}
        entries: list[Entry] = []
        for name, field in self.header.fields.items():
            known = self._load_once(field, shard)
            packed = pack(field, self._of(field), shard, rows[name], labels, known, classes,
                          judge=not self._judged)  # fmt: skip
            objects |= packed.objects
            entries += packed.entries
        self._judged = True
        record = Record(shard, tuple(entries), tuple(probes))
        shared = shard.view == 0 and self.learns
        with self.files.lock(f"{RECORDS}/{shard.view}-{shard.index}.lock", wait=shared):
            self._work.records.found[shard] = self._commit(record, objects, shared)
        return sum(map(len, objects.values()))

    def _load_once(self, field: Field, shard: Shard) -> Once:
        """What is kept once and a shard's encoding needs."""
        first = Shard(0, shard.index, shard.start, shard.stop)
        if shard.view > 0 and field.learns and not self._work.is_done(first):
            self._work.records.refresh()  # another rank may have written it meanwhile
            if not self._work.is_done(first):
                raise UsageError(f"{self.files.where}: {first} must be written before {shard}")
        try:
            return load_once(self.files, self._of(field), shard)
        except FileNotFoundError:
            raise UsageError(
                f"{self.files.where}: {field.encoding.name} has not learned yet: call prepare first"
            ) from None

    def _commit(self, record: Record, objects: dict[str, bytes], shared: bool) -> Record:
        """Publish the objects, then the record. Equal orphans are adopted, others replaced.

        Returns the record that holds: of a `shared` shard, which several writers need, the first.
        """
        files = self.files
        if there := self._work.records.look(record.shard):
            if there.entries != record.entries and not shared:
                raise StoreInUse(
                    f"{files.where}: another writer committed {record.shard} with other values; "
                    "give each writer its own part"
                )
            return there
        for key, data in objects.items():
            try:
                files.put(key, data)
            except FileExistsError:
                if files.get(key) != data:
                    files.put(key, data, replace=True)
        files.put(record_key(record.shard), record.document(), replace=True)
        return record

    # ---- sealing ---------------------------------------------------------------------------------

    def seal(self) -> None:
        """Finish the store: the manifest, then its digest, then the records go.

        Raises `UnfinishedStore` if shards are missing.
        """
        if self.sealed:
            return
        with self.files.lock(SEALING, wait=True):  # two at once would clear away each other's files
            self._seal()

    def _seal(self) -> None:
        self._work.records.found.clear()  # look again: every object must still be there
        if missing := self.pending():
            if self._sealed_by_another():
                tidy(self.files, self.views)  # records that this writer added since
                return
            raise UnfinishedStore(
                f"{self.files.where}: {len(missing)} of {len(self.shards)} shards are missing, "
                f"the first is {missing[0]}: write them before sealing"
            )
        entries = self._work.base.source.entries if self._work.base else {}
        kept = {key: entry for key, entry in entries.items() if entry.kind in _KEPT}
        records = [self._work.records.found[s] for s in self.shards if not self._work.is_sealed(s)]
        seal_store(self.files, self.header, self._work.layouts, kept, records)
        self._work.base = LogitStore(self.files)

    def _sealed_by_another(self) -> bool:
        """Whether another writer of this dump has sealed it, and removed the records."""
        if self.files.size(SEAL) is not None:
            self._work.base = LogitStore(self.files)
        return self.sealed

    # ---- context manager -------------------------------------------------------------------------

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaving never seals: what is committed stays, and a later writer resumes."""

    def __repr__(self) -> str:
        return f"<StoreWriter {self.files.where}: {self.views} views of {len(self.samples)}>"

"""Writing a store: shard by shard, each committed for good, resumed, sealed last."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache_stores.errors import StoreInUse, UnfinishedStore, UsageError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.head import check_head, publish_head
from kdcache_stores.format.header import Field
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.format.manifest import RECORDS, SEAL, Entry
from kdcache_stores.format.records import Record, record_key
from kdcache_stores.objects.files import Disk, LocalFiles
from kdcache_stores.read.reader import Store
from kdcache_stores.types import FieldSpec, Plan, Probe, Samples, Shard, StoredTeacher
from kdcache_stores.write.begin import begin, ensure_metadata, make_header
from kdcache_stores.write.fitting import calibration_rows, fit_and_publish
from kdcache_stores.write.outstanding import Outstanding
from kdcache_stores.write.packing import check_rows, pack
from kdcache_stores.write.repair import unseal_damaged
from kdcache_stores.write.sealing import SEALING, finish_seal, seal_store, tidy
from kdcache_stores.write.shared_arrays import Shared, is_published, load_shared

_KEPT = ("shard", "once", "probes", "head")
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
        shard_rows: rows per shard at most, as far as 64 MiB hold them; by default 65,536. A store that
            was begun keeps its own.
        hash_keys: publish the SHA-256 of each key instead of the key.
        repair: check every committed byte first; damaged shards are pending again, and the store
            is unfinished until it is sealed anew.
        head: weight (K, D) and bias (K,) of the teacher's last linear layer, to keep beside the
            fields; `Store.head` gives it back.
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
        teacher: StoredTeacher,
        samples: Samples,
        views: int,
        fields: Mapping[str, FieldSpec],
        config: Mapping[str, Json] | None = None,
        provenance: Mapping[str, Json] | None = None,
        shard_rows: int | None = None,
        hash_keys: bool = False,
        repair: bool = False,
        head: tuple[ArrayLike, ArrayLike] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.views = views
        checked = check_head(head, plan.classes)
        self.samples = samples.hash_keys() if hash_keys else samples
        shape = None if checked is None else (plan.classes, checked[0].shape[1])
        header = make_header(
            plan, teacher, self.samples, views, fields, config, provenance, shard_rows, shape
        )
        self.files = files = LocalFiles(path, disk)
        self.header = begin(files, header)
        if repair:
            unseal_damaged(files, header)
        # Looked at before anything is written: what is refused leaves the store as it was.
        self._work = Outstanding(files, self.header, views, shard_rows, thorough=repair)
        if self._work.base is None:
            ensure_metadata(files, self.header, self._work.layouts, self.samples)
            if checked is not None:
                publish_head(files, checked)
        else:
            self._complete_seal(self._work.base)
        self._head = checked
        self._faithful = False  # whether the encodings were seen to keep the logits

    def _complete_seal(self, base: Store) -> None:
        """The last steps of a seal that was interrupted."""
        if base.source.announced() == base.source.manifest_sha256:
            finish_seal(self.files, base.source.manifest_sha256)
        tidy(self.files, base.n_views)

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

    # ---- fitting ---------------------------------------------------------------------------------

    def _of(self, field: Field) -> list[ArrayLayout]:
        return [layout for layout in self._work.layouts if layout.field == field.name]

    @property
    def needs_view_0(self) -> bool:
        """Whether the shard of view 0 must be written before those of other views of its rows."""
        return self._work.needs_view_0

    @property
    def calibration_rows(self) -> dict[str, NDArray[np.int64]]:
        """Per field whose encoding must be fitted before the first `write`: the rows that `fit` needs.

        Empty where there is nothing to fit, or all of it was fitted already.
        """
        if self.sealed:
            return {}
        return {
            name: rows
            for name, field in self.header.fields.items()
            if (rows := calibration_rows(field, len(self.samples))) is not None
            and not is_published(self.files, self._of(field))
        }

    def fit(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Fit encodings to their calibration rows; every writer goes on with the first one's fit.

        Args:
            arrays: per field, of those in `calibration_rows` one or all, float (v, rows, *shape):
                views 0 and 1 of the rows named there, or view 0 alone where the plan has just one.

        Raises `DataError` for rows that are not these, and if an encoding cannot reach what is asked
        of it on them.
        """
        for name, rows in self.calibration_rows.items():
            if name in arrays:
                field = self.header.fields[name]
                fit_and_publish(self.files, field, self._of(field), rows, np.asarray(arrays[name]))

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
        shard where the encoding loses the differences between logits (`require_faithful`); `StoreInUse` if
        another writer committed this shard with other values, `StoreError` if the disk is full.
        """
        if shard not in self.shards or self._work.is_sealed(shard):
            raise UsageError(f"{shard} is no pending shard of {self.files.where}")
        rows = check_rows(self.header, self.samples, shard, arrays)
        labels = self.samples.labels[shard.start : shard.stop]
        minor = self.header.minor
        objects: dict[str, bytes] = {}
        entries: list[Entry] = []
        for name, field in self.header.fields.items():
            known = self._load_shared(field, shard)
            packed = pack(
                field,
                self._of(field),
                shard,
                rows[name],
                labels,
                known,
                minor,
                self._head,
                faithful=not self._faithful,
            )
            objects |= packed.objects
            entries += packed.entries
        self._faithful = True
        record = Record(shard, tuple(entries), tuple(probes))
        needed = shard.view == 0 and self.needs_view_0
        with self.files.lock(f"{RECORDS}/{shard.view}-{shard.index}.lock", wait=needed):
            self._work.records.committed[shard] = self._commit(record, objects, needed)
        return sum(map(len, objects.values()))

    def _load_shared(self, field: Field, shard: Shard) -> Shared:
        """What a shard's encoding needs of what rows share."""
        layouts = self._of(field)
        first = Shard(0, shard.index, shard.start, shard.stop)
        based = any(layout.spec.per == "sample" for layout in layouts)
        if shard.view > 0 and based and not self._work.is_done(first):
            self._work.records.refresh()  # another rank may have written it meanwhile
            if not self._work.is_done(first):
                raise UsageError(f"{self.files.where}: {first} must be written before {shard}")
        try:
            return load_shared(self.files, layouts, shard)
        except FileNotFoundError:
            raise UsageError(
                f"{self.files.where}: {field.encoding.name} of {field.name} was not fitted yet: call "
                "fit with the outputs of calibration_rows first"
            ) from None

    def _commit(self, record: Record, objects: dict[str, bytes], needed: bool) -> Record:
        """Publish the objects, then the record. Equal orphans are adopted, others replaced.

        Returns the record that holds: of a shard `needed` by several writers, the first.
        """
        files = self.files
        if present := self._work.records.look(record.shard):
            if present.entries != record.entries and not needed:
                raise StoreInUse(
                    f"{files.where}: another writer committed {record.shard} with other values; "
                    "give each writer its own part"
                )
            return present
        for key, data in objects.items():
            files.publish(key, data, replace=True)
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
        self._work.records.committed.clear()  # look again: every object must still be there
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
        records = [
            self._work.records.committed[s] for s in self.shards if not self._work.is_sealed(s)
        ]
        seal_store(self.files, self.header, self._work.layouts, kept, records)
        self._work.base = Store(self.files)

    def _sealed_by_another(self) -> bool:
        """Whether another writer of this dump has sealed it, and removed the records."""
        if self.files.size(SEAL) is not None:
            self._work.base = Store(self.files)
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

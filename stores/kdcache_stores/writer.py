"""Writing a store: shard by shard, each committed for good, resumed, sealed last."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.begin import begin, choose_layouts, ensure_metadata
from kdcache_stores.canonical import Json, plain
from kdcache_stores.encoding import Floats
from kdcache_stores.errors import (
    DataError,
    MismatchError,
    StoreInUse,
    UnfinishedStore,
    UsageError,
)
from kdcache_stores.fidelity import measure_encoding
from kdcache_stores.files import Disk, LocalFiles
from kdcache_stores.header import Field, Header
from kdcache_stores.layout import shards_of
from kdcache_stores.manifest import RECORDS, SEAL, Entry, sha256
from kdcache_stores.nouns import FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.reader import LogitStore
from kdcache_stores.records import Record, RecordBook, record_key
from kdcache_stores.repair import unseal_damaged
from kdcache_stores.sealing import finish_seal, seal_store, tidy
from kdcache_stores.shards import encode_shard


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
        header = Header(
            plan,
            teacher,
            {name: Field.make(name, spec) for name, spec in sorted(fields.items())},
            len(samples),
            "sha256" if self.samples.hashed else "plain",
            plain(dict(config or {}), "config"),
            _with_time(plain(dict(provenance or {}), "provenance")),
        )
        _check_arguments(header, self.samples, views, shard_rows)
        self.files = files = LocalFiles(path, disk)
        self.header = begin(files, header)
        if repair:
            unseal_damaged(files, header)
        self._base = self._open_sealed()
        self._layouts = choose_layouts(files, self.header, views, shard_rows)
        self.shards = shards_of(range(views), len(samples), self._layouts[0].shard_rows)
        if self._base is None:
            ensure_metadata(files, self.header, self._layouts, self.samples)
        self._records = RecordBook(files, self.shards, thorough=repair)
        self._records.refresh()

    def _open_sealed(self) -> LogitStore | None:
        """The sealed store that is there, if one is; a seal that was interrupted is completed."""
        files = self.files
        if files.size(SEAL) is None:
            return None
        base = LogitStore(files)
        if base.first_view:
            raise MismatchError(
                f"{files.where} is a part: it holds the views {base.first_view} to "
                f"{base.view_range.stop - 1}. Dump into another folder, or pull more views"
            )
        if base.n_views > self.views:
            raise MismatchError(
                f"{files.where} is sealed with {base.n_views} views, this dump asks for "
                f"{self.views}: stores only grow"
            )
        if base.source.announced() == base.source.manifest_sha256:
            finish_seal(files, base.source.manifest_sha256)
        tidy(files, base.n_views)
        return base

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
    def sealed(self) -> bool:
        """Whether the store is finished, with all of the views asked for."""
        return self._base is not None and self._base.n_views == self.views

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
        index, parts = part
        if not 0 <= index < parts:
            raise UsageError(f"part must be (i, n) with 0 <= i < n, found {part}")
        if self.sealed:
            return []
        self._records.refresh()
        return [shard for shard in self.shards[index::parts] if not self._is_done(shard)]

    def _is_done(self, shard: Shard) -> bool:
        return shard in self._records.found or self._is_sealed(shard)

    def _is_sealed(self, shard: Shard) -> bool:
        return self._base is not None and shard.view < self._base.n_views

    # ---- writing ---------------------------------------------------------------------------------

    def write(
        self, shard: Shard, arrays: Mapping[str, NDArray[Any]], probes: Sequence[Probe] = ()
    ) -> None:
        """Commit one shard: all of its rows, for every field.

        Args:
            shard: one of `pending()`.
            arrays: per field, float (shard.rows, *shape), finite; kept in the field's encoding.
            probes: proofs of the pixels of some of these rows.

        Raises `DataError` for another shape, type or a value that is not finite, `StoreInUse` if
        another writer committed this shard with other values, `StoreError` if the disk is full.
        """
        if shard not in self.shards or self._is_sealed(shard):
            raise UsageError(f"{shard} is no pending shard of {self.files.where}")
        rows = self._check_rows(shard, arrays)
        labels = self.samples.labels[shard.start : shard.stop]
        objects: dict[str, bytes] = {}
        entries: list[Entry] = []
        for name, field in self.header.fields.items():
            encoded = _encode(field, rows[name], labels, shard)
            measures = self._measure(field, rows[name], labels)
            for layout in (layout for layout in self._layouts if layout.field == name):
                key = layout.key(shard.view, shard.index)
                data = encode_shard(layout, encoded[layout.spec.name])
                place = vars(shard)
                entries.append(Entry(key, len(data), sha256(data), "shard", **place, **measures))
                objects[key], measures = data, {}
        record = Record(shard, tuple(entries), tuple(probes))
        with self.files.lock(f"{RECORDS}/{shard.view}-{shard.index}.lock"):
            self._commit(record, objects)
        self._records.found[shard] = record

    def _check_rows(self, shard: Shard, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        fields = self.header.fields
        if arrays.keys() != fields.keys():
            raise DataError(f"expected the fields {sorted(fields)}, found {sorted(arrays)}")
        result = {}
        for name, field in fields.items():
            values = np.asarray(arrays[name])
            expected = (shard.rows, *field.shape)
            if values.shape != expected or values.dtype.kind != "f":
                raise DataError(
                    f"{name} of {shard} must be floats {expected}, "
                    f"found {values.dtype} {values.shape}"
                )
            with np.errstate(over="ignore"):
                rows = np.ascontiguousarray(values, dtype=np.float32)
            if not np.isfinite(rows).all():
                row = shard.start + int(np.argwhere(~np.isfinite(rows))[0][0])
                raise DataError(
                    f"{name} of view {shard.view}, row {row} (key {self.samples.keys[row]!r}) "
                    "is not finite in float32: a store holds finite values only"
                )
            result[name] = rows
        return result

    def _measure(self, field: Field, rows: Floats, labels: NDArray[np.int64]) -> dict[str, Any]:
        if field.shape != (self.header.plan.classes,):
            return {}
        known = labels >= 0
        return {
            "labelled": int(known.sum()),
            "correct": int((rows.argmax(axis=1)[known] == labels[known]).sum()),
            "fidelity": measure_encoding(field.encoding, rows, labels),
        }

    def _commit(self, record: Record, objects: dict[str, bytes]) -> None:
        """Publish the objects, then the record. Equal orphans are adopted, others replaced."""
        files = self.files
        if there := self._records.look(record.shard):
            if there.entries != record.entries:
                raise StoreInUse(
                    f"{files.where}: another writer committed {record.shard} with other values; "
                    "give each writer its own part"
                )
            return
        for key, data in objects.items():
            try:
                files.put(key, data)
            except FileExistsError:
                if files.get(key) != data:
                    files.put(key, data, replace=True)
        files.put(record_key(record.shard), record.document(), replace=True)

    # ---- sealing ---------------------------------------------------------------------------------

    def seal(self) -> None:
        """Finish the store: the manifest, then its digest, then the records go.

        Raises `UnfinishedStore` if shards are missing.
        """
        if self.sealed:
            return
        self._records.found.clear()  # look again: every object must still be there
        if missing := self.pending():
            raise UnfinishedStore(
                f"{self.files.where}: {len(missing)} of {len(self.shards)} shards are missing, "
                f"the first is {missing[0]}: write them before sealing"
            )
        entries = self._base.source.entries if self._base else {}
        kept = {key: entry for key, entry in entries.items() if entry.kind in ("shard", "probes")}
        records = [self._records.found[s] for s in self.shards if not self._is_sealed(s)]
        seal_store(self.files, self.header, self._layouts, kept, records)
        self._base = LogitStore(self.files)

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


def _encode(
    field: Field, rows: Floats, labels: NDArray[np.int64], shard: Shard
) -> dict[str, NDArray[Any]]:
    """Encode a few megabytes of rows at a time: encodings work in float64."""
    step = max(1, 2**22 // math.prod(field.shape))
    try:
        parts = [
            field.encoding.encode(rows[start : start + step], labels[start : start + step])
            for start in range(0, len(rows), step)
        ]
    except DataError as error:
        raise DataError(f"{field.name} of {shard}: {error}") from None
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_arguments(header: Header, samples: Samples, views: int, shard_rows: int | None) -> None:
    if views < 1 or len(samples) < 1 or (shard_rows is not None and shard_rows < 1):
        raise UsageError("views, samples and shard_rows must be at least 1")
    if not header.fields:
        raise UsageError("a store needs at least one field")
    if header.plan.fingerprint != samples.fingerprint:
        raise MismatchError(
            f"plan.fingerprint is {header.plan.fingerprint}, but these samples (keys, labels, row "
            f"order) have {samples.fingerprint}: both must be of one dataset"
        )
    if header.plan.classes != header.teacher.classes:
        raise MismatchError(
            f"the plan has {header.plan.classes} classes, the teacher {header.teacher.classes}"
        )
    if (highest := int(samples.labels.max())) >= header.plan.classes:
        raise DataError(f"label {highest} is not below {header.plan.classes} classes")


def _with_time(provenance: dict[str, Json]) -> dict[str, Json]:
    if "time" in provenance:
        return provenance
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return {**provenance, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))}

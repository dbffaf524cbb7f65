"""Writing a store: shard by shard, each committed for good, resumed, sealed last."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.canonical import Json, first_difference, parse_json, plain
from kdcache_stores.errors import (
    CorruptStore,
    DataError,
    FormatError,
    MismatchError,
    StoreInUse,
    UnfinishedStore,
    UsageError,
)
from kdcache_stores.fidelity import measure_encoding
from kdcache_stores.files import Disk, LocalFiles, is_temporary
from kdcache_stores.header import Field, Header, read_header
from kdcache_stores.layout import ArrayLayout, choose_shard_rows, read_layout, shards_of
from kdcache_stores.manifest import (
    ANNOUNCEMENT,
    CARD,
    MANIFEST,
    RECORDS,
    ROOT,
    SAMPLES,
    SEAL,
    Entry,
    seal_text,
    sha256,
    write_manifest,
)
from kdcache_stores.nouns import FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.reader import LogitStore, read_samples, write_samples
from kdcache_stores.records import (
    Record,
    announcement,
    probes_key,
    read_record,
    record_key,
    write_probes,
)
from kdcache_stores.shards import encode_shard

_RECORD = re.compile(rf"{RECORDS}/(\d{{1,9}})-(\d{{1,9}})\.json")


class StoreWriter:
    """Opens, resumes or grows a store. A context manager; only `seal` ever seals.

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
        disk: Disk | None = None,
    ) -> None:
        self.views = views
        self.samples = samples.hash_keys() if hash_keys else samples
        self._header = Header(
            plan,
            teacher,
            {name: Field.make(name, spec) for name, spec in sorted(fields.items())},
            len(samples),
            "sha256" if self.samples.hashed else "plain",
            plain(dict(config or {}), "config"),
            _with_time(plain(dict(provenance or {}), "provenance")),
        )
        self._check_arguments(shard_rows)
        self._files = LocalFiles(path, disk)
        self._base: LogitStore | None = None
        self._records: dict[Shard, Record] = {}
        self._open(shard_rows)

    # ---- the state of the store ------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return Path(self._files.root)

    @property
    def sealed(self) -> bool:
        """Whether the store is finished, with all of the views asked for."""
        return self._base is not None and self._base.n_views == self.views

    @property
    def shards(self) -> list[Shard]:
        """All shards that the store shall hold."""
        return shards_of(range(self.views), len(self.samples), self._layouts[0].shard_rows)

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
        self._read_records()
        return [shard for shard in self.shards[index::parts] if not self._is_done(shard)]

    def _is_done(self, shard: Shard) -> bool:
        return shard in self._records or (
            self._base is not None and shard.view < self._base.n_views
        )

    # ---- opening ---------------------------------------------------------------------------------

    def _check_arguments(self, shard_rows: int | None) -> None:
        header = self._header
        if self.views < 1 or len(self.samples) < 1 or (shard_rows is not None and shard_rows < 1):
            raise UsageError("views, samples and shard_rows must be at least 1")
        if not header.fields:
            raise UsageError("a store needs at least one field")
        if header.plan.fingerprint != self.samples.fingerprint:
            raise MismatchError(
                f"plan.fingerprint is {header.plan.fingerprint}, but these samples (keys, labels, "
                f"row order) have {self.samples.fingerprint}: both must be of one dataset"
            )
        if header.plan.classes != header.teacher.classes:
            raise MismatchError(
                f"the plan has {header.plan.classes} classes, the teacher {header.teacher.classes}"
            )
        if (highest := int(self.samples.labels.max())) >= header.plan.classes:
            raise DataError(f"label {highest} is not below {header.plan.classes} classes")

    def _open(self, shard_rows: int | None) -> None:
        files = self._files
        if files.size(ROOT) is None:
            strangers = [key for key in files.walk() if not is_temporary(key) and key != CARD]
            if strangers:
                raise StoreInUse(
                    f"{files.where} holds {strangers[0]} and is no kdcache store: "
                    "choose an empty folder"
                )
            self._publish(ROOT, self._header.document())
        found = read_header(parse_json(files.get(ROOT), f"{files.where}/{ROOT}"), files.where)
        difference = first_difference(found.comparable(), self._header.comparable(), "store")
        if difference:
            name, there, asked = difference
            raise MismatchError(
                f"{files.where} was begun with {name.removeprefix('store.')} = {there!r}, "
                f"this dump has {asked!r}: use the same settings to go on, or another folder"
            )
        self._header = found
        self._layouts = self._choose_layouts(shard_rows)
        if files.size(SEAL) is not None:
            self._base = LogitStore(files)
            if self._base.n_views > self.views:
                raise MismatchError(
                    f"{files.where} is sealed with {self._base.n_views} views, this dump asks for "
                    f"{self.views}: stores only grow"
                )
            self._finish_growth()
        else:
            self._ensure_metadata()
        self._read_records()

    def _choose_layouts(self, shard_rows: int | None) -> list[ArrayLayout]:
        arrays = [
            (field, spec)
            for field in self._header.fields.values()
            for spec in field.encoding.arrays(field.shape)
        ]
        samples = len(self.samples)
        chosen = choose_shard_rows(samples, [spec for _, spec in arrays], shard_rows)
        layouts = [
            ArrayLayout.choose(f.name, spec, self.views, samples, chosen) for f, spec in arrays
        ]
        first = layouts[0]
        if self._files.size(first.metadata_key) is None:
            return layouts
        where = f"{self._files.where}/{first.metadata_key}"
        there = read_layout(
            parse_json(self._files.get(first.metadata_key), where),
            first.field,
            first.spec,
            samples,
            where,
        )
        if shard_rows is not None and there.shard_rows != chosen:
            raise MismatchError(
                f"{self._files.where} was begun with shards of {there.shard_rows} rows, "
                f"this dump has {chosen}: use the same, or another folder"
            )
        rows = there.shard_rows
        return [ArrayLayout.choose(f.name, spec, self.views, samples, rows) for f, spec in arrays]

    def _ensure_metadata(self) -> None:
        for field in self._header.fields.values():
            self._publish(field.metadata_key, field.document(), repair=True)
        for layout in self._layouts:
            self._publish(layout.metadata_key, layout.document(), repair=True)
        try:
            there = read_samples(self._files.get(SAMPLES), self._header, SAMPLES)
            if (
                Samples(
                    there["key"].to_pylist(), there["label"].to_numpy(), self.samples.hashed
                ).fingerprint
                == self.samples.fingerprint
            ):
                return
        except (FileNotFoundError, FormatError, DataError):
            pass
        self._files.put(SAMPLES, write_samples(self.samples), replace=True)

    def _publish(self, key: str, data: bytes, *, repair: bool = False) -> None:
        """Publish an object; one that is there already stays, or with `repair` must be equal."""
        try:
            self._files.put(key, data)
        except FileExistsError:
            if repair and self._files.get(key) != data:
                self._files.put(key, data, replace=True)

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
        rows = self._check_rows(shard, arrays)
        labels = self.samples.labels[shard.start : shard.stop]
        objects: dict[str, bytes] = {}
        entries: list[Entry] = []
        for name, field in self._header.fields.items():
            encoded = field.encoding.encode(rows[name], labels)
            measures = self._measure(field, rows[name], labels)
            for layout in (layout for layout in self._layouts if layout.field == name):
                key = layout.key(shard.view, shard.index)
                objects[key] = encode_shard(layout, encoded[layout.spec.name])
                entries.append(
                    Entry(
                        key,
                        len(objects[key]),
                        sha256(objects[key]),
                        "shard",
                        **vars(shard),
                        **measures,
                    )
                )
                measures = {}
        record = Record(shard, tuple(entries), tuple(probes))
        with self._files.lock(f"{RECORDS}/{shard.view}-{shard.index}.lock"):
            self._commit(record, objects)
        self._records[shard] = record

    def _check_rows(self, shard: Shard, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        if shard not in self.shards:
            raise UsageError(f"{shard} is no shard of this store")
        if arrays.keys() != self._header.fields.keys():
            raise DataError(
                f"expected the fields {sorted(self._header.fields)}, found {sorted(arrays)}"
            )
        result = {}
        for name, field in self._header.fields.items():
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

    def _measure(self, field: Field, rows: Any, labels: NDArray[np.int64]) -> dict[str, Any]:
        if field.shape != (self._header.plan.classes,):
            return {}
        known = labels >= 0
        return {
            "labelled": int(known.sum()),
            "correct": int((rows.argmax(axis=1)[known] == labels[known]).sum()),
            "fidelity": measure_encoding(field.encoding, rows, labels),
        }

    def _commit(self, record: Record, objects: dict[str, bytes]) -> None:
        """Publish the objects, then the record. Equal orphans are adopted, others replaced."""
        files, key = self._files, record_key(record.shard)
        there = self._read_record(record.shard)
        if there is not None:
            if there.entries != record.entries:
                raise StoreInUse(
                    f"{files.where}: another writer committed {record.shard} with other values; "
                    "give each writer its own part"
                )
            return
        for name, data in objects.items():
            try:
                files.put(name, data)
            except FileExistsError:
                if files.get(name) != data:
                    files.put(name, data, replace=True)
        files.put(key, record.document(), replace=True)

    # ---- records ---------------------------------------------------------------------------------

    def _read_records(self) -> None:
        """Take in records that are new since the last look."""
        known = {record_key(shard) for shard in self._records}
        shards = {record_key(shard): shard for shard in self.shards}
        for key in self._files.walk(RECORDS):
            if key in known or not (match := _RECORD.fullmatch(key)):
                continue
            if key not in shards:
                raise MismatchError(
                    f"{self._files.where} already holds a shard of view {match[1]}, this dump "
                    f"asks for {self.views} views: ask for at least {int(match[1]) + 1}"
                )
            record = self._read_record(shards[key])
            if record is not None:
                self._records[record.shard] = record

    def _read_record(self, shard: Shard) -> Record | None:
        """The shard's record, if it is whole and the objects that it names have their sizes."""
        key = record_key(shard)
        try:
            record = read_record(self._files.get(key), shard, f"{self._files.where}/{key}")
        except (FileNotFoundError, CorruptStore):
            return None
        whole = all(self._files.size(entry.key) == entry.size for entry in record.entries)
        return record if whole else None

    # ---- sealing ---------------------------------------------------------------------------------

    def seal(self) -> None:
        """Finish the store: the manifest, then its digest, then the records go.

        Raises `UnfinishedStore` if shards are missing.
        """
        self._records.clear()  # look again: every object must still be there
        missing = self.pending()
        if missing:
            raise UnfinishedStore(
                f"{self._files.where}: {len(missing)} of {len(self.shards)} shards are missing, "
                f"the first is {missing[0]}: write them before sealing"
            )
        if self.sealed:
            return
        files = self._files
        first = self._base.n_views if self._base else 0
        records = [self._records[shard] for shard in self.shards if shard.view >= first]
        documents = {layout.metadata_key: layout.document() for layout in self._layouts}
        entries = {entry.key: entry for record in records for entry in record.entries}
        if self._base:
            entries |= self._base.entries
        files.put(probes_key(first), probes := write_probes(records), replace=True)
        entries[probes_key(first)] = Entry(probes_key(first), len(probes), sha256(probes), "probes")
        documents |= {f.metadata_key: f.document() for f in self._header.fields.values()}
        for key, kind in ((ROOT, "metadata"), (SAMPLES, "samples"), (CARD, "card")):
            if files.size(key) is not None:
                data = files.get(key)
                entries[key] = Entry(key, len(data), sha256(data), kind)
        for key, data in documents.items():
            entries[key] = Entry(key, len(data), sha256(data), "metadata")
        manifest = write_manifest(entries.values())
        files.put(ANNOUNCEMENT, announcement(sha256(manifest), self.views), replace=True)
        for key, data in documents.items():
            if files.get(key) != data:
                files.put(key, data, replace=True)
        files.put(MANIFEST, manifest, replace=True)
        files.put(SEAL, seal_text(sha256(manifest)), replace=True)
        files.remove_folder(RECORDS)
        files.clean()
        self._base = LogitStore(files)

    def _finish_growth(self) -> None:
        """Complete a seal that was interrupted after its manifest, and drop what it left."""
        assert self._base is not None
        files = self._files
        files.put(SEAL, seal_text(self._base.manifest_sha256), replace=True)
        stale = [
            key
            for key in files.walk(RECORDS)
            if (match := _RECORD.fullmatch(key)) and int(match[1]) < self._base.n_views
        ]
        for key in stale:
            files.remove(key)

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
        return (
            f"<StoreWriter {self._files.where}: {self.views} views of {len(self.samples)} samples>"
        )


def _with_time(provenance: dict[str, Json]) -> dict[str, Json]:
    if "time" in provenance:
        return provenance
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return {**provenance, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))}

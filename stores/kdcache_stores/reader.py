"""Reading a store: every object is checked against the manifest before its bytes become values."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.canonical import Json, parse_json
from kdcache_stores.encodings import ArraySpec, Encoding, Floats
from kdcache_stores.errors import (
    CorruptStore,
    FormatError,
    MismatchError,
    StoreError,
    StoreNotFound,
    UnfinishedStore,
    UnknownName,
    UsageError,
)
from kdcache_stores.fidelity import combine
from kdcache_stores.files import LocalFiles, Objects, is_temporary
from kdcache_stores.header import Field, read_header
from kdcache_stores.layout import ArrayLayout, read_layout
from kdcache_stores.manifest import (
    ANNOUNCEMENT,
    CARD,
    MANIFEST,
    ROOT,
    SAMPLES,
    SEAL,
    Entry,
    content_digest,
    read_manifest,
    read_seal,
    read_table,
    sha256,
    view_digest,
    write_table,
)
from kdcache_stores.nouns import Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.records import announced, read_probes
from kdcache_stores.shards import ShardReader
from kdcache_stores.verify import Progress, Report, verify_store

Rows = slice | NDArray[np.integer[Any]] | Iterable[int] | None


def write_samples(samples: Samples) -> bytes:
    """The bytes of `samples.parquet`: row, key, label."""
    import pyarrow as pa

    table = pa.table(
        {
            "row": pa.array(np.arange(len(samples), dtype=np.int64)),
            "key": pa.array(samples.keys, pa.string()),
            "label": pa.array(samples.labels),
        }
    )
    return write_table(table)


def read_samples(data: bytes, header: Any, where: str) -> Any:
    """The table in `samples.parquet`; raises `FormatError` if it is not what the header says."""
    columns = {"row": "int64", "key": "string", "label": "int64"}
    table = read_table(data, columns, header.samples, where)
    rows = table["row"].to_numpy()
    if not np.array_equal(rows, np.arange(header.samples)):
        raise FormatError(f"{where}: column row must count 0 to {header.samples - 1}")
    labels = table["label"].to_numpy()
    if labels.min() < -1 or labels.max() >= header.plan.classes:
        raise FormatError(f"{where}: labels must be -1 to {header.plan.classes - 1}")
    return table


def open_store(
    path: str | os.PathLike[str], expect: str | None = None, verify: bool = True
) -> LogitStore:
    """Open a sealed store for reading.

    Args:
        path: its folder.
        expect: the content digest that it must have (`LogitStore.digest`).
        verify: check the SHA-256 of each shard the first time it is read.

    Raises `StoreNotFound`, `UnfinishedStore`, `FormatError`, `CorruptStore`, and `MismatchError` if
    its digest is not `expect`.
    """
    store = LogitStore(LocalFiles(path), verify=verify)
    if expect is not None and store.digest != expect:
        raise MismatchError(
            f"{store.where} has the content digest {store.digest}, expected {expect}: it is "
            "another store, or it has grown"
        )
    return store


class LogitStore:
    """A sealed store. Made by `open_store`; a context manager; safe to pickle and to fork."""

    def __init__(self, objects: Objects, verify: bool = True) -> None:
        self.where = objects.where
        self._objects = objects
        self._verify = verify
        self._checked: set[str] = set()
        self.manifest_sha256, self.entries = self._open_manifest()
        self._header = read_header(self._document(ROOT), self.where)
        self._layouts: dict[str, list[ArrayLayout]] = {}
        for field in self._header.fields.values():
            document = self._document(field.metadata_key)
            found = document.get("attributes", {})
            if found.get("kdcache") != field.to_dict():
                raise FormatError(f"{self.where}/{field.metadata_key} disagrees with {ROOT}")
            self._layouts[field.name] = [
                self._open_array(field, spec) for spec in field.encoding.arrays(field.shape)
            ]
        self._check_shards()

    # ---- opening ---------------------------------------------------------------------------------

    def _open_manifest(self) -> tuple[str, dict[str, Entry]]:
        for _ in range(3):  # a growth may replace both files between two reads
            try:
                seal = read_seal(self._objects.get(SEAL), self.where)
                data = self._objects.get(MANIFEST)
            except FileNotFoundError:
                raise self._not_sealed() from None
            found = sha256(data)
            if found == seal or found == self._announced():
                return found, read_manifest(data, f"{self.where}/{MANIFEST}")
        raise CorruptStore(
            f"{self.where}/{MANIFEST} is damaged: its SHA-256 is not the one in {SEAL}"
        )

    def _not_sealed(self) -> Exception:
        if self._objects.size(ROOT) is None:
            return StoreNotFound(f"{self.where} holds no kdcache store: there is no {ROOT}")
        read_header(parse_json(self._objects.get(ROOT), f"{self.where}/{ROOT}"), self.where)
        if self._objects.size(SEAL) is not None:
            return CorruptStore(f"{self.where}/{MANIFEST} is missing")
        return UnfinishedStore(
            f"{self.where} is not sealed ({SEAL} is missing): its dump is running or was "
            "interrupted; run the same dump again to finish it"
        )

    def _announced(self) -> str | None:
        """Digest of the manifest that a growth is about to put in place, if one is under way."""
        try:
            return announced(self._objects.get(ANNOUNCEMENT))
        except FileNotFoundError:
            return None

    def _object(self, key: str, verify: bool | None = None) -> bytes:
        """An object's bytes, checked against the manifest; raises `CorruptStore`."""
        entry = self._entry(key)
        size = self._objects.size(key)
        if size is None:
            raise CorruptStore(f"{self.where}/{key} is missing")
        if size != entry.size:
            raise CorruptStore(
                f"{self.where}/{key} has {size} bytes, the manifest says {entry.size}"
            )
        data = self._objects.get(key)
        if key not in self._checked and (verify or self._verify or entry.kind != "shard"):
            if (found := sha256(data)) != entry.sha256:
                raise CorruptStore(
                    f"{self.where}/{key} is damaged: its SHA-256 is {found}, "
                    f"the manifest says {entry.sha256}"
                )
            self._checked.add(key)
        return data

    def _entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise FormatError(f"{self.where}: the manifest does not list {key}")
        return self.entries[key]

    def _document(self, key: str) -> dict[str, Json]:
        return parse_json(self._object(key), f"{self.where}/{key}")

    def _open_array(self, field: Field, spec: ArraySpec) -> ArrayLayout:
        key = f"{field.name}/{spec.name}/zarr.json"
        where = f"{self.where}/{key}"
        try:
            document = self._document(key)
        except CorruptStore:
            # While a store grows its arrays are already longer than the sealed manifest says.
            if self._announced() is None or self._objects.size(key) is None:
                raise
            grown = read_layout(
                parse_json(self._objects.get(key), where),
                field.name,
                spec,
                self._header.samples,
                where,
            )
            sealed = grown.grown(self._sealed_views(field, spec))
            if sha256(sealed.document()) != self._entry(key).sha256:
                raise
            return sealed
        return read_layout(document, field.name, spec, self._header.samples, where)

    def _sealed_views(self, field: Field, spec: ArraySpec) -> int:
        prefix = f"{field.name}/{spec.name}/c/"
        views = [
            e.view for k, e in self.entries.items() if k.startswith(prefix) and e.view is not None
        ]
        return 1 + max(views, default=-1)

    def _check_shards(self) -> None:
        """Every shard of every array is listed, with its rows, and all arrays agree on them."""
        layouts = [layout for group in self._layouts.values() for layout in group]
        first = layouts[0]
        for layout in layouts:
            if (layout.views, layout.shard_rows) != (first.views, first.shard_rows):
                raise FormatError(
                    f"{self.where}: {layout.path} has {layout.views} views in shards of "
                    f"{layout.shard_rows} rows, {first.path} {first.views} of {first.shard_rows}"
                )
        self._shard_rows = first.shard_rows
        self._n_views = first.views
        per_view = -(-self._header.samples // first.shard_rows)
        listed = sum(entry.kind == "shard" for entry in self.entries.values())
        if listed != first.views * per_view * len(layouts):
            raise FormatError(
                f"{self.where}: the manifest lists {listed} shards, "
                f"{first.views} views need {first.views * per_view * len(layouts)}"
            )
        for view in range(first.views):
            for shard in self._shards(view):
                for layout in layouts:
                    entry = self._entry(layout.key(view, shard.index))
                    if (entry.view, entry.index, entry.start, entry.stop) != (
                        view,
                        shard.index,
                        shard.start,
                        shard.stop,
                    ):
                        raise FormatError(
                            f"{self.where}: the manifest's rows of {entry.key} are wrong"
                        )

    def _shards(self, view: int) -> list[Shard]:
        n, step = self._header.samples, self._shard_rows
        return [
            Shard(view, index, start, min(start + step, n))
            for index, start in enumerate(range(0, n, step))
        ]

    # ---- what it holds ---------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The view plan."""
        return self._header.plan

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        return self._header.teacher

    @property
    def provenance(self) -> dict[str, Json]:
        """Time, command, versions, device of the dump."""
        return self._header.provenance

    @property
    def config(self) -> dict[str, Json]:
        """The dump's configuration."""
        return self._header.config

    @property
    def n_views(self) -> int:
        """Number of views V."""
        return self._n_views

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self._header.plan.classes

    @property
    def fields(self) -> dict[str, Field]:
        """Fields by name: shape per row and encoding."""
        return dict(self._header.fields)

    @property
    def encoding(self) -> Encoding:
        """Encoding of the logits (of the first field, if there is none of that name)."""
        fields = self._header.fields
        return fields.get("logits", next(iter(fields.values()))).encoding

    @cached_property
    def samples(self) -> Any:
        """The samples: an Arrow table with the columns row, key, label."""
        return read_samples(self._object(SAMPLES), self._header, f"{self.where}/{SAMPLES}")

    @cached_property
    def keys(self) -> list[str]:
        """Keys in row order (SHA-256 in hex where `keys_hashed`)."""
        keys: list[str] = self.samples["key"].to_pylist()
        return keys

    @property
    def keys_hashed(self) -> bool:
        """Whether the keys are published hashed."""
        return self._header.keys == "sha256"

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels in row order, int64 (N,), -1 for unlabelled."""
        labels: NDArray[np.int64] = self.samples["label"].to_numpy().copy()
        return labels

    def __len__(self) -> int:
        return self._header.samples

    @cached_property
    def probes(self) -> list[Probe]:
        """All probes, by view and row."""
        keys = [key for key, entry in self.entries.items() if entry.kind == "probes"]
        found = [p for key in keys for p in read_probes(self._object(key), f"{self.where}/{key}")]
        return sorted(found, key=lambda probe: (probe.view, probe.row))

    @cached_property
    def view_digests(self) -> list[str]:
        """A digest per view: the same wherever, whenever and in whatever order it was written."""
        shards: list[list[tuple[str, str]]] = [[] for _ in range(self.n_views)]
        for entry in self.entries.values():
            if entry.kind == "shard" and entry.view is not None:
                shards[entry.view].append((entry.key, entry.sha256))
        identity = self._header.identity
        return [view_digest(identity, view, shards[view]) for view in range(self.n_views)]

    @cached_property
    def digest(self) -> str:
        """Digest of the content: plan, teacher, encodings and every view."""
        return content_digest(self._header.identity, self.view_digests)

    @property
    def nbytes(self) -> int:
        """Size of all objects, bytes."""
        return sum(entry.size for entry in self.entries.values())

    # ---- reading ---------------------------------------------------------------------------------

    def read(
        self, view: int, rows: Rows = None, field: str = "logits", out: Floats | None = None
    ) -> Floats:
        """Decoded rows of one view.

        Args:
            view: 0 to `n_views` - 1.
            rows: a slice, integers (negative ones count from the end), or None for all.
            field: name of the field.
            out: float32 (rows, *shape), C-contiguous, to decode into.

        Returns float32 (rows, *shape). Raises `CorruptStore` if the bytes are not those that were
        written, `UsageError` for a view or row that there is not.
        """
        if field not in self._header.fields:
            raise UnknownName("field", field, self._header.fields)
        if not 0 <= view < self.n_views:
            raise UsageError(f"{self.where} has views 0 to {self.n_views - 1}, asked for {view}")
        wanted = self._rows(rows)
        shape = (len(wanted), *self._header.fields[field].shape)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise UsageError(
                f"out must be contiguous float32 {shape}, found {out.dtype} {out.shape}"
            )
        for shard in self._shards(view):
            self._read_shard(shard, field, wanted, out)
        return out

    def _rows(self, rows: Rows) -> range | NDArray[np.int64]:
        n = len(self)
        if rows is None:
            return range(n)
        if isinstance(rows, slice):
            return range(*rows.indices(n))
        wanted = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise UsageError("rows must be a slice or a sequence of integers")
        wanted = wanted.astype(np.int64)
        if wanted.size and not -n <= wanted.min() <= wanted.max() < n:
            raise UsageError(
                f"{self.where} has rows 0 to {n - 1}, asked for {wanted.min()} to {wanted.max()}"
            )
        return np.where(wanted < 0, wanted + n, wanted)

    def _read_shard(
        self, shard: Shard, field: str, wanted: range | NDArray[np.int64], out: Floats
    ) -> None:
        """Decode those of the wanted rows that the shard holds, block by block."""
        whole = isinstance(wanted, range) and wanted == range(len(self))
        if not whole:
            numbers = np.asarray(wanted, dtype=np.int64)
            if not ((numbers >= shard.start) & (numbers < shard.stop)).any():
                return
        layouts = self._layouts[field]
        encoding = self._header.fields[field].encoding
        readers = {}
        for layout in layouts:
            key = layout.key(shard.view, shard.index)
            readers[layout.spec.name] = ShardReader(
                layout, self._object(key), f"{self.where}/{key}"
            )
        step = min(layout.chunk_rows for layout in layouts)
        chunks: dict[str, tuple[int, Any]] = {}
        for start in range(0, shard.rows, step):
            stop = min(start + step, shard.rows)
            target = out[shard.start + start : shard.start + stop] if whole else None
            if not whole:
                inside = (numbers >= shard.start + start) & (numbers < shard.start + stop)
                places = np.flatnonzero(inside)
                if not len(places):
                    continue
                target = np.empty((stop - start, *out.shape[1:]), np.float32)
            assert target is not None
            arrays = {}
            for layout in layouts:
                name, number = layout.spec.name, start // layout.chunk_rows
                if chunks.get(name, (-1, None))[0] != number:
                    chunks[name] = (number, readers[name].chunk(number))
                first = start - number * layout.chunk_rows
                arrays[name] = chunks[name][1][first : first + stop - start]
            encoding.decode(arrays, target)
            if not np.isfinite(target.sum(dtype=np.float64)):
                raise CorruptStore(
                    f"{self.where}: view {shard.view}, rows {shard.start + start} to "
                    f"{shard.start + stop - 1} of {field} hold values that were never written"
                )
            if not whole:
                out[places] = target[numbers[places] - shard.start - start]

    def views(
        self, order: Iterable[int], prefetch: int = 1, field: str = "logits"
    ) -> Iterator[tuple[int, Floats]]:
        """Decoded views one after another, read ahead by a background thread.

        Args:
            order: views, as often and in whatever order they are wanted.
            prefetch: how many views wait decoded beside the one in use; 0 reads on demand.
            field: name of the field.

        Yields (view, float32 (N, *shape)), a new array each time.
        """
        if prefetch < 1:
            for view in order:
                yield view, self.read(view, field=field)
            return
        ready: queue.Queue[tuple[int, Floats] | BaseException | None] = queue.Queue(prefetch)
        stop = threading.Event()

        def put(item: tuple[int, Floats] | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for view in order:
                    if stop.is_set():
                        return
                    put((view, self.read(view, field=field)))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="kdcache-prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    # ---- context manager, pickling ---------------------------------------------------------------

    def close(self) -> None:
        """Nothing stays open between reads; here so that a store can be used like a file."""

    def __enter__(self) -> LogitStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LogitStore {self.where}: {self.n_views} views of {len(self)} samples>"

    # ---- checking --------------------------------------------------------------------------------

    def check(self, entry: Entry) -> str | None:
        """What is wrong with an object, or None; it is read and hashed again."""
        self._checked.discard(entry.key)
        try:
            if not entry.key.endswith("zarr.json") or self._announced() is None:
                self._object(entry.key, verify=True)
        except StoreError as error:
            return str(error)
        return None

    def check_samples(self) -> None:
        """Raises `CorruptStore` unless keys and labels give the fingerprint of the plan."""
        fingerprint = Samples(self.keys, self.labels, self.keys_hashed).fingerprint
        if fingerprint != self.plan.fingerprint:
            raise CorruptStore(
                f"{self.where}/{SAMPLES}: keys and labels give the fingerprint {fingerprint}, "
                f"the plan says {self.plan.fingerprint}"
            )

    def strangers(self) -> list[str]:
        """What lies in the folder beside the store's objects, one sentence each."""
        if not isinstance(self._objects, LocalFiles):
            return []
        known = {*self.entries, MANIFEST, SEAL, CARD}
        found = []
        for key in self._objects.walk():
            if is_temporary(key):
                found.append(f"{key} was left by an interrupted writer and may be deleted")
            elif key not in known:
                found.append(f"{key} is not in the manifest and is never read")
        return found

    def info(self) -> dict[str, Json]:
        """What the store holds, plain JSON: for `kdcache inspect` and other programs."""
        shards = [entry for entry in self.entries.values() if entry.kind == "shard"]
        fields = {}
        for name, field in self._header.fields.items():
            own = [entry for entry in shards if entry.key.startswith(f"{name}/")]
            measured = [entry for entry in own if entry.fidelity is not None]
            labelled = sum(entry.labelled or 0 for entry in measured)
            size = sum(entry.size for entry in own)
            fields[name] = {
                **field.to_dict(),
                "nbytes": size,
                "bytes_per_row": size / (self.n_views * len(self)),
                "labelled": labelled,
                "top1": sum(e.correct or 0 for e in measured) / labelled if labelled else None,
                "fidelity": combine([e.fidelity for e in measured if e.fidelity]) or None,
            }
        return {
            "where": self.where,
            "digest": self.digest,
            "views": self.n_views,
            "view_digests": self.view_digests,
            "objects": len(self.entries),
            "nbytes": self.nbytes,
            "shard_rows": self._shard_rows,
            "probes": len(self.probes),
            **self._header.to_dict(),
            "fields": fields,
        }

    def verify(self, progress: Progress | None = None) -> Report:
        """Check every object on all cores; `progress` is called with (bytes done, bytes in all)."""
        return verify_store(self, progress)

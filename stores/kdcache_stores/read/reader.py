"""Reading a store: every object is checked against the manifest before its bytes become values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import NOTHING, Array, Floats
from kdcache_stores.errors import MismatchError, UnknownName, UsageError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.head import Head, read_head
from kdcache_stores.format.header import Field
from kdcache_stores.format.layout import ArrayLayout, shards_of
from kdcache_stores.format.manifest import SAMPLES, Part, content_digest, view_digest
from kdcache_stores.format.records import read_probes
from kdcache_stores.format.sample_table import read_samples
from kdcache_stores.format.shards import ShardReader
from kdcache_stores.objects.files import Objects
from kdcache_stores.read.decode import Destination, Selection, Wanted, read_shards
from kdcache_stores.read.prefetch import prefetched
from kdcache_stores.read.sealed_objects import SealedObjects
from kdcache_stores.types import LOGITS, Plan, Probe, Shard, StoredTeacher


def open_store(
    path: str | os.PathLike[str],
    expect: str | None = None,
    verify: bool = True,
    cache_size: int | None = None,
) -> Store:
    """Open a sealed store for reading.

    Args:
        path: its folder or URL: file://, s3://, gs://, az://, http(s)://, hf://.
        expect: the content digest that it must have (`Store.digest`).
        verify: check the SHA-256 of each shard the first time it is read, and again if its file
            changed since.
        cache_size: bytes of remote objects that this disk keeps (`ObjectCache`); 0 for none; by
            default KDCACHE_CACHE_SIZE, or 20 GB.

    Raises `StoreNotFound`, `UnfinishedStore`, `FormatError`, `CorruptStore`, `MismatchError` if its
    digest is not `expect`, and `RemoteError`.
    """
    from kdcache_stores.objects.remote import open_objects

    store = Store(open_objects(path, cache_size), verify=verify)
    if expect is not None and store.digest != expect:
        raise MismatchError(
            f"{store.where} has the content digest {store.digest}, expected {expect}: it is "
            "another store, or it has grown"
        )
    return store


class Store:
    """A sealed store. Made by `open_store`; a context manager; safe to pickle and to fork.

    Args:
        objects: where its objects are.
        verify: check the SHA-256 of each shard the first time it is read.
    """

    def __init__(self, objects: Objects, verify: bool = True) -> None:
        self.where = objects.where
        self.source = SealedObjects(objects, verify)
        self.header = self.source.header()
        self._layouts = self.source.layouts(self.header)
        first = next(iter(self._layouts.values()))[0]
        self.first_view = self.source.first_view
        self.n_views, self.shard_rows = first.views - self.first_view, first.shard_rows

    @property
    def layouts(self) -> dict[str, list[ArrayLayout]]:
        """The arrays of each field."""
        return self._layouts

    @property
    def part(self) -> Part | None:
        """Of which larger store this holds the views `first_view` and on; None if it is whole."""
        return self.source.part

    @property
    def keeps(self) -> bool:
        """Whether an object that is read again comes from this machine: it lies here, or is cached."""
        return self.source.objects.keeps

    @property
    def view_range(self) -> range:
        """The numbers of the views that it holds: 0 to `n_views` - 1 unless it is a part."""
        return range(self.first_view, self.first_view + self.n_views)

    def shards(self, view: int) -> list[Shard]:
        """The shards of one view."""
        return shards_of(range(view, view + 1), len(self), self.shard_rows)

    # ---- what it holds ---------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The view plan."""
        return self.header.plan

    @property
    def teacher(self) -> StoredTeacher:
        """The teacher."""
        return self.header.teacher

    @property
    def provenance(self) -> dict[str, Json]:
        """Time, command, versions, device of the dump."""
        return self.header.provenance

    @property
    def config(self) -> dict[str, Json]:
        """The dump's configuration."""
        return self.header.config

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.header.plan.classes

    @property
    def fields(self) -> dict[str, Field]:
        """Fields by name: shape per row and encoding."""
        return dict(self.header.fields)

    @cached_property
    def head(self) -> Head | None:
        """Weight (K, D) and bias (K,), float32, of the teacher's last linear layer, if it is kept.

        Raises `CorruptStore`.
        """
        shape = self.header.head
        return None if shape is None else read_head(self.source.get, shape, self.where)

    @cached_property
    def samples(self) -> Any:
        """The samples: an Arrow table with the columns row, key, label."""
        return read_samples(
            self.source.get(SAMPLES), len(self), self.classes, f"{self.where}/{SAMPLES}"
        )

    @cached_property
    def keys(self) -> list[str]:
        """Keys in row order (SHA-256 in hex where `keys_hashed`)."""
        keys: list[str] = self.samples["key"].to_pylist()
        return keys

    @property
    def keys_hashed(self) -> bool:
        """Whether the keys are published hashed."""
        return self.header.keys == "sha256"

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels in row order, int64 (N,), -1 for unlabelled."""
        labels: NDArray[np.int64] = self.samples["label"].to_numpy().copy()
        return labels

    def __len__(self) -> int:
        return self.header.samples

    @cached_property
    def probes(self) -> list[Probe]:
        """All probes, by view and row."""
        keys = [key for key, entry in self.source.entries.items() if entry.kind == "probes"]
        most = self.n_views * len(self)
        probes = [
            probe
            for key in keys
            for probe in read_probes(self.source.get(key), most, f"{self.where}/{key}")
        ]
        return sorted(probes, key=lambda probe: (probe.view, probe.row))

    @cached_property
    def view_digests(self) -> list[str]:
        """A digest per view held: the same wherever, whenever and in whatever order it was written."""
        shards: list[list[tuple[str, str]]] = [[] for _ in range(self.n_views)]
        for entry in self.source.entries.values():
            if entry.kind == "shard" and entry.view is not None:
                shards[entry.view - self.first_view].append((entry.key, entry.sha256))
            elif entry.kind == "once":
                for view in shards:
                    view.append((entry.key, entry.sha256))
        identity = self.header.identity
        return [
            view_digest(identity, view, listed)
            for view, listed in zip(self.view_range, shards, strict=True)
        ]

    @cached_property
    def digest(self) -> str:
        """Digest of the content: plan, teacher, encodings and every view."""
        return self.digest_of(self.view_range)

    def digest_of(self, views: range) -> str:
        """The digest that a store of just these of its views has: growth does not change it."""
        first = self.first_view
        kept = self.view_digests[views.start - first : views.stop - first]
        return content_digest(self.header.identity, kept)

    @property
    def nbytes(self) -> int:
        """Size of all objects, bytes."""
        return sum(entry.size for entry in self.source.entries.values())

    def nbytes_of(self, field: str) -> int:
        """Size of the objects of one field, bytes."""
        entries = self.source.entries.items()
        return sum(entry.size for key, entry in entries if key.startswith(f"{field}/"))

    # ---- reading ---------------------------------------------------------------------------------

    def read(
        self, view: int, rows: Selection = None, field: str = LOGITS, out: Floats | None = None
    ) -> Floats:
        """Decoded rows of one view.

        Args:
            view: one of `view_range`.
            rows: a slice, integers (negative ones count from the end), or None for all.
            field: name of the field.
            out: float32 (rows, *shape), C-contiguous, to decode into.

        Returns float32 (rows, *shape). Raises `CorruptStore` if the bytes are not those that were
        written (`out` is then undefined), `UsageError` for a view or row that there is not.
        """
        item, wanted = self._wanted(view, rows, field)
        shape = (wanted.count, *item.shape)
        if out is None:
            try:
                out = np.empty(shape, np.float32)
            except (MemoryError, ValueError):
                raise UsageError(f"{shape} float32 do not fit memory: read fewer rows") from None
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise UsageError(
                f"out must be contiguous float32 {shape}, found {out.dtype} {out.shape}"
            )
        self._read(view, item, wanted, Destination(item.shape, out, NOTHING))
        return out

    def read_encoded(
        self, view: int, rows: Selection = None, field: str = LOGITS
    ) -> dict[str, Array]:
        """Rows of one view as they are stored, for who keeps them so and decodes them later.

        They are checked as in `read`, by decoding them too.

        Args:
            view: one of `view_range`.
            rows: a slice, integers (negative ones count from the end), or None for all.
            field: name of the field.

        Returns, per array of the field's encoding that has rows, (rows, *spec.shape) of the dtype of
        its spec; those per store are `shared_arrays`. Raises what `read` raises.
        """
        item, wanted = self._wanted(view, rows, field)
        encoded = {
            spec.name: np.empty(
                (wanted.count, *spec.shape), spec.dtype, order="F" if spec.columns else "C"
            )
            for spec in item.encoding.arrays(item.shape)
            if spec.per != "store"
        }
        self._read(view, item, wanted, Destination(item.shape, None, encoded))
        return encoded

    def shared_arrays(self, field: str = LOGITS) -> dict[str, Array]:
        """The arrays that all rows of a field share, by name; none for most encodings.

        Raises `UnknownName`, `CorruptStore`.
        """
        arrays = {}
        for layout in self.layouts[self._field(field).name]:
            if layout.spec.per == "store":
                key = layout.key(0, 0)
                reader = ShardReader(layout, self.source.get(key), f"{self.where}/{key}")
                arrays[layout.spec.name] = reader.single()
        return arrays

    def _field(self, name: str) -> Field:
        if name not in self.header.fields:
            raise UnknownName("field", name, self.header.fields)
        return self.header.fields[name]

    def _wanted(self, view: int, rows: Selection, field: str) -> tuple[Field, Wanted]:
        item = self._field(field)
        if view not in self.view_range:
            raise UsageError(
                f"{self.where} has views {self.first_view} to {self.view_range.stop - 1}, "
                f"asked for {view}"
            )
        return item, Wanted(rows, len(self), self.where)

    def _read(self, view: int, item: Field, wanted: Wanted, out: Destination) -> None:
        layouts = self._layouts[item.name]
        read_shards(self.source, self.shards(view), layouts, item.encoding, wanted, out)

    def views(
        self, order: Iterable[int], prefetch: int = 1, field: str = LOGITS
    ) -> Iterator[tuple[int, Floats]]:
        """Decoded views one after another, read ahead by a background thread.

        Args:
            order: views, as often and in whatever order they are wanted.
            prefetch: how many views wait decoded beside the one in use and the one being decoded;
                0 reads on demand.
            field: name of the field.

        Yields (view, float32 (N, *shape)), a new array each time.
        """

        def work(view: int) -> tuple[int, Floats]:
            return view, self.read(view, field=field)

        return prefetched(work, order, prefetch) if prefetch > 0 else map(work, order)

    # ---- context manager, pickling ---------------------------------------------------------------

    def close(self) -> None:
        """Let go of what a remote store fetched ahead; a local one keeps nothing open."""
        self.source.objects.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self.where}: {self.n_views} views of {len(self)} samples>"

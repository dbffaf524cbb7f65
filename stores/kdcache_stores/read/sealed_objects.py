"""The objects of a sealed store, each confirmed by the SHA-256 in the manifest."""

from __future__ import annotations

import math
from mmap import mmap

from kdcache_stores.encodings.protocol import ArraySpec
from kdcache_stores.errors import CorruptStore, FormatError, StoreNotFound, UnfinishedStore
from kdcache_stores.format.canonical_json import Json, parse_json
from kdcache_stores.format.head import head_layouts
from kdcache_stores.format.header import HEAD, Field, Header, read_header
from kdcache_stores.format.layout import ArrayLayout, each_shard, read_layout
from kdcache_stores.format.manifest import (
    ANNOUNCEMENT,
    MANIFEST,
    ROOT,
    SEAL,
    Entry,
    read_manifest,
    read_part,
    read_seal,
    sha256,
)
from kdcache_stores.format.records import announced
from kdcache_stores.objects.files import LocalFiles, Objects, Stamp
from kdcache_stores.objects.urls import no_store

_READS = 8
"""How often seal and manifest are read until they agree."""
_SMALL = 64 * 2**20
"""No metadata object is larger."""
_LARGE = 2**30
"""No table is larger."""


class SealedObjects:
    """The manifest, and the objects that it lists.

    Args:
        objects: where they are.
        verify: check the SHA-256 of shards too; that of all else is always checked.

    Raises `StoreNotFound`, `UnfinishedStore`, `CorruptStore`, `FormatError`.
    """

    def __init__(self, objects: Objects, verify: bool = True) -> None:
        self.objects = objects
        self.where = objects.where
        self._verify = verify
        self._checked: dict[str, Stamp] = {}
        data = self._open_manifest()
        where = f"{self.where}/{MANIFEST}"
        self.manifest_sha256 = sha256(data)
        self.entries = read_manifest(data, where)
        self.part = read_part(data, where)
        self.first_view = self.part.start if self.part is not None else 0
        objects.expect(self.entries)
        objects.prefetch(
            key for key, e in self.entries.items() if e.kind in ("metadata", "samples")
        )

    def _open_manifest(self) -> bytes:
        # A growth may replace both files between two reads, and a network may damage either.
        for attempt in range(_READS):
            try:
                seal = read_seal(self.objects.get(SEAL, _SMALL), self.where)
                data = self.objects.get(MANIFEST, _LARGE)
            except FileNotFoundError:
                raise self._not_sealed() from None
            except CorruptStore:
                if attempt == _READS - 1:
                    raise
                continue
            actual = sha256(data)
            if actual == seal or actual == self.announced():
                return data
        raise CorruptStore(
            f"{self.where}: {MANIFEST} or {SEAL} is damaged: its SHA-256 is {actual}, "
            f"the seal says {seal}"
        )

    def _not_sealed(self) -> Exception:
        if self.objects.size(ROOT) is None:
            if self.objects.size(SEAL) is not None:
                return CorruptStore(f"{self.where}/{ROOT} is missing")
            return StoreNotFound(no_store(self.where, ROOT))
        read_header(parse_json(self.objects.get(ROOT), f"{self.where}/{ROOT}"), self.where)
        if self.objects.size(SEAL) is not None:
            return CorruptStore(f"{self.where}/{MANIFEST} is missing")
        return UnfinishedStore(
            f"{self.where} is not sealed ({SEAL} is missing): its dump is running or was "
            "interrupted; run the same dump (or pull, or push) again to finish it"
        )

    def announced(self) -> str | None:
        """Digest of the manifest that a growth is about to put in place, if one is under way."""
        try:
            return announced(self.objects.get(ANNOUNCEMENT))
        except FileNotFoundError:
            return None

    def entry(self, key: str) -> Entry:
        """The manifest's entry; raises `FormatError` if there is none."""
        if key not in self.entries:
            raise FormatError(f"{self.where}: the manifest does not list {key}")
        return self.entries[key]

    def load(self, key: str) -> tuple[bytes, Stamp | None]:
        """An object's bytes, of the size that the manifest states; raises `CorruptStore`.

        Beside them is what `confirm` needs, or None where these bytes, unchanged since, were
        confirmed before or need not be.
        """
        entry = self.entry(key)
        before = self.objects.stamp(key)
        if before is None:
            raise CorruptStore(f"{self.where}/{key} is missing")
        if before[0] != entry.size:
            raise CorruptStore(
                f"{self.where}/{key} has {before[0]} bytes, the manifest says {entry.size}"
            )
        data = self.objects.get(key)
        if len(data) != entry.size:
            raise CorruptStore(f"{self.where}/{key} changed while it was read")
        known = self._checked.get(key) == before == self.objects.stamp(key)
        due = not known and (self._verify or entry.kind != "shard")
        return data, before if due else None

    def mapped(self, key: str) -> tuple[mmap, Stamp | None]:
        """A local object's bytes, mapped, of the right size and SHA-256; and the stamp they have.

        Raises `CorruptStore`.
        """
        assert isinstance(self.objects, LocalFiles)
        entry, stamp = self.entry(key), self.objects.stamp(key)
        if stamp is None or stamp[0] != entry.size:
            actual = "is missing" if stamp is None else f"has {stamp[0]} bytes"
            raise CorruptStore(f"{self.where}/{key} {actual}, the manifest says {entry.size} bytes")
        data = self.objects.map(key)
        if self._verify and self._checked.get(key) != stamp:
            self.confirm(key, data, stamp)
        if self.objects.stamp(key) != stamp:
            raise CorruptStore(f"{self.where}/{key} changed while it was read")
        return data, stamp

    def confirm(self, key: str, data: bytes | mmap, stamp: Stamp | None) -> None:
        """Check an object's SHA-256; raises `CorruptStore`."""
        if (actual := sha256(data)) != self.entry(key).sha256:
            raise CorruptStore(
                f"{self.where}/{key} is damaged: its SHA-256 is {actual}, "
                f"the manifest says {self.entry(key).sha256}"
            )
        if stamp is not None:
            self._checked[key] = stamp

    def get(self, key: str) -> bytes:
        """A small object's bytes, checked; raises `CorruptStore`."""
        if self.entry(key).size > _LARGE:
            raise FormatError(f"{self.where}: {key} of {self.entry(key).size} bytes is too large")
        data, stamp = self.load(key)
        self.confirm(key, data, stamp)
        return data

    def document(self, key: str) -> dict[str, Json]:
        """A metadata object; raises `CorruptStore`, `FormatError`."""
        if self.entry(key).size > _SMALL:
            raise FormatError(f"{self.where}: {key} of {self.entry(key).size} bytes is too large")
        return parse_json(self.get(key), f"{self.where}/{key}")

    # ---- metadata --------------------------------------------------------------------------------

    def header(self) -> Header:
        """The root's header, after the fields' groups were found to agree with it."""
        header = read_header(self.document(ROOT), self.where)
        for field in header.fields.values():
            self._agrees(field.metadata_key, field.to_dict())
        if header.head is not None:
            self._check_head(header.head)
        return header

    def _check_head(self, shape: tuple[int, int]) -> None:
        """The metadata of the head is what such a head has, and its objects are in the manifest."""
        key = f"{HEAD}/zarr.json"
        self._agrees(key, {"shape": list(shape)})
        for layout in head_layouts(shape):
            where = f"{self.where}/{layout.metadata_key}"
            read_layout(self.document(layout.metadata_key), HEAD, layout.spec, 1, where)
            if self.entry(layout.key(0, 0)).kind != "head":
                raise FormatError(
                    f"{self.where}: the manifest's kind of {layout.path} must be head"
                )

    def _agrees(self, key: str, expected: dict[str, Json]) -> None:
        """A group's attributes say what the root says; raises `FormatError`."""
        attributes = self.document(key).get("attributes", {})
        stated = attributes.get("kdcache") if isinstance(attributes, dict) else None
        if not isinstance(stated, dict) or not stated.items() >= expected.items():
            raise FormatError(f"{self.where}/{key} disagrees with {ROOT}")

    def layouts(self, header: Header) -> dict[str, list[ArrayLayout]]:
        """The arrays of each field; every shard of them is in the manifest with its rows."""
        layouts = {
            field.name: [
                self._array(field, spec, header.samples)
                for spec in field.encoding.arrays(field.shape)
            ]
            for field in header.fields.values()
        }
        self._check_shards([layout for group in layouts.values() for layout in group])
        return layouts

    def _array(self, field: Field, spec: ArraySpec, samples: int) -> ArrayLayout:
        key = f"{field.name}/{spec.name}/zarr.json"
        where = f"{self.where}/{key}"
        try:
            return read_layout(
                self.document(key), field.name, spec, samples, where, math.prod(field.shape)
            )
        except CorruptStore:
            # While a store grows, its arrays are longer than the sealed manifest says.
            if self.announced() is None or self.objects.size(key) is None:
                raise
            document = parse_json(self.objects.get(key), where)
            views = self._listed_views(f"{field.name}/{spec.name}/c/")
            sealed = read_layout(document, field.name, spec, samples, where).grown(views)
            if sha256(sealed.document()) != self.entry(key).sha256:
                raise
            return sealed

    def _listed_views(self, prefix: str) -> int:
        views = [
            entry.view
            for key, entry in self.entries.items()
            if key.startswith(prefix) and entry.view is not None
        ]
        return 1 + max(views, default=-1)

    def _check_shards(self, layouts: list[ArrayLayout]) -> None:
        first = layouts[0]
        shared = [layout for layout in layouts if layout.spec.per != "row"]
        layouts = [layout for layout in layouts if layout.spec.per == "row"]
        for layout in shared:
            if layout.spec.per == "sample" and layout.shard_rows != first.shard_rows:
                raise FormatError(f"{self.where}: {layout.path} has shards of other rows")
            for shard in each_shard(range(layout.views), layout.samples, layout.shard_rows):
                entry = self.entry(layout.key(shard.view, shard.index))
                if entry.kind != "once":
                    raise FormatError(
                        f"{self.where}: the manifest's kind of {layout.path} is wrong"
                    )
                self._check_size(entry, layout)
        for layout in layouts:
            if (layout.views, layout.shard_rows) != (first.views, first.shard_rows):
                raise FormatError(
                    f"{self.where}: {layout.path} has {layout.views} views in shards of "
                    f"{layout.shard_rows} rows, {first.path} {first.views} of {first.shard_rows}"
                )
        if self.part is not None and self.part.stop != first.views:
            raise FormatError(
                f"{self.where}: the part ends at view {self.part.stop}, its arrays at {first.views}"
            )
        views = range(self.first_view, first.views)
        needed = len(views) * -(-first.samples // first.shard_rows) * len(layouts)
        listed = sum(entry.kind == "shard" for entry in self.entries.values())
        if listed != needed:
            raise FormatError(
                f"{self.where}: the manifest lists {listed} shards, {len(views)} views of "
                f"{first.samples} samples need {needed}"
            )
        for shard in each_shard(views, first.samples, first.shard_rows):
            for layout in layouts:
                entry = self.entry(layout.key(shard.view, shard.index))
                if entry.shard != shard:
                    raise FormatError(f"{self.where}: the manifest's rows of {entry.key} are wrong")
                self._check_size(entry, layout)

    def _check_size(self, entry: Entry, layout: ArrayLayout) -> None:
        if entry.size > layout.most_bytes:
            raise FormatError(
                f"{self.where}: {entry.key} has {entry.size} bytes, no shard of it has more than "
                f"{layout.most_bytes}"
            )

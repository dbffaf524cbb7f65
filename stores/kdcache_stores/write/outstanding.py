"""What a dump has yet to write, found by looking: not a byte is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping

from numpy.typing import ArrayLike

from kdcache_stores.errors import MismatchError, UsageError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.head import check_head
from kdcache_stores.format.header import Header
from kdcache_stores.format.layout import shards_of
from kdcache_stores.format.manifest import ROOT, SEAL
from kdcache_stores.format.records import RecordBook
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.read.reader import Store
from kdcache_stores.types import FieldSpec, Plan, Samples, Shard, StoredTeacher
from kdcache_stores.write.begin import begun_header, choose_layouts, make_header


class Outstanding:
    """The shards of a store that a dump with these settings would write.

    Args:
        files: the store; nothing need be there.
        header: what the dump asks for.
        views: how many views the store shall hold.
        shard_rows: rows per shard at most.
        thorough: check every committed byte; see `RecordBook`.

    Attributes:
        begun: whether a store is there, finished or not.
        header: the one that is there, or else the one asked for.
        base: the sealed store that is there, if one is.
        layouts: the arrays of all fields.
        shards: all shards that the store shall hold.
        records: the committed ones of them.

    Raises what `StoreWriter` raises on opening.
    """

    def __init__(
        self,
        files: LocalFiles,
        header: Header,
        views: int,
        shard_rows: int | None = None,
        thorough: bool = False,
    ) -> None:
        self.views = views
        self.begun = files.size(ROOT) is not None
        self.header = begun_header(files, header)
        self.base = _open_sealed(files, views)
        self.layouts = choose_layouts(files, self.header, views, shard_rows)
        self.shards = shards_of(range(views), header.samples, self.layouts[0].shard_rows)
        self.records = RecordBook(files, self.shards, thorough)
        self.records.refresh()

    @property
    def sealed(self) -> bool:
        """Whether the store is finished, with all of the views asked for."""
        return self.base is not None and self.base.n_views == self.views

    @property
    def needs_view_0(self) -> bool:
        """Whether the shard of view 0 must be written before those of other views of its rows."""
        return any(layout.spec.per == "sample" for layout in self.layouts)

    def pending(self, part: tuple[int, int] = (0, 1)) -> list[Shard]:
        """The shards that are not committed yet; `part` as for `StoreWriter.pending`."""
        index, parts = part
        if not 0 <= index < parts:
            raise UsageError(f"part must be (i, n) with 0 <= i < n, found {part}")
        if self.sealed:
            return []
        self.records.refresh()
        mine = set(self.shards[index::parts])
        if self.needs_view_0:
            mine |= {Shard(0, shard.index, shard.start, shard.stop) for shard in mine}
        return sorted(shard for shard in mine if not self.is_done(shard))

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard is committed."""
        return shard in self.records.committed or self.is_sealed(shard)

    def is_sealed(self, shard: Shard) -> bool:
        """Whether a shard is of the sealed store that is there."""
        return self.base is not None and shard.view < self.base.n_views


def find_outstanding(
    path: str | os.PathLike[str],
    *,
    plan: Plan,
    teacher: StoredTeacher,
    samples: Samples,
    views: int,
    fields: Mapping[str, FieldSpec],
    config: Mapping[str, Json] | None = None,
    provenance: Mapping[str, Json] | None = None,
    hash_keys: bool = False,
    shard_rows: int | None = None,
    head: tuple[ArrayLike, ArrayLike] | None = None,
) -> Outstanding:
    """What a `StoreWriter` with the same arguments would have to write; raises what it would."""
    samples = samples.hash_keys() if hash_keys else samples
    checked = check_head(head, plan.classes)
    shape = None if checked is None else (plan.classes, checked[0].shape[1])
    header = make_header(plan, teacher, samples, views, fields, config, provenance, head=shape)
    return Outstanding(LocalFiles(path), header, views, shard_rows)


def _open_sealed(files: LocalFiles, views: int) -> Store | None:
    """The sealed store that is there, if one is."""
    if files.size(SEAL) is None:
        return None
    base = Store(files)
    if base.first_view:
        raise MismatchError(
            f"{files.where} is a part: it holds the views {base.first_view} to "
            f"{base.view_range.stop - 1}. Dump into another folder, or pull more views"
        )
    if base.n_views > views:
        raise MismatchError(
            f"{files.where} is sealed with {base.n_views} views, this dump asks for "
            f"{views}: stores only grow"
        )
    return base

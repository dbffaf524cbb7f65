"""Making a damaged store unfinished again, so that a dump writes just the damage anew."""

from __future__ import annotations

from collections import defaultdict

from kdcache_stores.errors import CorruptStore, FormatError, KDCacheError
from kdcache_stores.format.header import Header
from kdcache_stores.format.manifest import ANNOUNCEMENT, MANIFEST, ROOT, SEAL, Entry
from kdcache_stores.format.records import Record, read_probes, record_key
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.read.sealed_objects import SealedObjects
from kdcache_stores.types import Probe, Shard


def unseal_damaged(files: LocalFiles, header: Header) -> bool:
    """Check every object of a sealed store; if one is damaged, make the store unfinished.

    Every whole shard gets its record back, then the seal goes. A damaged root, where its plan and
    teacher still agree with `header`, is replaced. Without a readable manifest no shard has a
    record: those that the next dump finds equal are adopted as they lie. Shards whose probes are
    lost are written again. Returns whether the store was unsealed.
    """
    if files.size(SEAL) is None:
        return False
    try:
        source = SealedObjects(files)
    except (CorruptStore, FormatError):
        files.remove(SEAL)
        return True
    checked = [entry for entry in source.entries.values() if entry.kind != "card"]
    damaged = {entry.key for entry in checked if not _is_whole(source, entry)}
    if not damaged:
        return False
    if ROOT in damaged:
        files.put(ROOT, header.document(), replace=True)
    for record in _whole_records(source, damaged):
        files.put(record_key(record.shard), record.document(), replace=True)
    for key in (SEAL, MANIFEST, ANNOUNCEMENT):
        files.remove(key)
    for entry in checked:
        if entry.kind == "probes":
            files.remove(entry.key)
    return True


def _is_whole(source: SealedObjects, entry: Entry) -> bool:
    try:
        source.confirm(entry.key, *source.load(entry.key))
    except KDCacheError:
        return False
    return True


def _whole_records(source: SealedObjects, damaged: set[str]) -> list[Record]:
    """Records of the shards of which every object and all probes are whole."""
    entries: dict[Shard, list[Entry]] = defaultdict(list)
    probes: dict[Shard, list[Probe]] = defaultdict(list)
    for entry in source.entries.values():
        if entry.kind == "shard":
            entries[entry.shard].append(entry)
    shared = [entry for entry in source.entries.values() if entry.kind == "once"]
    keys = [key for key, entry in source.entries.items() if entry.kind == "probes"]
    if damaged.intersection(keys):
        return []
    lost = {entry.index for entry in shared if entry.key in damaged}
    if None in lost:  # what all shards were encoded with
        return []
    starts = {(shard.view, shard.start): shard for shard in entries}
    rows = max(shard.rows for shard in entries)
    for key in keys:
        for probe in read_probes(source.get(key), len(entries) * rows, key):
            probes[starts[probe.view, probe.row - probe.row % rows]].append(probe)
    return [
        Record(shard, tuple(own + _needed(shared, shard)), tuple(probes[shard]))
        for shard, own in entries.items()
        if shard.index not in lost and damaged.isdisjoint(entry.key for entry in own)
    ]


def _needed(shared: list[Entry], shard: Shard) -> list[Entry]:
    """The shared objects that a shard was encoded with, in the order of the writer."""
    return [entry for entry in shared if entry.index in (None, shard.index)]

"""Records: what is committed of an unfinished store, one small object per shard."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kdcache_stores.errors import CorruptStore, FormatError, MismatchError
from kdcache_stores.format.canonical_json import Json, digest, parse_json, pretty_json
from kdcache_stores.format.manifest import ANNOUNCEMENT, RECORDS, Entry, read_entry, sha256
from kdcache_stores.format.tables import read_table, write_table
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.types import Probe, Shard

_RECORD = re.compile(rf"{RECORDS}/(\d{{1,9}})-(\d{{1,9}})\.json")


@dataclass(frozen=True)
class Record:
    """A committed shard: the entries of its objects, for the manifest, and its probes."""

    shard: Shard
    entries: tuple[Entry, ...]
    probes: tuple[Probe, ...]

    def document(self) -> bytes:
        """The record's bytes: JSON with a digest of the rest."""
        value = {
            "shard": vars(self.shard),
            "entries": [entry.to_dict() for entry in self.entries],
            "probes": [{**vars(probe), "coarse": probe.coarse.hex()} for probe in self.probes],
        }
        return pretty_json({**value, "digest": digest("record", value)})


def record_key(shard: Shard) -> str:
    """Key of a shard's record."""
    return f"{RECORDS}/{shard.view}-{shard.index}.json"


def is_of_a_dump(key: str) -> bool:
    """Whether a listed key is a shard's record, or the lock under which one is written."""
    return _RECORD.fullmatch(key.removesuffix(".lock").removesuffix(".json") + ".json") is not None


def read_record(data: bytes, shard: Shard, where: str) -> Record:
    """The record of `shard`; raises `CorruptStore` if it is damaged or another shard's."""
    try:
        value = parse_json(data, where)
        stored: Json = value.pop("digest")
        if stored != digest("record", value) or value["shard"] != vars(shard):
            raise FormatError(f"{where}: its digest or its shard does not agree with its content")
        entries = tuple(read_entry(entry, where) for entry in value["entries"])
        if any(entry.kind == "shard" and entry.shard != shard for entry in entries):
            raise FormatError(f"{where}: it names objects of another shard")
        return Record(
            shard,
            entries,
            tuple(_read_probe(probe, where) for probe in value["probes"]),
        )
    except (FormatError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStore(f"{where} is damaged: {error}") from None


def _read_probe(value: Json, where: str) -> Probe:
    row, view, sha256 = value["row"], value["view"], value["sha256"]
    whole = type(row) is type(view) is int and 0 <= row < 2**62 and 0 <= view < 2**62
    if not (whole and isinstance(sha256, str)):
        raise FormatError(f"{where}: a probe is wrong: {value!r:.200}")
    return Probe(row, view, sha256, bytes.fromhex(value["coarse"]))


def probes_key(first_view: int) -> str:
    """Key of the probes of the views that one dump, or one growth, added."""
    return f"probes/{first_view}.parquet"


def write_probes(probes: Iterable[Probe]) -> bytes:
    """These probes as Parquet: row, view, sha256, coarse; sorted by view and row."""
    import pyarrow as pa

    probes = sorted(probes, key=lambda probe: (probe.view, probe.row))
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("view", pa.int64()),
            ("sha256", pa.string()),
            ("coarse", pa.binary()),
        ]
    )
    return write_table(pa.Table.from_pylist([vars(probe) for probe in probes], schema=schema))


def read_probes(data: bytes, most: int, where: str) -> list[Probe]:
    """The probes in a Parquet file, at most `most`; raises `FormatError`."""
    columns = {"row": "int64", "view": "int64", "sha256": "string", "coarse": "binary"}
    return [Probe(**row) for row in read_table(data, columns, most, where).to_pylist()]


def announcement(manifest_sha256: str, views: int) -> bytes:
    """The object that announces a growth: which manifest is about to replace the sealed one."""
    return pretty_json({"manifest": manifest_sha256, "views": views})


def announced(data: bytes) -> str | None:
    """The digest of the announced manifest; None if the announcement is unreadable."""
    try:
        return str(parse_json(data, ANNOUNCEMENT)["manifest"])
    except (FormatError, KeyError):
        return None


class RecordBook:
    """The committed shards of an unfinished store, as listed in its folder of records.

    Args:
        files: the store.
        shards: all shards that the store shall hold.
        thorough: read every object that a record names and check its SHA-256, not its size alone.
            Shared arrays are always read: a shard is lost if they have changed.
    """

    def __init__(self, files: LocalFiles, shards: list[Shard], thorough: bool = False) -> None:
        self._files = files
        self._shards = {record_key(shard): shard for shard in shards}
        self._thorough = thorough
        self.committed: dict[Shard, Record] = {}

    def refresh(self) -> None:
        """Take in records that are new since the last look; raises `MismatchError` for others'."""
        known = {record_key(shard) for shard in self.committed}
        for key in self._files.walk(RECORDS):
            if key in known or not (match := _RECORD.fullmatch(key)):
                continue
            if key not in self._shards:
                raise MismatchError(
                    f"{self._files.where} already holds shard {match[2]} of view {match[1]}, which "
                    "this dump would leave out: ask for as many views as the one that it resumes"
                )
            if record := self.look(self._shards[key]):
                self.committed[record.shard] = record

    def look(self, shard: Shard) -> Record | None:
        """The shard's record, if it is whole and so are the objects that it names."""
        key = record_key(shard)
        try:
            record = read_record(self._files.get(key), shard, f"{self._files.where}/{key}")
        except (FileNotFoundError, CorruptStore):
            return None
        return record if all(self._whole(entry) for entry in record.entries) else None

    def _whole(self, entry: Entry) -> bool:
        if self._files.size(entry.key) != entry.size:
            return False
        if not self._thorough and entry.kind != "once":
            return True
        return sha256(self._files.get(entry.key)) == entry.sha256

"""Records: what is committed of an unfinished store, one small object per shard."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kdcache_stores.canonical import Json, digest, parse_json, pretty_json
from kdcache_stores.errors import CorruptStore, FormatError
from kdcache_stores.manifest import RECORDS, Entry
from kdcache_stores.nouns import Probe, Shard


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
            "entries": [vars(entry) for entry in self.entries],
            "probes": [{**vars(probe), "coarse": probe.coarse.hex()} for probe in self.probes],
        }
        return pretty_json({**value, "digest": digest("record", value)})


def record_key(shard: Shard) -> str:
    """Key of a shard's record."""
    return f"{RECORDS}/{shard.view}-{shard.index}.json"


def read_record(data: bytes, shard: Shard, where: str) -> Record:
    """The record of `shard`; raises `CorruptStore` if it is damaged or another shard's."""
    try:
        value = parse_json(data, where)
        stored: Json = value.pop("digest")
        if stored != digest("record", value) or value["shard"] != vars(shard):
            raise FormatError(f"{where}: its digest or its shard does not agree with its content")
        return Record(
            shard,
            tuple(Entry(**entry) for entry in value["entries"]),
            tuple(
                Probe(**{**probe, "coarse": bytes.fromhex(probe["coarse"])})
                for probe in value["probes"]
            ),
        )
    except (FormatError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStore(f"{where} is damaged: {error}") from None


def probes_key(first_view: int) -> str:
    """Key of the probes of the views that one dump, or one growth, added."""
    return f"probes/{first_view}.parquet"


def write_probes(records: list[Record]) -> bytes:
    """The probes of these records as Parquet: row, view, sha256, coarse."""
    import pyarrow as pa

    from kdcache_stores.manifest import write_table

    probes = sorted(
        (probe for record in records for probe in record.probes),
        key=lambda probe: (probe.view, probe.row),
    )
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("view", pa.int64()),
            ("sha256", pa.string()),
            ("coarse", pa.binary()),
        ]
    )
    return write_table(pa.Table.from_pylist([vars(probe) for probe in probes], schema=schema))


def read_probes(data: bytes, where: str) -> list[Probe]:
    """The probes in a Parquet file; raises `FormatError`."""
    from kdcache_stores.manifest import read_table

    columns = {"row": "int64", "view": "int64", "sha256": "string", "coarse": "binary"}
    return [Probe(**row) for row in read_table(data, columns, 10**7, where).to_pylist()]


def announcement(manifest_sha256: str, views: int) -> bytes:
    """The object that announces a growth: which manifest is about to replace the sealed one."""
    return pretty_json({"manifest": manifest_sha256, "views": views})


def announced(data: bytes) -> str | None:
    """The digest of the announced manifest; None if the announcement is unreadable."""
    try:
        value = json.loads(data)
        return str(value["manifest"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

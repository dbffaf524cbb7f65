"""The manifest: every object of a sealed store with size and SHA-256, and digests over it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from mmap import mmap
from types import NoneType
from typing import Any

from kdcache_stores.errors import CorruptStore, FormatError
from kdcache_stores.format.canonical_json import Json, canonical_json, digest, parse_json
from kdcache_stores.format.tables import read_metadata, read_table, write_table
from kdcache_stores.objects.files import check_key
from kdcache_stores.types import Shard

ROOT = "zarr.json"
SAMPLES = "samples.parquet"
MANIFEST = "manifest.parquet"
SEAL = "manifest.sha256"
RECORDS = "records"
ANNOUNCEMENT = "records/seal.json"
CARD = "README.md"
CROISSANT = "croissant.json"

FIDELITY = (
    "kl_t1_mean",
    "kl_t1_worst",
    "kl_t4_mean",
    "kl_t4_worst",
    "kl_z_mean",
    "kl_z_worst",
    "top1_agreement",
)
"""Fidelity of an encoding on live rows: KL(live || decoded), nats; see `fidelity.measure`."""

NEWER_MEASURES = ("error", "head_kl")
"""Columns of format 1.1, which are there only where they hold a value."""

_PART = b"kdcache.part"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERS = ("view", "index", "start", "stop", "labelled", "correct")


@dataclass(frozen=True)
class Entry:
    """One object of the store.

    Args:
        key: its name.
        size: bytes.
        sha256: hex.
        kind: "metadata", "samples", "probes", "shard", "once" (shared by all views, or by all
            rows), "head", "card" (may change afterwards), or what a newer minor version adds.
        view, index, start, stop: for shards; all but view for "once" per sample; else None.
        labelled, correct: labelled rows and how many of them the teacher gets right, on the first
            array of the logits.
        fidelity: rows measured and the values named in `FIDELITY`, on the same array.
        error: mean relative squared error, on the first array of another field that is not kept as
            floats.
        head_kl: beside it, mean KL of the logits that the store's head makes of the field, if it does.
    """

    key: str
    size: int
    sha256: str
    kind: str
    view: int | None = None
    index: int | None = None
    start: int | None = None
    stop: int | None = None
    labelled: int | None = None
    correct: int | None = None
    fidelity: dict[str, float] | None = None
    error: float | None = None
    head_kl: float | None = None

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON; `error` and `head_kl` where there are any, as format 1.0 has none."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None or name not in NEWER_MEASURES
        }

    @property
    def shard(self) -> Shard:
        """The shard that the object belongs to; raises `FormatError` if it is none."""
        if self.view is None or self.index is None or self.start is None or self.stop is None:
            raise FormatError(f"{self.key} is no shard")
        return Shard(self.view, self.index, self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """Which views of a larger store a store holds, under the numbers that they have there.

    Args:
        start, stop: views start to stop - 1.
        of: content digest of the larger store.
        views: how many it holds.
    """

    start: int
    stop: int
    of: str
    views: int


def sha256(data: bytes | mmap) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def seal_text(manifest_sha256: str) -> bytes:
    """The bytes of `manifest.sha256`, as `sha256sum -c` reads them."""
    return f"{manifest_sha256}  {MANIFEST}\n".encode()


def read_seal(data: bytes, where: str) -> str:
    """The digest in `manifest.sha256`; raises `CorruptStore`."""
    value = data[:64].decode("ascii", "replace")
    if not _SHA256.fullmatch(value) or data != seal_text(value):
        raise CorruptStore(
            f"{where}/{SEAL} is damaged: expected '<sha256>  {MANIFEST}', found {data[:100]!r}"
        )
    return value


def _schema(newer: Iterable[str] = ()) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("bytes", pa.int64(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            ("view", pa.int64()),
            ("index", pa.int64()),
            ("start", pa.int64()),
            ("stop", pa.int64()),
            ("labelled", pa.int64()),
            ("correct", pa.int64()),
            (
                "fidelity",
                pa.struct([("rows", pa.float64()), *((name, pa.float64()) for name in FIDELITY)]),
            ),
            *((name, pa.float64()) for name in newer),
        ]
    )


def write_manifest(entries: Iterable[Entry], part: Part | None = None) -> bytes:
    """The bytes of `manifest.parquet`, sorted by key; its metadata names the part, if it is one."""
    import pyarrow as pa

    rows = []
    for entry in sorted(entries, key=lambda entry: entry.key):
        row = entry.to_dict()
        row["bytes"] = row.pop("size")
        rows.append(row)
    schema = _schema(name for name in NEWER_MEASURES if any(name in row for row in rows))
    if part is not None:
        schema = schema.with_metadata({_PART: canonical_json(vars(part))})
    return write_table(pa.Table.from_pylist(rows, schema=schema))


def read_manifest(data: bytes, where: str) -> dict[str, Entry]:
    """Entries by key; raises `FormatError` where the manifest breaks the format."""
    columns = {"key": "string", "bytes": "int64", "sha256": "string", "kind": "string"}
    columns |= dict.fromkeys(_NUMBERS, "int64?")
    columns["fidelity"] = str(_schema().field("fidelity").type) + "?"
    columns |= dict.fromkeys(NEWER_MEASURES, "double??")
    table = read_table(data, columns, 10**8, where)
    entries: dict[str, Entry] = {}
    for row in table.to_pylist():
        row["size"] = row.pop("bytes")
        entry = Entry(**row)
        if entry.key in entries or not _is_sound(entry):
            raise FormatError(
                f"{where}: the entry of {entry.key!r} is repeated or wrong: {row!r:.300}"
            )
        entries[entry.key] = entry
    return entries


def read_entry(value: Json, where: str) -> Entry:
    """The inverse of `Entry.to_dict`; raises `FormatError`."""
    numbers, measured = (*_NUMBERS, "size"), ("rows", *FIDELITY)
    if (
        not isinstance(value, dict)
        or not value.keys() <= Entry.__dataclass_fields__.keys()
        or not all(isinstance(value.get(name), str) for name in ("key", "sha256", "kind"))
        or not all(type(value.get(name)) in (int, NoneType) for name in numbers)
        or value.get("size") is None
        or type(value.get("error")) not in (int, float, NoneType)
        or not _are_numbers(value.get("fidelity"), measured)
        or not _is_sound(entry := Entry(**value))
    ):
        raise FormatError(f"{where}: an entry is wrong: {value!r:.300}")
    return entry


def _are_numbers(value: Json, names: Sequence[str]) -> bool:
    """Whether it is None, or an object of numbers of these names."""
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {*names}
        and all(type(number) in (int, float) for number in value.values())
    )


def _is_sound(entry: Entry) -> bool:
    """Whether values of the right types can be those of an object; raises `FormatError` for its key."""
    check_key(entry.key)
    numbers = [getattr(entry, name) for name in ("size", *_NUMBERS)]
    return (
        0 < len(entry.kind) <= 64
        and _SHA256.fullmatch(entry.sha256) is not None
        and all(number is None or 0 <= number < 2**62 for number in numbers)
        and _plausible(entry)
        and (entry.kind == "shard")
        == (None not in (entry.view, entry.index, entry.start, entry.stop))
    )


def _plausible(entry: Entry) -> bool:
    """Whether the measures of a shard can be true."""
    newer = [value for value in (entry.error, entry.head_kl) if value is not None]
    if not all(0 <= value < math.inf for value in newer):
        return False
    rows = (entry.stop or 0) - (entry.start or 0)
    if (measured := entry.fidelity) is not None and not (
        all(value is not None and 0 <= value < math.inf for value in measured.values())
        and 1 <= measured["rows"] <= rows
        and measured["top1_agreement"] <= 1
    ):
        return False
    if entry.labelled is None or entry.correct is None:
        return entry.labelled is entry.correct is None
    return entry.correct <= entry.labelled <= rows


def read_part(data: bytes, where: str) -> Part | None:
    """What a manifest that `read_manifest` read says of the part; None if the store is whole."""
    text = read_metadata(data).get(_PART)
    if text is None:
        return None
    value = parse_json(text, where)
    numbers = [value.get(name) for name in ("start", "stop", "views")]
    if (
        value.keys() != {"start", "stop", "of", "views"}
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        or not 0 <= value["start"] < value["stop"] <= value["views"] < 2**48
        or not (isinstance(value["of"], str) and _SHA256.fullmatch(value["of"]))
    ):
        raise FormatError(f"{where}: the description of the part is wrong: {value!r:.200}")
    return Part(**value)


def view_digest(identity: Json, view: int, shards: Iterable[tuple[str, str]]) -> str:
    """Digest of one view: the store's identity, the view's number, its shards' keys and SHA-256."""
    return digest("view", {"store": identity, "view": view, "shards": sorted(map(list, shards))})


def content_digest(identity: Json, views: Sequence[str]) -> str:
    """Digest of a store's content: its identity and the digests of its views."""
    return digest("store", {"store": identity, "views": list(views)})

"""Beginning a store, or taking up one that was begun: its header, its arrays, its samples."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from kdcache_stores.errors import DataError, FormatError, MismatchError, StoreInUse, UsageError
from kdcache_stores.format.canonical_json import Json, first_difference, parse_json, plain
from kdcache_stores.format.header import FORMAT, Field, Header, read_header
from kdcache_stores.format.layout import ArrayLayout, choose_shard_rows, read_layout
from kdcache_stores.format.manifest import CARD, ROOT, SAMPLES
from kdcache_stores.format.sample_table import read_samples, write_samples
from kdcache_stores.objects.files import LocalFiles, is_leftover
from kdcache_stores.types import LOGITS, FieldSpec, Plan, Samples, StoredTeacher


def require_place(files: LocalFiles) -> None:
    """Raise `StoreInUse` if the folder is a file, or holds something that is no store."""
    if os.path.isfile(files.root):
        raise StoreInUse(f"{files.where} is a file, and a store is a folder: choose another name")
    if files.size(ROOT) is None:
        extra = [key for key in files.walk() if not is_leftover(key) and key != CARD]
        if extra:
            raise StoreInUse(
                f"{files.where} holds {extra[0]} and is no kdcache store: choose an empty folder"
            )


def make_header(
    plan: Plan,
    teacher: StoredTeacher,
    samples: Samples,
    views: int,
    fields: Mapping[str, FieldSpec],
    config: Mapping[str, Json] | None,
    provenance: Mapping[str, Json] | None,
    shard_rows: int | None = None,
    head: tuple[int, int] | None = None,
) -> Header:
    """The header of a store, with a head of shape (K, D) where one is given.

    Raises `DataError`, `MismatchError` or `UsageError` for arguments that do not fit together.
    """
    header = Header(
        plan,
        teacher,
        {name: Field.make(name, spec) for name, spec in sorted(fields.items())},
        len(samples),
        "sha256" if samples.hashed else "plain",
        plain(dict(config or {}), "config"),
        _with_time(plain(dict(provenance or {}), "provenance")),
        head,
    )
    _check_arguments(header, samples, views, shard_rows)
    return header


def begin(files: LocalFiles, header: Header) -> Header:
    """Claim the folder for this header, or find that it was begun with an equal one.

    Returns and raises what `begun_header` does.
    """
    require_place(files)
    if files.size(ROOT) is None:
        files.publish(ROOT, header.document())
    return begun_header(files, header)


def begun_header(files: LocalFiles, header: Header) -> Header:
    """The header that is there, with the provenance of whoever began it; this one, if none is.

    Raises `StoreInUse` if the folder holds something else, `FormatError` for a store of a newer format
    than is written here, `MismatchError` naming the first difference.
    """
    require_place(files)
    if files.size(ROOT) is None:
        return header
    begun = read_header(parse_json(files.get(ROOT), f"{files.where}/{ROOT}"), files.where)
    if begun.minor > FORMAT[1]:
        raise FormatError(
            f"{files.where} has format {FORMAT[0]}.{begun.minor}; this kdcache writes {FORMAT[0]}."
            f"{FORMAT[1]} at most: go on with a version of kdcache that knows it"
        )
    difference = first_difference(begun.comparable(), header.comparable(), "store")
    if difference:
        name, present, expected = difference
        raise MismatchError(
            f"{files.where} was begun with {name.removeprefix('store.')} = {present!r}, "
            f"this dump has {expected!r}: use the same settings to go on, or another folder"
        )
    return begun


def choose_layouts(
    files: LocalFiles, header: Header, views: int, shard_rows: int | None
) -> list[ArrayLayout]:
    """The arrays of all fields, in shards of the size that the store was begun with, if it was.

    Raises `MismatchError` if `shard_rows` asks for another size.
    """
    arrays = [
        (field.name, spec)
        for field in header.fields.values()
        for spec in field.encoding.arrays(field.shape)
    ]
    values = max(math.prod(field.shape) for field in header.fields.values())
    rows = choose_shard_rows(header.samples, [spec for _, spec in arrays], values, shard_rows)
    stated = _shard_rows_begun(
        files, header, ArrayLayout.choose(*arrays[0], views, header.samples, rows)
    )
    if stated is not None:
        if shard_rows is not None and stated != rows:
            raise MismatchError(
                f"{files.where} was begun with shards of {stated} rows, this dump has {rows}: "
                "use the same, or another folder"
            )
        rows = stated
    return [ArrayLayout.choose(name, spec, views, header.samples, rows) for name, spec in arrays]


def _shard_rows_begun(files: LocalFiles, header: Header, first: ArrayLayout) -> int | None:
    where = f"{files.where}/{first.metadata_key}"
    try:
        document = parse_json(files.get(first.metadata_key), where)
        return read_layout(document, first.field, first.spec, header.samples, where).shard_rows
    except (FileNotFoundError, FormatError):
        return None  # not written yet, or damaged: `ensure_metadata` writes it


def ensure_metadata(
    files: LocalFiles, header: Header, layouts: list[ArrayLayout], samples: Samples
) -> None:
    """Publish what an unfinished store needs beside its shards; replace what differs."""
    for field in header.fields.values():
        files.publish(field.metadata_key, field.document(), replace=True)
    for layout in layouts:
        files.publish(layout.metadata_key, layout.document(), replace=True)
    if not _holds(files, header, samples):
        files.put(SAMPLES, write_samples(samples), replace=True)


def _holds(files: LocalFiles, header: Header, samples: Samples) -> bool:
    """Whether `samples.parquet` holds these samples, whichever version of Arrow wrote it."""
    try:
        table = read_samples(files.get(SAMPLES), header.samples, header.plan.classes, SAMPLES)
        stated = Samples(table["key"].to_pylist(), table["label"].to_numpy(), samples.hashed)
    except (FileNotFoundError, FormatError, DataError):
        return False
    return stated.fingerprint == samples.fingerprint


def _check_arguments(header: Header, samples: Samples, views: int, shard_rows: int | None) -> None:
    if views < 1 or len(samples) < 1 or (shard_rows is not None and shard_rows < 1):
        raise UsageError("views, samples and shard_rows must be at least 1")
    if not header.fields:
        raise UsageError("a store needs at least one field")
    if LOGITS in header.fields and header.fields[LOGITS].shape != (header.plan.classes,):
        raise UsageError(
            f"logits must have shape ({header.plan.classes},), a value for each class of the plan, found "
            f"{header.fields[LOGITS].shape}: give another output another name"
        )
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
    text = os.environ.get("SOURCE_DATE_EPOCH") or str(time.time())
    try:
        moment = time.gmtime(float(text))
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"SOURCE_DATE_EPOCH must be seconds since 1970, found {text!r}: correct the variable, or unset it"
        ) from None
    return {**provenance, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)}

"""Sealing a store that independent jobs filled, from nothing but its path."""

from __future__ import annotations

import os
from dataclasses import asdict

from kdcache_stores.encodings.encoding_names import encoding_to_dict, make_encoding
from kdcache_stores.encodings.protocol import Encoding
from kdcache_stores.errors import FormatError, StoreNotFound, UsageError
from kdcache_stores.format.canonical_json import parse_json
from kdcache_stores.format.head import read_head
from kdcache_stores.format.header import read_header
from kdcache_stores.format.manifest import ROOT, SAMPLES, SEAL
from kdcache_stores.format.sample_table import read_samples
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.objects.urls import no_store
from kdcache_stores.types import FieldSpec, Samples
from kdcache_stores.write.writer import StoreWriter


def begun_encodings(path: str | os.PathLike[str]) -> dict[str, str]:
    """The encoding of each field of the store that is there, finished or not; none if there is none."""
    files = LocalFiles(path)
    if files.size(ROOT) is None:
        return {}
    fields = read_header(parse_json(files.get(ROOT), f"{files.where}/{ROOT}"), files.where).fields
    return {name: _text(field.encoding) for name, field in fields.items()}


def reopen(path: str | os.PathLike[str], views: int | None = None) -> StoreWriter:
    """A writer for a store that was begun, with the settings that it was begun with.

    Args:
        path: its folder.
        views: how many views it shall hold. None: as many as whoever began it asked for; a sealed
            store that grows does not know them, so there they must be given.

    Raises `StoreNotFound` if nothing was begun there, `UsageError` if the views must be given, and
    what `StoreWriter` raises.
    """
    files = LocalFiles(path)
    if files.size(ROOT) is None:
        raise StoreNotFound(no_store(files.where, ROOT))
    header = read_header(parse_json(files.get(ROOT), f"{files.where}/{ROOT}"), files.where)
    if views is None and files.size(SEAL) is not None:
        raise UsageError(
            f"{files.where} is sealed; to seal the views that were added to it, say how many it "
            "shall hold now (--views N)"
        )
    fields = {name: FieldSpec(f.shape, _text(f.encoding)) for name, f in header.fields.items()}
    if views is None:
        views = _begun_views(files, next(iter(header.fields)))
    where = f"{files.where}/{SAMPLES}"
    table = read_samples(files.get(SAMPLES), header.samples, header.plan.classes, where)
    samples = Samples(
        table["key"].to_pylist(), table["label"].to_numpy().copy(), header.keys == "sha256"
    )
    head = read_head(files.get, header.head, files.where) if header.head is not None else None
    return StoreWriter(
        path,
        plan=header.plan,
        teacher=header.teacher,
        samples=samples,
        views=views,
        fields=fields,
        config=header.config,
        provenance=header.provenance,
        head=head,
    )


def _text(encoding: Encoding) -> str:
    """The text that `make_encoding` makes this encoding of."""
    parameters = list(asdict(encoding).values())  # type: ignore[call-overload]
    text = ":".join([encoding.name, *map(str, parameters[:1])])
    if encoding_to_dict(make_encoding(text)) != encoding_to_dict(encoding):
        raise FormatError(f"no name gives the encoding {encoding_to_dict(encoding)}")
    return text


def _begun_views(files: LocalFiles, field: str) -> int:
    """The longest first axis of the field's arrays in a store that was never sealed.

    Not any array's: a base is kept once for all views, so its first axis is 1.
    """
    views = 0
    for key in files.walk(field):
        if key.count("/") == 2 and key.endswith("/zarr.json"):
            shape = parse_json(files.get(key), f"{files.where}/{key}").get("shape")
            if isinstance(shape, list) and shape and isinstance(shape[0], int):
                views = max(views, shape[0])
    if not views:
        raise FormatError(f"{files.where}: no array of {field} says how many views were begun")
    return views

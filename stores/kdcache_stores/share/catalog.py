"""catalog.json: the stores in a folder, for servers that cannot list; kept by push."""

from __future__ import annotations

import os
from typing import Any

from kdcache_stores.errors import FormatError, StoreInUse, UsageError
from kdcache_stores.format.canonical_json import Json, parse_json, pretty_json
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.files import LocalFiles, check_key
from kdcache_stores.objects.locking import lock_file
from kdcache_stores.objects.urls import local_path, split_name
from kdcache_stores.read.describing import describe
from kdcache_stores.read.reader import Store
from kdcache_stores.types import LOGITS

CATALOG = "catalog.json"

_TRIES = 20


def summary(store: Store) -> dict[str, Json]:
    """A store in one line of a list, plain JSON."""
    info = describe(store)
    main = main_field(info["fields"])
    return {
        "dataset": info["plan"]["dataset"],
        "split": info["plan"]["split"],
        "classes": info["plan"]["classes"],
        "samples": info["samples"],
        "first_view": info["first_view"],
        "views": info["views"],
        "teacher": info["teacher"]["architecture"],
        "top1": main["top1"],
        "fields": {name: item["encoding"] for name, item in info["fields"].items()},
        "encoding": main["encoding"],
        "nbytes": info["nbytes"],
        "sealed": True,
        "plan": info["plan"]["digest"],
        "teacher_digest": info["teacher"]["digest"],
        "digest": info["digest"],
    }


def main_field(fields: dict[str, Any]) -> Any:
    """What stands for a store where there is room for one field: the logits, or else the first."""
    return fields[LOGITS] if LOGITS in fields else fields[min(fields)]


_TYPES: dict[str, Any] = {
    "dataset": str,
    "split": str,
    "classes": int,
    "samples": int,
    "first_view": int,
    "views": int,
    "teacher": str,
    "top1": (float, int, type(None)),
    "encoding": dict,
    "nbytes": int,
    "sealed": bool,
    "plan": str,
    "teacher_digest": str,
    "digest": str,
}


def read_catalog(data: bytes, where: str) -> dict[str, dict[str, Json]]:
    """Summaries by name; raises `FormatError` for anything else than a catalogue."""
    value = parse_json(data, where)
    stores = value.get("stores")
    if value.get("kdcache_catalog") != 1 or not isinstance(stores, dict):
        raise FormatError(f"{where} is no catalogue of this version of kdcache")
    for name, item in stores.items():
        check_key(name)
        if not isinstance(item, dict) or any(
            not isinstance(item.get(key), kind) for key, kind in _TYPES.items()
        ):
            raise FormatError(f"{where}: the entry of {name!r:.80} is wrong")
    return stores


def write_catalog(stores: dict[str, dict[str, Json]]) -> bytes:
    """The bytes of `catalog.json`."""
    return pretty_json({"kdcache_catalog": 1, "stores": stores})


def announce_store(url: str, store: Store) -> None:
    """Note a store in the catalogue of the folder that it lies in, if it has one around it.

    Pushes at once each keep their line: the catalogue is replaced only if it is still the one that was
    read. Raises `StoreInUse` if it changes under every attempt, `RemoteError`.
    """
    place = split_name(url)
    if place is None or url.startswith("hf://"):
        return  # at the top of a bucket there is no folder around it; the Hub lists by itself
    parent, name = place
    try:
        check_key(name)
    except FormatError:
        raise UsageError(
            f"{name!r:.80} is no name of a store: letters, digits, '.', '_', '-'"
        ) from None
    folder = local_path(parent)
    if folder is not None:
        files, handle = LocalFiles(folder), os.open(folder, os.O_RDONLY)
        try:
            lock_file(handle, folder)
            catalog = files.get(CATALOG) if files.size(CATALOG) is not None else None
            files.put(CATALOG, _with(catalog, name, store, folder), replace=True)
        finally:
            os.close(handle)
        return
    bucket = Bucket(parent)
    for _ in range(_TRIES):
        try:
            data: bytes | None
            data, tag = bucket.tagged(CATALOG)
        except FileNotFoundError:
            data, tag = None, None
        made = _with(data, name, store, bucket.where)
        if made == data or bucket.put_if(CATALOG, made, tag):
            return
    raise StoreInUse(f"{bucket.where}/{CATALOG} changed under {_TRIES} attempts; push again")


def _with(data: bytes | None, name: str, store: Store, where: str) -> bytes:
    stores = read_catalog(data, f"{where}/{CATALOG}") if data is not None else {}
    return write_catalog({**stores, name: summary(store)})

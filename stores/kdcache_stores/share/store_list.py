"""The stores under a folder, a bucket or a web server: found by looking, or in the catalogue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kdcache_stores.errors import KDCacheError, RemoteError, StoreNotFound, UnfinishedStore
from kdcache_stores.format.canonical_json import Json, parse_json
from kdcache_stores.format.header import read_header
from kdcache_stores.format.manifest import ROOT
from kdcache_stores.objects import hub
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.remote import open_objects
from kdcache_stores.objects.urls import join, local_path, redact, split_url
from kdcache_stores.read.reader import Store
from kdcache_stores.share.catalog import CATALOG, main_field, read_catalog, summary

DEPTH = 4
"""How many folders deep stores are looked for."""


@dataclass(frozen=True)
class Listed:
    """A store of the list.

    Args:
        name: its path below the place that was listed.
        where: its path or URL, without credentials.
        summary: see `catalog.summary`; with `sealed` false, what the root states about an unfinished store.
        problem: why it cannot be opened, if it cannot.
    """

    name: str
    where: str
    summary: dict[str, Json]
    problem: str | None = None

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON."""
        return {"name": self.name, "where": self.where, "problem": self.problem, **self.summary}


def list_stores(url: str | os.PathLike[str]) -> list[Listed]:
    """The stores under a path or URL, those of one view plan together.

    Folders and buckets are looked through; a web server, which cannot list, is asked for the
    `catalog.json` that pushes maintain. Raises `StoreNotFound` if there is nothing to list,
    `RemoteError`.
    """
    folder = local_path(url)
    if folder is not None and not os.path.isdir(folder):
        raise StoreNotFound(f"{folder} is no folder")
    if folder is None and split_url(str(url)).scheme in ("http", "https"):
        stores = _from_catalog(str(url))
    else:
        place = str(folder if folder is not None else url)
        names = list(_names(place))
        with ThreadPoolExecutor(8) as pool:
            listed = pool.map(lambda name: _look(name, join(place, name) if name else place), names)
            stores = [item for item in listed if item is not None]
    return sorted(stores, key=lambda store: (str(store.summary.get("plan", "")), store.name))


def _names(place: str) -> Iterator[str]:
    """Paths of the folders that hold a root and lie in no other store."""
    if local_path(place) is not None:
        yield from _walk(lambda folder: _local_children(place, folder))
    elif place.startswith("hf://"):
        yield from _walk(lambda folder: hub.children(place, folder))
    else:
        yield from _walk(Bucket(place).children)


def _walk(children: Any, folder: str = "", depth: int = 0) -> Iterator[str]:
    folders, objects = children(folder)
    if ROOT in objects:
        yield folder
    elif depth < DEPTH:
        for name in folders:
            yield from _walk(children, f"{folder}/{name}" if folder else name, depth + 1)


def _local_children(place: str, folder: str) -> tuple[list[str], list[str]]:
    try:
        with os.scandir(os.path.join(place, folder)) as entries:
            items = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return [], []
    folders = [e.name for e in items if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    return folders, [e.name for e in items if not e.is_dir(follow_symlinks=False)]


def _look(name: str, where: str) -> Listed | None:
    """What a folder with a root holds; None if that is some other Zarr group."""
    shown = redact(where)
    objects = open_objects(where, 0)
    try:
        with Store(objects) as store:
            return Listed(name or os.path.basename(shown), shown, summary(store))
    except StoreNotFound:
        return None
    except UnfinishedStore:
        return Listed(name, shown, _unfinished(objects))
    except RemoteError:
        raise
    except KDCacheError as error:
        return Listed(name, shown, {"sealed": False}, str(error))


def _unfinished(objects: Any) -> dict[str, Json]:
    header = read_header(parse_json(objects.get(ROOT), objects.where), objects.where)
    fields = {name: field.to_dict()["encoding"] for name, field in header.fields.items()}
    return {
        "dataset": header.plan.dataset,
        "split": header.plan.split,
        "classes": header.plan.classes,
        "samples": header.samples,
        "teacher": header.teacher.architecture,
        "fields": fields,
        "encoding": main_field(fields),
        "sealed": False,
        "plan": header.plan.digest,
        "teacher_digest": header.teacher.digest,
    }


def _from_catalog(url: str) -> list[Listed]:
    bucket = Bucket(url)
    try:
        data = bucket.get(CATALOG)
    except FileNotFoundError:
        if bucket.size(ROOT) is not None:
            store = _look("", url)
            return [store] if store is not None else []
        raise StoreNotFound(
            f"{bucket.where} has no {CATALOG}, and a web server cannot list: push stores to the folder "
            "behind it with `kdcache push`, or give the address of one store"
        ) from None
    stores = read_catalog(data, f"{bucket.where}/{CATALOG}")
    return [Listed(name, f"{bucket.where}/{name}", item) for name, item in stores.items()]

"""Sealing: the manifest over every object, then its digest; then the records go."""

from __future__ import annotations

import re

from kdcache_stores.format.head import head_documents, head_keys
from kdcache_stores.format.header import Header
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.format.manifest import (
    ANNOUNCEMENT,
    CARD,
    MANIFEST,
    RECORDS,
    ROOT,
    SAMPLES,
    SEAL,
    Entry,
    seal_text,
    sha256,
    write_manifest,
)
from kdcache_stores.format.records import Record, announcement, probes_key, write_probes
from kdcache_stores.objects.files import LocalFiles

SEALING = f"{RECORDS}/seal.lock"


def seal_store(
    files: LocalFiles,
    header: Header,
    layouts: list[ArrayLayout],
    sealed: dict[str, Entry],
    records: list[Record],
) -> None:
    """Seal a store whose every shard is committed.

    Args:
        files: the store.
        header: its header.
        layouts: its arrays, with the number of views that it shall have.
        sealed: the objects that an earlier seal lists and that stay as they are.
        records: the shards committed since.

    The order keeps the old views readable at each step of a growth: announce the new manifest,
    lengthen the arrays, replace the manifest, replace the seal.
    """
    entries = dict(sealed)
    entries |= {entry.key: entry for record in records for entry in record.entries}
    first_views = {record.shard.view for record in records}
    if first_views and (key := probes_key(min(first_views))) not in sealed:
        data = write_probes(probe for record in records for probe in record.probes)
        files.put(key, data, replace=True)
        entries[key] = _entry(key, data, "probes")
    for key, kind in ((ROOT, "metadata"), (SAMPLES, "samples"), (CARD, "card")):
        if files.size(key) is not None:
            entries[key] = _entry(key, files.get(key), kind)
    if header.head is not None:
        for key in head_keys(header.head):
            if key not in sealed:
                entries[key] = _entry(key, files.get(key), "head")
    documents = {field.metadata_key: field.document() for field in header.fields.values()}
    documents |= {layout.metadata_key: layout.document() for layout in layouts}
    if header.head is not None:
        documents |= head_documents(header.head)
    entries |= {key: _entry(key, data, "metadata") for key, data in documents.items()}
    manifest = write_manifest(entries.values())
    files.put(ANNOUNCEMENT, announcement(sha256(manifest), layouts[0].views), replace=True)
    for key, data in documents.items():
        if files.size(key) is None or files.get(key) != data:
            files.put(key, data, replace=True)
    files.put(MANIFEST, manifest, replace=True)
    finish_seal(files, sha256(manifest))


def finish_seal(files: LocalFiles, manifest_sha256: str) -> None:
    """The last step, also of a seal that was interrupted after its manifest."""
    files.put(SEAL, seal_text(manifest_sha256), replace=True)
    files.clean()  # before the records go: a crash from here on leaves nothing else to tidy
    files.remove_folder(RECORDS)


def tidy(files: LocalFiles, views: int) -> None:
    """Drop records of sealed views, which a crash after the seal may have left."""
    names = re.compile(rf"{RECORDS}/(\d+)-\d+\.(json|lock)")
    left = 0
    for key in list(files.walk(RECORDS)):
        match = names.fullmatch(key)
        if key == SEALING or (match and int(match[1]) < views):
            files.remove(key)
        else:
            left += 1
    if not left:
        files.remove_folder(RECORDS)


def _entry(key: str, data: bytes, kind: str) -> Entry:
    return Entry(key, len(data), sha256(data), kind)

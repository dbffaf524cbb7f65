"""The shape that all images of a large folder have: found by reading every header, then kept.

Headers of 1.28 million files take most of a minute, their sizes and times a few seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

from kdcache.data.dataset import Dataset
from kdcache.data.folder import FolderDataset
from kdcache.stages import counted

#: Images from which on the shape is kept: headers of fewer are read within a second.
MANY = 10_000
_FORMAT = b"kdcache shape 1\n"


def kept_shape(dataset: Dataset, folder: Path, many: int = MANY) -> tuple[int, int, int] | None:
    """The shape (C, H, W) that all images have, or None; see `Dataset.common_shape`.

    Of a folder of ``many`` images it is kept under the paths, sizes and times of all files, so that
    one that was changed, added or removed is seen.

    Args:
        dataset: any.
        folder: where shapes are kept; nothing is where it cannot be written.
        many: images from which on the shape is kept.
    """
    if not isinstance(dataset, FolderDataset) or len(dataset) < many:
        return dataset.common_shape()
    try:
        path = folder / _identity(dataset)
    except OSError:  # a file that is not there is an error when its turn comes
        return dataset.common_shape()
    kept = _read(path)
    if kept is None:
        kept = (dataset.common_shape(),)
        _write(path, kept)
    return kept[0]


def _identity(dataset: FolderDataset) -> str:
    place = os.path.abspath(dataset.folder)
    digest = hashlib.sha256(_FORMAT + json.dumps([place, dataset.decoder]).encode())
    what = f"looking at the files of {dataset.name} ({dataset.split})"
    for key in counted(dataset.keys, what, "files", len(dataset)):
        status = os.stat(f"{place}/{key}")
        digest.update(json.dumps([key, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def _read(path: Path) -> tuple[tuple[int, int, int] | None] | None:
    try:
        shape = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if shape is None:
        return (None,)
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape)):
        return None
    return ((shape[0], shape[1], shape[2]),)


def _write(path: Path, kept: tuple[tuple[int, int, int] | None]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with suppress(OSError):  # a full or read-only disk: headers are read the next time too
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(kept[0]))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

"""The files of a dataset in shards: which split each holds, and what an index of each says.

An index is made once per file, by reading it through, and kept below the datasets' folder under a name
that the file's size and time of change (or tag) are part of, behind a checksum: another file, another
index; a damaged index is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.data.dataset import Dataset
from kdcache.data.folder import SPLITS
from kdcache.data.holdout import hold_out
from kdcache_stores.errors import DataError, FormatError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.tables import read_metadata, read_table, write_table
from kdcache_stores.objects.ranges import RangeFile, files_of
from kdcache_stores.objects.urls import is_url, redact

_FORMAT = b"kdcache index 1\n"
_WORDS = {word: split for split, words in SPLITS.items() for word in words}
_MOST_ROWS = 2**31
#: Remote files that are read through at once.
_AT_ONCE = 8


class Indexed(NamedTuple):
    """A file, its state when it was indexed, and its index: an Arrow table and its remarks."""

    file: RangeFile
    stamp: tuple[int | str, ...]
    table: Any
    remarks: dict[str, Any]


class Shards(NamedTuple):
    """The files of a dataset by split, and what was chosen about them."""

    splits: dict[str, list[RangeFile]]
    remarks: list[str]


def find_shards(pattern: str, name: str) -> Shards:
    """The files that a pattern names, by the split that the name of each says.

    A word of `SPLITS` in the file's name, or in a folder's below the part of the pattern that has no
    wildcards, is its split, the last one where there are several: imagenet-train-0001.tar. Where no
    name has one, all files are "train". "test" is the first of "test", "val" and so on.

    Raises:
        DataError: no file, or none of train where there are other splits.
    """
    files = files_of(pattern)
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    above = len(redact(fixed).rpartition("/")[0]) if fixed != pattern else None
    words: dict[str, list[RangeFile]] = {}
    for file in files:
        below = os.path.basename(file.where) if above is None else file.where[above:]
        marks = [word for word in re.split(r"[^a-z]+", below.lower()) if word in _WORDS]
        words.setdefault(marks[-1] if marks else "", []).append(file)
    if words.keys() == {""}:
        return Shards({"train": files}, [])
    splits: dict[str, list[RangeFile]] = {}
    used = set()
    for split, usual in SPLITS.items():
        word = next((word for word in usual if word in words), None)
        if word is not None:
            splits[split] = words[word]
            used.add(word)
    if "train" not in splits:
        raise DataError(
            f"{name}: the files are of the splits {sorted(words)}, none of train: classes are numbered "
            f"by those of train. Name its files too, as in {{train,val}}-*.tar"
        )
    unused = [os.path.basename(file.where) for w in words.keys() - used for file in words[w]]
    remarks = [f"{name}: not used are {len(unused)} files: {sorted(unused)[:5]}"] if unused else []
    return Shards(splits, remarks)


def choose_split(shards: Shards, split: str, name: str, make: Callable[[str], Dataset]) -> Dataset:
    """A split made from its files by ``make``; held out of train where there are none for "test".

    Raises:
        DataError: no such split.
    """
    alone = split in ("train", "test") and "test" not in shards.splits
    wanted = "train" if alone else split
    if wanted not in shards.splits:
        raise DataError(
            f"{name} has no files of the split {split!r}; it has {sorted(shards.splits)}"
        )
    dataset = make(wanted)
    dataset.remarks = [*shards.remarks, *dataset.remarks]
    return hold_out(dataset, split) if alone else dataset


def base_name(kind: str, pattern: str) -> str:
    """How a dataset in files is called: by the last part of its pattern, so without a machine's paths."""
    shown = redact(pattern) if is_url(pattern) else pattern
    return f"{kind}:{shown.rstrip('/').rpartition('/')[2]}"


def indexed(
    files: Sequence[RangeFile],
    columns: dict[str, str],
    settings: Mapping[str, Json],
    folder: Path,
    build: Callable[[RangeFile, tuple[int | str, ...]], tuple[Any, dict[str, Any]]],
) -> list[Indexed]:
    """The index of each file, as kept or by ``build``.

    Args:
        files: of one split.
        columns: of an index, as `read_table` takes them.
        settings: what an index depends on beside its file.
        folder: where indices are kept; nothing is where it cannot be written.
        build: from a file and its state to the table and remarks of its index.

    Raises:
        DataError: a file is not there; and what ``build`` raises.
    """

    def index_of(file: RangeFile) -> Indexed:
        try:
            stamp = tuple(file.stamp())
        except FileNotFoundError:
            raise DataError(f"{file.where}: there is no such file") from None
        identity = json.dumps([file.where, stamp, sorted(columns), dict(settings)], sort_keys=True)
        path = folder / hashlib.sha256(_FORMAT + identity.encode()).hexdigest()
        kept = _read_index(path, columns)
        if kept is None:
            table, remarks = build(file, stamp)
            noted = {b"remarks": json.dumps(remarks).encode()}
            _write_index(path, write_table(table.replace_schema_metadata(noted)))
            kept = table, remarks
        return Indexed(file, stamp, *kept)

    if not any(file.remote for file in files):
        return [index_of(file) for file in files]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(index_of, files))


def _read_index(path: Path, columns: dict[str, str]) -> tuple[Any, dict[str, Any]] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        return None
    try:
        table = read_table(data, columns, _MOST_ROWS, str(path))
    except FormatError:
        return None
    return table, json.loads(read_metadata(data)[b"remarks"])


def _write_index(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with suppress(OSError):  # a full or read-only disk: it is made again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

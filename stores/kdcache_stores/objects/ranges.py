"""Files that are read in ranges, on this machine or behind a URL, and those that a pattern names."""

from __future__ import annotations

import fnmatch
import glob
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kdcache_stores.errors import DataError, UsageError
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.files import Stamp
from kdcache_stores.objects.hub import children as hub_children
from kdcache_stores.objects.urls import local_path, redact, split_url

_BRACES = re.compile(r"\{([^{}]*)\}")
_SPAN = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000
"""Names that one pattern may stand for."""


class RangeFile(Protocol):
    """A file of which any part can be read, by any number of threads; pickles without its bytes."""

    where: str
    remote: bool

    def stamp(self) -> Stamp:
        """What changes when the file does, its size first; raises `FileNotFoundError`."""

    def read(self, start: int, length: int, stamp: Stamp | None = None) -> bytes:
        """Exactly these bytes; raises `DataError` where they are not all there.

        Args:
            start: first byte.
            length: their number.
            stamp: as it was when the file was looked at; raises `DataError` if it has changed.
        """


class LocalRanges:
    """A file of this machine."""

    remote = False

    def __init__(self, path: str) -> None:
        self.path = self.where = path

    def stamp(self) -> Stamp:
        """Size and time of change."""
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, length: int, stamp: Stamp | None = None) -> bytes:
        """Exactly these bytes; see `RangeFile`."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if stamp is not None:
                    status = os.fstat(file.fileno())
                    _require_same(self.where, (status.st_size, status.st_mtime_ns), stamp)
                file.seek(start)
                data = bytearray()
                while len(data) < length and (more := file.read(length - len(data))):
                    data += more
        except OSError as error:
            raise DataError(f"{self.where} cannot be read: {error.strerror}") from error
        return _whole(self.where, bytes(data), start, length)


class RemoteRanges:
    """An object of a bucket or web server."""

    remote = True

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self.key = bucket, key
        self.where = f"{bucket.where}/{key}"

    def stamp(self) -> Stamp:
        """Size, and the server's tag of this version if it gives one."""
        size, tag = self.bucket.version(self.key)
        return (size,) if tag is None else (size, tag)

    def read(self, start: int, length: int, stamp: Stamp | None = None) -> bytes:
        """Exactly these bytes; see `RangeFile`."""
        tag = str(stamp[1]) if stamp is not None and len(stamp) > 1 else None
        try:
            data = self.bucket.range(self.key, start, length, tag)
        except FileExistsError:
            raise _changed(self.where) from None
        except FileNotFoundError:
            raise DataError(f"{self.where} is not there any more") from None
        return _whole(self.where, data, start, length)


def _whole(where: str, data: bytes, start: int, length: int) -> bytes:
    if len(data) != length:
        raise DataError(
            f"{where} ends at byte {start + len(data)}, {length} bytes from {start} on were to be "
            "read: it is cut short"
        )
    return data


def _require_same(where: str, now: Stamp, then: Stamp) -> None:
    if now != tuple(then):
        raise _changed(where)


def _changed(where: str) -> DataError:
    return DataError(f"{where} was changed while it was in use: run the same again")


class Opened(io.RawIOBase):
    """A `RangeFile` as a binary file that can be sought; wrap it in `io.BufferedReader`."""

    def __init__(self, file: RangeFile, stamp: Stamp) -> None:
        self.file, self.version, self.at = file, stamp, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; beyond the end too."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: int(self.version[0])}[whence]
        self.at = base + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as the file goes."""
        length = max(0, min(len(buffer), int(self.version[0]) - self.at))
        if length:
            buffer[:length] = self.file.read(self.at, length, self.version)
            self.at += length
        return length


def files_of(pattern: str) -> list[RangeFile]:
    """The files that a path or URL with `*`, `?`, `[...]`, `{a,b}` and `{000..123}` names, by name.

    Args:
        pattern: on this machine `**` stands for any folders. In a URL, wildcards need a place that can be
            listed: a bucket or the Hub. A web server cannot; there braces count the names up.

    Raises:
        DataError: there is none, or one that braces name is absent.
        UsageError: a URL that holds credentials, or wildcards on a web server.
    """
    names = sorted(set(_expand(pattern)))
    files: list[RangeFile] = []
    buckets: dict[str, Bucket] = {}
    for name in names:
        local = local_path(name)
        matching = (
            _local(os.path.expanduser(local)) if local is not None else _remote(name, buckets)
        )
        if not matching:
            raise DataError(f"{redact(name)}: there is no such file")
        files += matching
    return files


def _expand(pattern: str) -> Iterator[str]:
    """ "a{0..2}" -> a0, a1, a2; "{a,b}" -> a, b; several braces: all combinations."""
    parts = _BRACES.split(pattern)
    choices: list[list[str]] = [[part] for part in parts]
    total = 1
    for index in range(1, len(parts), 2):
        span = _SPAN.fullmatch(parts[index])
        if span is None:
            choices[index] = parts[index].split(",")
        else:
            first, last, width = int(span[1]), int(span[2]), len(span[1])
            if last - first >= _MOST:
                raise UsageError(f"{{{parts[index]}}} stands for {last - first + 1} names")
            choices[index] = [f"{number:0{width}d}" for number in range(first, last + 1)]
        total *= len(choices[index])
    if total > _MOST:
        raise UsageError(f"{redact(pattern)} stands for {total} names, at most {_MOST} can be")
    return map("".join, itertools.product(*choices))


def _local(pattern: str) -> list[RangeFile]:
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [LocalRanges(pattern)] if os.path.isfile(pattern) else []
    return [
        LocalRanges(path)
        for path in sorted(glob.glob(pattern, recursive=True))
        if os.path.isfile(path)
    ]


def _remote(url: str, buckets: dict[str, Bucket]) -> list[RangeFile]:
    parts = split_url(url)
    if parts.username or parts.password:
        raise UsageError(
            f"{redact(url)}: credentials do not belong into the name of a dataset, which runs and "
            "stores keep; give them in the environment or ~/.netrc"
        )
    fixed, _, _ = re.split(r"[*?\[]", url, maxsplit=1)[0].rpartition("/")
    rest = url[len(fixed) + 1 :]
    if parts.scheme == "hf":
        fixed, rest = _hub_folder(url, fixed)
    bucket = buckets.setdefault(fixed, Bucket(fixed))
    if not glob.has_magic(rest):
        return [RemoteRanges(bucket, rest)]
    if parts.scheme in ("http", "https"):
        raise UsageError(
            f"{redact(url)}: a web server does not list its files: name them with braces, as in "
            "train-{0000..1023}.tar"
        )
    listing: Callable[[str], tuple[list[str], list[str]]] = bucket.children
    if parts.scheme == "hf":
        base = fixed

        def listing(folder: str) -> tuple[list[str], list[str]]:
            return hub_children(base, folder)

    return [RemoteRanges(bucket, key) for key in _matching(listing, rest.split("/"))]


def _hub_folder(url: str, fixed: str) -> tuple[str, str]:
    """The repository at least: hf://datasets/USER/REPOSITORY."""
    parts = url.split("/")
    base = fixed if fixed.count("/") >= 4 else "/".join(parts[:5])
    return base, url[len(base) + 1 :]


def _matching(
    listing: Callable[[str], tuple[list[str], list[str]]], parts: list[str], folder: str = ""
) -> list[str]:
    """Keys below a folder that match a pattern, part by part."""
    folders, names = listing(folder)
    here = f"{folder}/" if folder else ""
    if len(parts) == 1:
        return [here + name for name in sorted(names) if fnmatch.fnmatchcase(name, parts[0])]
    return [
        key
        for name in sorted(folders)
        if fnmatch.fnmatchcase(name, parts[0])
        for key in _matching(listing, parts[1:], here + name)
    ]


def opened(file: RangeFile, stamp: Stamp) -> io.BufferedReader:
    """A file to read from its start, with the buffer that its distance asks for."""
    return io.BufferedReader(Opened(file, stamp), 2**22 if file.remote else 2**16)

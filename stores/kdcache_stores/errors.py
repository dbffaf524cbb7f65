"""Every error that kdcache raises on purpose, in one tree.

    KDCacheError                 anything wrong with the data, the store or the request
    ├── UsageError               (ValueError) the request makes no sense; names what would
    │   └── UnknownName          no such dataset, model, method, ...; lists what there is
    ├── DataError                (ValueError) images, labels, keys or logits are not as they must be
    ├── MismatchError            (ValueError) two things that must agree differ: store and dataset,
    │                            store and teacher, expected and found digest, views and replay
    ├── StoreError               something about a store itself
    │   ├── StoreNotFound        (FileNotFoundError) nothing there, or something that is no store
    │   ├── UnfinishedStore      not sealed yet: a dump is running or was interrupted
    │   ├── CorruptStore         bytes that differ from what was written
    │   ├── FormatError          (ValueError) a store of a newer format, or metadata that breaks it
    │   ├── StoreInUse           a second writer, or data there that would be overwritten
    │   └── RemoteError          (ConnectionError) a server that does not answer, or refuses
    └── TrainingError            a run that cannot go on: a loss not finite, a wrong checkpoint;
                                 or may not begin: a warning where --strict asks for none

A message says what was expected, what was found, where, and what to do next. The command line
prints it as it stands and exits 1 (2 for `UsageError`).
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class KDCacheError(Exception):
    """Base of all errors raised by kdcache on purpose."""


class UsageError(KDCacheError, ValueError):
    """The request itself makes no sense (exit code 2)."""


class UnknownName(UsageError):
    """A name that is not among the known ones; the message lists them and the closest.

    Args:
        kind: what is named, in the singular: "dataset", "model", "method".
        name: the name that was asked for.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)  # what a file holds may be no text
        hint = f"; did you mean {close[0]!r}?" if close else "."
        super().__init__(f"unknown {kind} {name!r}{hint} There is: {', '.join(names)}")
        self.name = name
        self.known = names


class DataError(KDCacheError, ValueError):
    """Images, labels, keys or logits are not what they must be."""


class MismatchError(KDCacheError, ValueError):
    """Two things that must agree differ; the message names the first difference and both values."""


class StoreError(KDCacheError):
    """Something is wrong with a store."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is nothing at the path, or something that is not a store."""


class UnfinishedStore(StoreError):
    """The store is not sealed: its dump is running or was interrupted."""


class CorruptStore(StoreError):
    """Bytes of the store differ from what was written."""


class FormatError(StoreError, ValueError):
    """The store needs a newer kdcache, or its metadata breaks the format."""


class StoreInUse(StoreError):
    """Another writer is at work, or data is there that must not be overwritten."""


class RemoteError(StoreError, ConnectionError):
    """A server refuses, or does not answer after every retry."""


class TrainingError(KDCacheError):
    """A run cannot go on (a loss that is not finite), or may not begin (a warning under --strict).

    Args:
        lines: the message, a line each where there are several. Every other error is one line.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(self.args)


_REMEDIES = {
    errno.EACCES: "its permissions do not allow this: change them, or choose another place",
    errno.EPERM: "its permissions do not allow this: change them, or choose another place",
    errno.EROFS: "its file system is mounted read-only: choose a place that can be written to",
    errno.ENOSPC: "the disk is full: make room, and run the same again",
    errno.EDQUOT: "the quota is used up: make room, and run the same again",
    errno.ENAMETOOLONG: "the name is longer than its file system allows: choose a shorter one",
    errno.ELOOP: "it is a link that leads back to itself: give the folder itself",
    errno.EISDIR: "it is a folder, and a file is expected: give the file, or move the folder away",
    errno.EEXIST: "something else has this name: move it away, or choose another name",
    errno.ENOTDIR: "a part of it is a file, and a folder is expected: choose another path",
    errno.ENOENT: "there is no such file or folder; the current folder may have been deleted, too",
    errno.ENOSYS: "its file system lacks what this needs, such as locks: choose a local disk",
    errno.ENOLCK: "its file system has no locks to give: choose a local disk",
    errno.ENOTSUP: "its file system lacks what this needs, such as locks: choose a local disk",
    errno.EFBIG: "no file may become so large here: raise the limit (ulimit -f), or choose another disk",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.EIO: "the disk fails to read or write: check it, and copy what it holds",
}


def explain(error: BaseException, where: str | None = None) -> str:
    """One line for an error: an error of the system gets the path, or `where`, and what to do."""
    if not isinstance(error, OSError) or isinstance(error, KDCacheError) or error.errno is None:
        return str(error)
    path = where if where is not None else error.filename
    if path is None and error.errno not in _REMEDIES:
        return str(error)  # of a socket, say: nothing tells that a path is meant
    remedy = _REMEDIES.get(
        error.errno, "the system refuses: repair the cause, and run the same again"
    )
    if path is None and error.errno == errno.ENOENT:
        path = "the current folder or a path below it"
    return f"{'' if path is None else f'{path}: '}{remedy} ({error.strerror})"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system within names this file: those of a write name none, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not isinstance(error, KDCacheError):
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextmanager
def about(where: str) -> Iterator[None]:
    """An error of ours within begins with what it is about, unless it names that."""
    try:
        yield
    except KDCacheError as error:
        if where not in str(error):
            error.args = (f"{where}: {error}", *error.args[1:])
        raise

"""Locks between processes: one place that knows which systems have them."""

from __future__ import annotations

import os

from kdcache_stores.errors import StoreError, explain

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def lock_file(handle: int, path: str | os.PathLike[str], wait: bool = True) -> None:
    """Take the exclusive lock of an open file or folder; it is gone with the handle, or the process.

    Args:
        handle: its file descriptor, which stays the caller's to close.
        path: for errors.
        wait: for a holder; else `BlockingIOError` is raised at once.

    Raises `StoreError` where the system or the file system has no locks.
    """
    if fcntl is None:
        raise StoreError(
            f"{os.fspath(path)}: kdcache runs on Linux and macOS, and this system lacks the file locks "
            "(fcntl) that keep two writers apart. On Windows, run it in WSL 2"
        )
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        raise StoreError(explain(error, os.fspath(path))) from error

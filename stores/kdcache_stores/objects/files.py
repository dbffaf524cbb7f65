"""Objects of a store as local files: read whole, published whole, never overwritten unless asked."""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from kdcache_stores.errors import FormatError, KDCacheError, StoreError, StoreInUse, explain
from kdcache_stores.objects.locking import lock_file
from kdcache_stores.objects.urls import require_local

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOLDER = re.compile(rb"process \d{1,10} on [A-Za-z0-9._-]{1,255}\n")
_HELD: set[int] = set()
"""Handles of the locks that this process holds."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_LOCK = re.compile(r"records/[a-z0-9-]+\.lock")


def check_key(key: str) -> str:
    """The key, if it is a relative path of plain names; otherwise raises `FormatError`."""
    if len(key) > 1024 or not all(_PART.fullmatch(part) for part in key.split("/")):
        raise FormatError(
            f"{key!r:.100} is no object name of a store: plain names between '/' only"
        )
    return key


@contextmanager
def _explained(doing: str, path: str | None = None) -> Iterator[None]:
    """What the system refuses within is a `StoreError`; that a file is missing stays as it is.

    Args:
        doing: for the message: "cannot read".
        path: for errors of the system that name none.
    """
    try:
        yield
    except (FileNotFoundError, KDCacheError):
        raise
    except OSError as error:
        raise StoreError(f"{doing} {explain(error, path)}") from error


class Disk:
    """The system calls that change a disk, a method each, so that tests can make each one fail."""

    def mkdir(self, path: str) -> None:
        """Create one folder; an existing one is fine, and anything else a `NotADirectoryError`."""
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None

    def create(self, path: str, data: bytes) -> None:
        """Create a new file that holds `data`, not yet flushed."""
        with open(path, "xb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    def fsync(self, path: str) -> None:
        """Flush a file, or a folder's entries, to the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; raises `FileExistsError` if the name is taken."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            # No hard links here: claim the name with an empty file, then replace that. A crash in
            # between leaves an empty orphan, which a resumed writer replaces.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            os.replace(source, target)

    def replace(self, source: str, target: str) -> None:
        """Rename a file over another."""
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with suppress(FileNotFoundError):
            os.unlink(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder; a missing one is fine."""
        with suppress(FileNotFoundError):
            os.rmdir(path)


Stamp = tuple[int | str, ...]


class Objects(Protocol):
    """What a reader needs of a place that holds objects: a folder here, a URL elsewhere."""

    where: str
    keeps: bool
    """Whether what was read once is read from this machine the next time."""

    def get(self, key: str, most: int | None = None) -> bytes:
        """The object's bytes; raises `FileNotFoundError`, and `StoreError` for more than `most`."""

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if there is none."""

    def stamp(self, key: str) -> Stamp | None:
        """What changes when the object does: its size first, then whatever tells versions apart."""

    def expect(self, entries: Mapping[str, Any]) -> None:
        """Take note of the manifest's entries, which objects beyond a network are held to."""

    def prefetch(self, keys: Iterable[str]) -> None:
        """These objects are about to be read, in this order."""

    def close(self) -> None:
        """Let go of threads and of what was fetched ahead."""


class LocalFiles:
    """The objects below one folder. Links that leave the folder and special files are refused."""

    keeps = True

    def __init__(self, root: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.root = os.path.abspath(os.fspath(require_local(root)))
        self.where = self.root
        self._real = os.path.realpath(self.root)
        self._disk = disk or Disk()

    def path(self, key: str) -> str:
        """The file of a key, inside the store even if a folder on the way is a link."""
        path = os.path.join(self._real, *check_key(key).split("/"))
        parent = os.path.dirname(path)
        real = os.path.realpath(parent)
        if real != parent:
            raise FormatError(f"{self.where}: the folder of {key} is a link; a store holds none")
        return path

    def get(self, key: str, most: int | None = None) -> bytes:
        """The object's bytes; raises `FileNotFoundError`, and `FormatError` for more than `most`."""
        with self._open(key) as file, _explained("cannot read", self.path(key)):
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise FormatError(f"{self.where}: {key} of {size} bytes is too large")
            return file.readall() or b""

    def map(self, key: str) -> mmap.mmap:
        """The object's bytes, mapped for reading and not copied; raises `FileNotFoundError`."""
        with self._open(key) as file, _explained("cannot read", self.path(key)):
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise StoreError(
                    f"{self.where}: {key} is empty, nothing of it can be mapped"
                ) from None

    def _open(self, key: str) -> io.FileIO:
        path = self.path(key)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for its other end.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise FormatError(f"{self.where}: {key} is a link or no plain file") from None
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise FileNotFoundError(error.errno, "no such object", path) from None
            raise StoreError(f"cannot read {explain(error, path)}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # `open` refuses a folder in its own words
            os.close(handle)
            raise FormatError(f"{self.where}: {key} is no plain file")
        return io.FileIO(handle)

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if there is none."""
        stamp = self.stamp(key)
        return None if stamp is None else stamp[0]

    def stamp(self, key: str) -> tuple[int, int, int] | None:
        """The file's size, number and time of change, or None if there is none."""
        path = self.path(key)
        try:
            status = os.lstat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise StoreError(f"cannot read {explain(error, path)}") from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return status.st_size, status.st_ino, status.st_mtime_ns

    def expect(self, entries: Mapping[str, Any]) -> None:
        """Nothing to note: a file's size and bytes are asked for when they are needed."""

    def prefetch(self, keys: Iterable[str]) -> None:
        """Nothing to start: the system reads files ahead."""

    def close(self) -> None:
        """Nothing stays open."""

    def walk(self, folder: str = "") -> Iterator[str]:
        """Keys of all files below a folder, sorted; links are listed and not followed."""
        top = os.path.join(self._real, *folder.split("/")) if folder else self._real
        for parent, folders, names in os.walk(top, onerror=_require_gone):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            for name in sorted(names + links):
                yield Path(parent, name).relative_to(self._real).as_posix()

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Publish an object: whole, flushed, in one step.

        Raises `FileExistsError` if the key is taken and `replace` is false, `StoreError` if the
        disk is full or refuses.
        """
        target = self.path(key)
        folder = os.path.dirname(target)
        temporary = os.path.join(folder, f".{os.path.basename(target)}.{secrets.token_hex(8)}.tmp")
        disk = self._disk
        try:
            self._make_folders(folder)
            try:
                disk.create(temporary, data)
                disk.fsync(temporary)
                if replace:
                    disk.replace(temporary, target)
                else:
                    disk.link(temporary, target)
            finally:
                disk.unlink(temporary)
            disk.fsync(folder)
        except FileExistsError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.where}: cannot write {key} ({len(data)} bytes): {explain(error, target)}. "
                "Everything that was committed is safe."
            ) from error

    def publish(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Publish an object. One that is there stays, unless it differs and `replace` is true."""
        try:
            self.put(key, data)
        except FileExistsError:
            if replace and self.get(key) != data:
                self.put(key, data, replace=True)

    @contextmanager
    def lock(self, key: str, wait: bool = False) -> Iterator[None]:
        """Hold a lock that the system drops if this process dies, even by SIGKILL.

        Its file names the holder and goes with the lock, and so does its folder, once empty. A
        killed holder leaves the file behind; it locks nothing, and whoever takes the lock next
        takes the file over.

        Raises `StoreInUse` naming the holder if it is taken, unless told to `wait`.
        """
        path = self.path(key)
        handle = self._locked(path, key, wait)
        _HELD.add(handle)
        try:
            with suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            if _is_at(handle, path):
                with suppress(
                    OSError
                ):  # it stays, as after a kill; and a folder with others' files
                    os.unlink(path)
                    if os.path.dirname(path) != self._real:
                        os.rmdir(os.path.dirname(path))
            _HELD.discard(handle)
            os.close(handle)

    def _locked(self, path: str, key: str, wait: bool) -> int:
        """The handle of the lock's file, locked; one that its last holder removed meanwhile is none."""
        while True:
            try:
                with _explained("cannot write", path):
                    self._make_folders(os.path.dirname(path))
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    handle = os.open(path, flags, 0o666)
            except FileNotFoundError:  # the folder went with the last holder
                continue
            try:
                lock_file(handle, path, wait)
            except BlockingIOError:
                holder = _HOLDER.fullmatch(os.pread(handle, 300, 0))
                os.close(handle)
                who = holder[0].decode().strip() if holder else "another process"
                raise StoreInUse(
                    f"{self.where}: {who} is writing here and holds {key}. Wait until it has ended, or "
                    "end it, and run the same again; or write to another place."
                ) from None
            except StoreError:
                os.close(handle)
                raise
            if _is_at(handle, path):
                return handle
            os.close(handle)

    def remove(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        path = self.path(key)
        with _explained("cannot remove", path):
            self._disk.unlink(path)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and the files in it (no deeper); a missing one is fine."""
        path = os.path.join(self._real, folder)
        if os.path.islink(path) or not os.path.isdir(path):
            return
        with _explained("cannot remove", path):
            for name in sorted(os.listdir(path)):
                self._disk.unlink(os.path.join(path, name))
            self._disk.rmdir(path)
            self._disk.fsync(self._real)

    def temporaries(self) -> list[str]:
        """Paths, relative to the store, of temporary files that an interrupted writer left."""
        return [key for key in self.walk() if is_temporary(key)]

    def clean(self) -> None:
        """Remove what interrupted writers left under temporary names."""
        for key in self.temporaries():
            path = os.path.join(self._real, key)
            with _explained("cannot remove", path):
                self._disk.unlink(path)

    def _make_folders(self, folder: str) -> None:
        missing: list[str] = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            try:
                self._disk.mkdir(path)
            except FileExistsError as error:  # a file, or a link that leads nowhere
                raise StoreError(f"cannot make {explain(error, path)}") from error
            self._disk.fsync(os.path.dirname(path))


def _require_gone(error: OSError) -> None:
    """Of a folder that cannot be listed: there must be none. Raises `StoreError`."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise StoreError(f"cannot read {explain(error)}") from error


def _is_at(handle: int, path: str) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """A forked worker must not hold its parent's locks beyond the parent's death."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def is_temporary(key: str) -> bool:
    """Whether a listed key is a temporary name."""
    return _TEMPORARY.fullmatch(key.rsplit("/", 1)[-1]) is not None


def is_leftover(key: str) -> bool:
    """Whether a listed key is what a killed writer may leave and no store: a temporary name, a lock."""
    return is_temporary(key) or _LOCK.fullmatch(key) is not None

"""Disks that fail, disks that lose what was not flushed, and one that never flushes."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache_stores.objects.files import Disk


class QuickDisk(Disk):
    """Flushes nothing: most tests lose no power."""

    def fsync(self, path: str) -> None:
        os.stat(path)


class FailingDisk(QuickDisk):
    """Does the n-th call only half, or not at all, and fails; every later call fails too."""

    def __init__(self, n: int, code: int = errno.EIO) -> None:
        self.left = n
        self.code = code
        self.calls = 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls > self.left:
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: str, data: bytes) -> None:
        if self.calls + 1 > self.left:
            super().create(path, data[: len(data) // 2])
        self._count()
        super().create(path, data)


@dataclass
class LossyDisk(QuickDisk):
    """Does everything, and remembers it, so that a power cut after any call can be played out."""

    log: list[tuple[Any, ...]] = field(default_factory=list)

    def create(self, path: str, data: bytes) -> None:
        super().create(path, data)
        self.log.append(("create", path, bytes(data)))


def _wrap(name: str) -> None:
    original = getattr(QuickDisk, name)

    def counted(self: FailingDisk, *arguments: str) -> None:
        self._count()
        original(self, *arguments)

    def logged(self: LossyDisk, *arguments: str) -> None:
        original(self, *arguments)
        self.log.append((name, *arguments))

    setattr(FailingDisk, name, counted)
    setattr(LossyDisk, name, logged)


for _name in ("mkdir", "fsync", "link", "replace", "unlink", "rmdir"):
    _wrap(_name)


def after_power_cut(
    before: dict[str, bytes], log: list[tuple[Any, ...]], rng: random.Random, keep: float
) -> dict[str, bytes]:
    """Files that a power cut after the last call of `log` may leave.

    A change of a folder is certain only once that folder was flushed; else it is kept with
    probability `keep`, whatever became of changes before and after it. The bytes of a file are
    certain only once the file was flushed; else they are whole, torn, zero or gone.

    Args:
        before: files that were there, and safe, before the log: bytes by path.
        log: calls of a `LossyDisk`.
        rng: chooses among what may be.
        keep: probability that an unflushed change survives; 0 and 1 are the two extremes.
    """
    bytes_of = dict(enumerate(before.values()))
    live = {path: number for number, path in enumerate(before)}
    disk = dict(live)
    safe = set(bytes_of)
    lost_folders: set[str] = set()
    for step, (name, *arguments) in enumerate(log):
        changed = arguments[-1] if name in ("link", "replace") else arguments[0]
        later = log[step + 1 :]
        folder = os.path.dirname(changed)
        stays = ("fsync", folder) in later or rng.random() < keep
        if name == "mkdir":
            if not stays:
                lost_folders.add(changed)
            else:
                lost_folders.discard(changed)
        elif name == "create":
            number = len(bytes_of)
            bytes_of[number] = arguments[1]
            live[changed] = number
            if stays:
                disk[changed] = number
        elif name == "fsync" and changed in live:
            safe.add(live[changed])
        elif name in ("link", "replace"):
            number = live[arguments[0]]
            live[changed] = number
            if stays:
                disk[changed] = number
            if name == "replace":
                del live[arguments[0]]
                if stays:
                    disk.pop(arguments[0], None)
        elif name == "unlink":
            live.pop(changed, None)
            if stays:
                disk.pop(changed, None)
    files = {}
    for path, number in disk.items():
        if any(path.startswith(f"{folder}/") for folder in lost_folders):
            continue
        data = bytes_of[number]
        if number not in safe and rng.random() >= keep:
            data = rng.choice([b"", data[: len(data) // 2], bytes(len(data))])
        files[path] = data
    return files


def restore(files: dict[str, bytes], source: Path, target: Path) -> None:
    """Write files that were below `source` below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        place = target / os.path.relpath(path, source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

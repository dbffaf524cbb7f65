"""What the system refuses is a StoreError that names the file and says what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache_stores import UsageError, open_store
from kdcache_stores.errors import StoreError, explain, naming
from kdcache_stores.objects.files import LocalFiles

from .faults import FailingDisk

READS: dict[str, Callable[[LocalFiles], object]] = {
    "get": lambda files: files.get("a/b"),
    "map": lambda files: files.map("a/b"),
    "stamp": lambda files: files.stamp("a/b"),
    "size": lambda files: files.size("a/b"),
    "walk": lambda files: list(files.walk()),
    "walk a folder": lambda files: list(files.walk("a")),
    "temporaries": lambda files: files.temporaries(),
    "lock": lambda files: files.lock("a/b.lock").__enter__(),
    "put": lambda files: files.put("a/b", b""),
    "remove": lambda files: files.remove("a/b"),
    "clean": lambda files: files.clean(),
}
TEMPORARY = ".b.0123456789abcdef.tmp"
WRITES: dict[str, Callable[[LocalFiles], object]] = {
    "lock": lambda files: files.lock("new/b.lock").__enter__(),
    "put": lambda files: files.put("a/b", b""),
    "publish": lambda files: files.publish("a/b", b"", replace=True),
    "remove": lambda files: files.remove("a/b"),
    "remove a folder": lambda files: files.remove_folder("a"),
    "clean": lambda files: files.clean(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("place", ["loop", "long"])
def test_a_folder_that_cannot_be_reached(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    root = tmp_path / {"loop": "loop", "long": "x" * 300}[place]
    with pytest.raises(StoreError) as refused:
        READS[name](LocalFiles(root))
    assert str(root) in str(refused.value)
    assert "Errno" not in str(refused.value)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TEMPORARY).touch()
    with pytest.raises(StoreError) as refused:
        WRITES[name](LocalFiles(tmp_path, FailingDisk(0, code)))
    text = str(refused.value)
    assert str(tmp_path) in text
    assert explain(OSError(code, "")).partition(" (")[0] in text  # the remedy
    assert "Errno" not in text


def test_what_is_missing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "none", tmp_path / "file", tmp_path):
        files = LocalFiles(root)
        assert (files.size("a"), files.stamp("a/b"), list(files.walk("a"))) == (None, None, [])
        with pytest.raises(FileNotFoundError):
            files.get("a")


def test_an_error_gets_the_name_of_the_file() -> None:
    with pytest.raises(OSError, match="No space") as refused, naming("results.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert explain(refused.value).startswith("results.json: the disk is full")
    assert explain(OSError(errno.ENOSPC, "x")).startswith("the disk is full")
    assert explain(OSError(errno.ENOENT, "x")).startswith("the current folder")


def test_no_path_holds_a_null_character() -> None:
    with pytest.raises(UsageError, match=r"'a\\x00b': no path holds a null"):
        open_store("a\0b")

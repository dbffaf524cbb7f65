"""Locks where there are none: another system, or a file system without them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache_stores.errors import StoreError
from kdcache_stores.objects import locking
from kdcache_stores.objects.files import LocalFiles

#: A Python that has no fcntl, as on Windows.
_WITHOUT = "import sys; sys.modules['fcntl'] = None; "


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_system_without_locks_reads_and_says_where_kdcache_writes(
    store_path: Path, tmp_path: Path
) -> None:
    call = "from kdcache_cli.app import main; sys.exit(main({!r}))"
    read = run(_WITHOUT + call.format(["inspect", str(store_path)]), tmp_path)
    assert read.returncode == 0, read.stderr
    write = run(
        _WITHOUT + "from kdcache_stores.objects.files import LocalFiles\n"
        "with LocalFiles('here').lock('lock'): pass",
        tmp_path,
    )
    assert "StoreError" in write.stderr
    assert "runs on Linux and macOS" in write.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    with (
        pytest.raises(StoreError, match=r"here/lock: .*locks.*choose a local disk"),
        LocalFiles(tmp_path / "here").lock("lock"),
    ):
        pass


def test_the_current_folder_was_deleted(store_path: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.rmdir(os.getcwd()); from kdcache_cli.app import main; "
        "sys.exit(main(['inspect', 'store.zarr']))"
    )
    result = run(code, gone)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr

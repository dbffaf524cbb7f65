"""A dump may stop at any call, or lose power at any call: nothing wrong is ever read."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import KDCacheError, StoreError, UnfinishedStore, open_store
from kdcache_stores.manifest import sha256
from kdcache_stores.records import RecordBook

from .conftest import dump, make_logits, make_samples, open_writer, tree, write_pending
from .faults import FailingDisk, LossyDisk, after_power_cut, restore

SMALL = {"samples": make_samples(30), "shard_rows": 15}
"""Two shards a view."""


def small_dump(path: Path, views: int = 2, **changes: object) -> Path:
    return dump(path, views, **SMALL, **changes)


def check_views(path: Path) -> None:
    store = open_store(path)
    for view in range(store.n_views):
        expected = make_logits(view, 30).astype(np.float16).astype(np.float32)
        assert np.array_equal(store.read(view), expected)


def check_committed(path: Path, views: int = 2) -> int:
    """Every shard that has a record is whole; returns how many there are."""
    with open_writer(path, views, **SMALL) as writer:
        book = RecordBook(writer.files, writer.shards)
        book.refresh()
        for record in book.found.values():
            for entry in record.entries:
                assert sha256(writer.files.get(entry.key)) == entry.sha256
        return len(book.found)


SOME_CALLS = pytest.param(7, id="some-calls")
EVERY_CALL = pytest.param(1, id="every-call", marks=pytest.mark.slow)


@pytest.mark.parametrize("stride", [SOME_CALLS, EVERY_CALL])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_at_any_call(tmp_path: Path, code: int, stride: int) -> None:
    whole = tree(small_dump(tmp_path / "whole"))
    n, finished, full = 0, False, False
    while not finished:
        path = tmp_path / "failing"
        shutil.rmtree(path, ignore_errors=True)
        try:
            small_dump(path, disk=FailingDisk(n, code))
            finished = True
        except StoreError as error:
            full = full or "the disk is full" in str(error)
        except OSError:
            pass  # a call that only tidies up
        if not finished:
            with contextlib.suppress(KDCacheError):
                check_views(path)
            small_dump(path)
        assert tree(path) == whole, f"after failing at call {n}"
        n += stride
    assert n > 100
    assert full == (code == errno.ENOSPC)


@pytest.mark.parametrize("stride", [SOME_CALLS, EVERY_CALL])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_cuts_of_a_dump(tmp_path: Path, keep: float, stride: int) -> None:
    disk = LossyDisk()
    path = small_dump(tmp_path / "dump", disk=disk)
    whole = tree(path)
    rng = random.Random(7)
    seen = set()
    for cut in reversed(range(len(disk.log), -1, -stride)):
        again = tmp_path / "again"
        shutil.rmtree(again, ignore_errors=True)
        restore(after_power_cut({}, disk.log[:cut], rng, keep), path, again)
        try:
            check_views(again)
            seen.add("sealed")
        except KDCacheError as error:
            seen.add(type(error).__name__)
        check_committed(again)
        small_dump(again)
        assert tree(again) == whole, f"after a power cut at call {cut}"
    assert seen == {"UnfinishedStore", "StoreNotFound", "sealed"}


@pytest.mark.parametrize("stride", [SOME_CALLS, EVERY_CALL])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_cuts_of_a_growth_leave_the_old_views_readable(
    tmp_path: Path, keep: float, stride: int
) -> None:
    path = small_dump(tmp_path / "dump", views=1)
    before = {str(path / name): data for name, data in tree(path).items()}
    disk = LossyDisk()
    small_dump(path, views=2, disk=disk)
    whole = tree(path)
    digests = open_store(path).view_digests
    rng = random.Random(8)
    views = set()
    for cut in reversed(range(len(disk.log), -1, -stride)):
        again = tmp_path / "again"
        shutil.rmtree(again, ignore_errors=True)
        restore(after_power_cut(before, disk.log[:cut], rng, keep), path, again)
        store = open_store(again)  # never unreadable
        views.add(store.n_views)
        check_views(again)
        assert store.view_digests == digests[: store.n_views]
        assert store.verify().ok
        small_dump(again, views=2)
        assert tree(again) == whole, f"after a power cut at call {cut}"
    assert views == {1, 2}


def test_readers_of_old_views_survive_each_step_of_a_growth(tmp_path: Path) -> None:
    path = small_dump(tmp_path / "dump", views=1)

    class Watching(LossyDisk):
        def __getattribute__(self, name: str) -> object:
            if name in ("link", "replace", "unlink"):
                check_views(path)
            return super().__getattribute__(name)

    reader = open_store(path)
    small_dump(path, views=2, disk=Watching())
    assert np.array_equal(reader.read(0), open_store(path).read(0))


def test_a_stranger_without_a_record_is_adopted_or_replaced(tmp_path: Path) -> None:
    whole = tree(small_dump(tmp_path / "whole"))
    for data in (whole["logits/values/c/0/0/0"], b"", b"other bytes"):
        path = tmp_path / "orphan"
        shutil.rmtree(path, ignore_errors=True)
        with open_writer(path, 2, **SMALL) as writer:
            orphan = path / "logits/values/c/0/0/0"
            orphan.parent.mkdir(parents=True)
            orphan.write_bytes(data)
            inode = orphan.stat().st_ino
            write_pending(writer)
            assert (orphan.stat().st_ino == inode) == (data == whole["logits/values/c/0/0/0"])
            writer.seal()
        assert tree(path) == whole


def test_missing_torn_and_misplaced_shards_are_written_again(tmp_path: Path) -> None:
    whole = tree(small_dump(tmp_path / "whole"))
    path = tmp_path / "part"
    with open_writer(path, 2, **SMALL) as writer:
        write_pending(writer)
        shards = writer.shards
    (path / "logits/values/c/0/0/0").unlink()
    torn = path / "logits/values/c/0/1/0"
    torn.write_bytes(torn.read_bytes()[:-1])
    record = path / "records/1-0.json"
    record.write_bytes(record.read_bytes().replace(b'"correct": 1', b'"correct": 2'))
    with open_writer(path, 2, **SMALL) as writer:
        assert writer.pending() == shards[:3]
        with pytest.raises(UnfinishedStore, match="3 of 4 shards are missing"):
            writer.seal()
    flipped = path / "logits/values/c/1/1/0"
    data = bytearray(flipped.read_bytes())
    data[10] ^= 1
    flipped.write_bytes(data)
    with open_writer(path, 2, **SMALL, repair=True) as writer:
        assert writer.pending() == shards  # with `repair` every byte is looked at
    small_dump(path, repair=True)
    assert tree(path) == whole


def kill_loops(tmp_path: Path, kills: int, at_once: int = 2) -> None:
    """Kill dumps in several processes at once; they mostly wait."""
    script = Path(__file__).parent / "kill_loop.py"
    each = kills // at_once
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "SOURCE_DATE_EPOCH": "17",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / str(seed)), str(each), str(seed)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in range(at_once)
    ]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert f"{each} kills" in output


def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_loops(tmp_path, 200)


@pytest.mark.slow
def test_a_thousand_kills(tmp_path: Path) -> None:
    kill_loops(tmp_path, 1000)

"""A dump may stop at any call, or lose power at any call: nothing wrong is ever read."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import KDCacheError, StoreError, UnfinishedStore, open_store, verify
from kdcache_stores.encodings.fidelity import measure
from kdcache_stores.format.manifest import sha256
from kdcache_stores.format.records import RecordBook

from .conftest import dump, make_logits, make_samples, open_writer, tree, write_pending
from .faults import FailingDisk, LossyDisk, after_power_cut, restore

SMALL = {"samples": make_samples(30), "shard_rows": 15}
"""Two shards a view."""


def small_dump(path: Path, views: int = 2, **changes: object) -> Path:
    return dump(path, views, **SMALL, **changes)


@functools.cache
def decoded(encoding: str) -> list[np.ndarray]:
    """What a store of two views must hold."""
    live = [make_logits(view, 30) for view in range(2)]
    if encoding == "float16":
        return [logits.astype(np.float16).astype(np.float32) for logits in live]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(small_dump(Path(folder) / "store", encoding=encoding))
        found = [store.read(view) for view in range(2)]
    for logits, rows in zip(live, found, strict=True):
        assert measure(logits, rows)["kl_z_mean"] < 4e-4
    return found


def check_views(path: Path, encoding: str = "float16") -> None:
    store = open_store(path)
    for view in range(store.n_views):
        assert np.array_equal(store.read(view), decoded(encoding)[view])


def check_committed(path: Path, views: int = 2, encoding: str = "float16") -> int:
    """Every shard that has a record is whole; returns how many there are."""
    with open_writer(path, views, encoding, **SMALL) as writer:
        book = RecordBook(writer.files, writer.shards)
        book.refresh()
        for record in book.committed.values():
            for entry in record.entries:
                assert sha256(writer.files.get(entry.key)) == entry.sha256
        return len(book.committed)


# `compact` keeps more objects, some of which other shards hang on: four times as many calls.
CALLS = pytest.mark.parametrize(
    ("encoding", "stride"),
    [
        pytest.param("float16", 7, id="float16-some-calls"),
        pytest.param("compact", 61, id="compact-some-calls"),
        pytest.param("float16", 1, id="float16-every-call", marks=pytest.mark.slow),
        pytest.param("compact", 1, id="compact-every-call", marks=pytest.mark.slow),
    ],
)


@CALLS
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_at_any_call(tmp_path: Path, code: int, encoding: str, stride: int) -> None:
    whole = tree(small_dump(tmp_path / "whole", encoding=encoding))
    n, finished, full = 0, False, False
    while not finished:
        path = tmp_path / "failing"
        shutil.rmtree(path, ignore_errors=True)
        try:
            small_dump(path, encoding=encoding, disk=FailingDisk(n, code))
            finished = True
        except StoreError as error:
            full = full or "the disk is full" in str(error)
        except OSError:
            pass  # a call that only tidies up
        if not finished:
            with contextlib.suppress(KDCacheError):
                check_views(path, encoding)
            small_dump(path, encoding=encoding)
        assert tree(path) == whole, f"after failing at call {n}"
        n += stride
    assert n > 100
    assert full == (code == errno.ENOSPC)


@CALLS
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_cuts_of_a_dump(tmp_path: Path, keep: float, encoding: str, stride: int) -> None:
    disk = LossyDisk()
    path = small_dump(tmp_path / "dump", encoding=encoding, disk=disk)
    whole = tree(path)
    rng = random.Random(7)
    seen = set()
    for cut in [0, *reversed(range(len(disk.log), 0, -stride))]:
        again = tmp_path / "again"
        shutil.rmtree(again, ignore_errors=True)
        restore(after_power_cut({}, disk.log[:cut], rng, keep), path, again)
        try:
            check_views(again, encoding)
            seen.add("sealed")
        except KDCacheError as error:
            seen.add(type(error).__name__)
        check_committed(again, encoding=encoding)
        small_dump(again, encoding=encoding)
        assert tree(again) == whole, f"after a power cut at call {cut}"
    assert seen == {"UnfinishedStore", "StoreNotFound", "sealed"}


@CALLS
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_cuts_of_a_growth_leave_the_old_views_readable(
    tmp_path: Path, keep: float, encoding: str, stride: int
) -> None:
    path = small_dump(tmp_path / "dump", views=1, encoding=encoding)
    before = {str(path / name): data for name, data in tree(path).items()}
    disk = LossyDisk()
    small_dump(path, views=2, encoding=encoding, disk=disk)
    whole = tree(path)
    digests = open_store(path).view_digests
    rng = random.Random(8)
    views = set()
    for cut in [0, *reversed(range(len(disk.log), 0, -stride))]:
        again = tmp_path / "again"
        shutil.rmtree(again, ignore_errors=True)
        restore(after_power_cut(before, disk.log[:cut], rng, keep), path, again)
        store = open_store(again)  # never unreadable
        views.add(store.n_views)
        check_views(again, encoding)
        assert store.view_digests == digests[: store.n_views]
        assert verify(store).ok
        small_dump(again, views=2, encoding=encoding)
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


def kill_loops(tmp_path: Path, kills: int, encoding: str, at_once: int = 2) -> None:
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
            [
                sys.executable,
                str(script),
                str(tmp_path / str(seed)),
                str(each),
                str(seed),
                encoding,
            ],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in range(at_once)
    ]
    outputs = [process.communicate()[0] for process in processes]  # all, before one may fail
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        kills_done = re.search(r"(\d+) kills", output)
        assert kills_done is not None
        assert int(kills_done[1]) >= each


@pytest.mark.parametrize(("encoding", "kills"), [("float16", 30), ("compact", 8)])
def test_some_kills(tmp_path: Path, encoding: str, kills: int) -> None:
    kill_loops(tmp_path, kills, encoding)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float16", "compact"])
def test_a_thousand_kills(tmp_path: Path, encoding: str) -> None:
    kill_loops(tmp_path, 1000, encoding)

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr

from kdcache_stores import (
    DataError,
    MismatchError,
    StoreInUse,
    StoreNotFound,
    UnfinishedStore,
    UsageError,
    open_store,
    verify,
)

from .conftest import (
    CLASSES,
    SAMPLES,
    dump,
    make_logits,
    make_plan,
    make_probe,
    make_samples,
    make_teacher,
    open_writer,
    tree,
    write_pending,
)


def test_reads_what_was_written(store_path: Path) -> None:
    with open_store(store_path) as store:
        assert store.n_views == 3
        assert len(store) == SAMPLES
        assert store.classes == CLASSES
        assert store.keys == make_samples().keys
        assert np.array_equal(store.labels, make_samples().labels)
        assert store.plan == make_plan(make_samples())
        assert store.teacher == make_teacher()
        assert store.probes == [make_probe(row, view) for view in range(3) for row in (0, 17, 34)]
        for view in range(3):
            expected = make_logits(view).astype(np.float16).astype(np.float32)
            assert np.array_equal(store.read(view), expected)
            rows = np.array([49, 0, 3, 3, -1])
            assert np.array_equal(store.read(view, rows), expected[rows])
            assert np.array_equal(store.read(view, slice(5, 45, 7)), expected[5:45:7])
        order = [2, 0, 1, 1, 0]
        for wanted, (view, values) in zip(order, store.views(order), strict=True):
            assert view == wanted
            assert np.array_equal(values, store.read(view))
        again = pickle.loads(pickle.dumps(store))
        assert np.array_equal(again.read(1), store.read(1))
        report = verify(store)
        assert report.ok
        assert report.notes == []


def test_zarr_reads_the_same_numbers(store_path: Path) -> None:
    values = zarr.open_group(store_path, mode="r")["logits/values"][:]
    store = open_store(store_path)
    for view in range(3):
        assert np.array_equal(values[view].astype(np.float32), store.read(view))


def test_resumed_dump_is_byte_identical(tmp_path: Path) -> None:
    whole = tree(dump(tmp_path / "whole"))
    for stop in range(9):
        with open_writer(tmp_path / "part") as writer:
            assert writer.done == stop
            write_pending(writer, 1)
            if writer.pending():
                with pytest.raises(UnfinishedStore, match="missing"):
                    writer.seal()
            else:
                writer.seal()
        if stop < 8:
            with pytest.raises(UnfinishedStore):
                open_store(tmp_path / "part")
    assert tree(tmp_path / "part") == whole


def test_growth_keeps_the_old_views(tmp_path: Path) -> None:
    path = dump(tmp_path / "grown", views=2)
    old = open_store(path)
    digests = old.view_digests
    with open_writer(path, views=4) as writer:
        assert not writer.sealed
        assert {shard.view for shard in writer.pending()} == {2, 3}
        write_pending(writer)
        assert np.array_equal(open_store(path).read(1), old.read(1))
        writer.seal()
        assert writer.sealed
    grown = open_store(path)
    assert grown.n_views == 4
    assert grown.view_digests[:2] == digests
    assert grown.view_digests == open_store(dump(tmp_path / "once", views=4)).view_digests
    assert verify(grown).ok
    assert np.array_equal(old.read(0), grown.read(0))


def test_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    writers = [open_writer(tmp_path / "store") for _ in range(4)]
    parts = [writer.pending((i, 4)) for i, writer in enumerate(writers)]
    assert sorted(shard for part in parts for shard in part) == writers[0].shards
    write_pending(writers[0], 1)
    assert writers[3].pending((3, 4)) == parts[3]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"teacher": make_teacher(weights_sha256="cd" * 32)}, "teacher.weights_sha256"),
        ({"teacher": make_teacher(precision="bfloat16")}, "teacher.precision"),
        ({"plan": make_plan(make_samples(), seed=8)}, "plan.seed"),
        ({"encoding": "float32"}, "fields.logits.encoding.name"),
        ({"config": {"batch_size": 32}}, "config.batch_size"),
        ({"hash_keys": True}, "keys"),
    ],
)
def test_resuming_names_the_first_difference(store_path: Path, changes: dict, name: str) -> None:
    with pytest.raises(MismatchError, match=name):
        open_writer(store_path, **changes)


def test_refusals(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        open_store(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(StoreInUse):
        open_writer(tmp_path / "other")
    with pytest.raises(MismatchError, match="content digest"):
        open_store(store_path, expect="0" * 64)
    store = open_store(store_path)
    assert open_store(store_path, expect=store.digest).digest == store.digest
    with pytest.raises(UsageError):
        store.read(3)
    with pytest.raises(UsageError):
        store.read(0, [SAMPLES])
    with pytest.raises(MismatchError, match="grow"):
        open_writer(store_path, views=2)
    writer = open_writer(tmp_path / "new")
    shard = writer.pending()[0]
    bad = make_logits(0)[shard.start : shard.stop]
    bad[3, 4] = np.nan
    with pytest.raises(DataError, match=r"row 3 .*train/00003"):
        writer.write(shard, {"logits": bad})
    with pytest.raises(DataError, match="floats"):
        writer.write(shard, {"logits": bad[:-1]})

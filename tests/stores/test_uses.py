"""Importing, sharing between processes and writers, reading ahead."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import (
    CorruptStore,
    DataError,
    FieldSpec,
    MismatchError,
    Samples,
    Store,
    StoreError,
    StoreInUse,
    UsageError,
    describe,
    import_npz,
    open_store,
    verify,
    write_arrays,
)

from .conftest import (
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
from .faults import QuickDisk


def half(view: int) -> np.ndarray:
    return make_logits(view).astype(np.float16).astype(np.float32)


def test_samples() -> None:
    samples = make_samples()
    assert samples.hash_keys().fingerprint == samples.fingerprint
    assert samples.hash_keys().hash_keys().keys == samples.hash_keys().keys
    for keys, labels in (
        (["ab", "c"], [0, 1]),  # the same text, cut elsewhere
        (["a", "bc"], [0, 2]),
        (["bc", "a"], [1, 0]),
    ):
        other = Samples(keys, np.array(labels))
        assert other.fingerprint != Samples(["a", "bc"], np.array([0, 1])).fingerprint
    for keys, labels in ((["a", "a"], [0, 1]), (["a", ""], [0, 1]), (["a"], [0, 1]), (["a"], [-2])):
        with pytest.raises(DataError):
            Samples(keys, np.array(labels))
    with pytest.raises(DataError, match="integers"):
        Samples(["a"], np.array([0.5]))
    with pytest.raises(DataError, match="text"):
        Samples(["\ud800"], np.array([0])).fingerprint  # noqa: B018


def test_digests_depend_on_what_they_must(tmp_path: Path) -> None:
    plan, teacher = make_plan(make_samples()), make_teacher()
    assert make_plan(make_samples(), dataset="other", notes={"a": 1}).digest == plan.digest
    assert make_plan(make_samples(), seed=8).digest != plan.digest
    assert make_plan(make_samples(49)).digest != plan.digest
    assert make_teacher(architecture="x", file_sha256="00", notes={"a": 1}).digest == teacher.digest
    assert make_teacher(preprocessing={"mean": [0.6]}).digest != teacher.digest
    first = open_store(dump(tmp_path / "a", provenance={"command": "one", "time": "then"}))
    with open_writer(tmp_path / "elsewhere" / "b", provenance={"host": "other"}) as writer:
        for shard in reversed(writer.pending()):
            rows = slice(shard.start, shard.stop)
            writer.write(shard, {"logits": make_logits(shard.view)[rows]})
        writer.seal()
    second = open_store(tmp_path / "elsewhere" / "b")
    assert first.digest == second.digest
    assert first.view_digests == second.view_digests
    differing = {key for key in first.source.entries if not key.startswith("probes")}
    differing = {k for k in differing if first.source.entries[k] != second.source.entries[k]}
    assert differing == {"zarr.json"}  # provenance lives there and nowhere else
    assert open_store(dump(tmp_path / "c", encoding="float32")).digest != first.digest


def test_write_arrays(tmp_path: Path) -> None:
    logits = np.stack([make_logits(view) for view in range(2)])
    samples = make_samples()
    with pytest.raises(UsageError, match="2 views of logits need a plan"):
        write_arrays(tmp_path / "x", logits, samples=samples)
    plan = make_plan(samples)
    store = write_arrays(tmp_path / "a", logits, samples=samples, plan=plan, teacher=make_teacher())
    assert np.array_equal(store.read(1), half(1))
    assert store.plan == plan
    one = write_arrays(tmp_path / "b", logits[0].astype("f8"), samples=samples)
    assert one.n_views == 1
    assert one.plan.augmentation == {"name": "fixed"}
    assert one.teacher.architecture == "unknown"
    other = write_arrays(tmp_path / "c", logits[1], samples=samples)
    assert other.teacher.digest != one.teacher.digest
    maps = np.zeros((2, SAMPLES, 3, 2, 2), np.float32)
    both = write_arrays(
        tmp_path / "d", {"logits": logits, "maps": maps}, samples=samples, plan=plan
    )
    assert both.read(1, field="maps").shape == (SAMPLES, 3, 2, 2)
    with pytest.raises(DataError, match="views"):
        write_arrays(tmp_path / "e", logits[:, :-1], samples=samples, plan=plan)


def test_import_npz(tmp_path: Path) -> None:
    samples, file = make_samples(), tmp_path / "logits.npz"
    np.savez(file, logits=make_logits(0), keys=np.array(samples.keys), labels=samples.labels)
    store = import_npz(file, tmp_path / "store", encoding="float32")
    assert np.array_equal(store.read(0), make_logits(0))
    assert np.array_equal(store.labels, samples.labels)
    np.savez(file, logits=make_logits(0), keys=np.array(samples.keys))
    assert (import_npz(file, tmp_path / "unlabelled").labels == -1).all()
    np.savez(file, logits=make_logits(0))
    with pytest.raises(DataError, match="lacks"):
        import_npz(file, tmp_path / "x")
    np.savez(file, logits=make_logits(0), keys=np.array(samples.keys, dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        import_npz(file, tmp_path / "x")
    file.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="plain arrays"):
        import_npz(file, tmp_path / "x")
    odds = np.exp(make_logits(0))
    shares = odds / odds.sum(-1, keepdims=True)
    np.savez(file, logits=shares, keys=np.array(samples.keys))
    with pytest.raises(DataError, match=r"logits are probabilities.*np\.log"):
        import_npz(file, tmp_path / "x")
    np.savez(file, logits=np.log(shares), keys=np.array(samples.keys))
    import_npz(file, tmp_path / "logarithms")
    assert not (tmp_path / "x").exists()


def test_unlabelled_stores_have_no_top1(tmp_path: Path) -> None:
    samples = Samples([f"u/{i}" for i in range(30)], np.full(30, -1))
    store = open_store(dump(tmp_path / "store", samples=samples, encoding="topk:3"))
    assert describe(store)["fields"]["logits"]["top1"] is None
    assert describe(store)["fields"]["logits"]["labelled"] == 0


def test_writers_side_by_side(tmp_path: Path) -> None:
    whole = tree(dump(tmp_path / "whole"))
    writers = [open_writer(tmp_path / "parts") for _ in range(3)]

    def work(index: int) -> None:
        for shard in writers[index].pending((index, 3)):
            rows = slice(shard.start, shard.stop)
            values = make_logits(shard.view)[rows]
            writers[index].write(shard, {"logits": values}, [make_probe(shard.start, shard.view)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writers[1].pending() == []
    writers[1].seal()
    assert tree(tmp_path / "parts") == whole


def test_two_writers_of_one_shard(tmp_path: Path) -> None:
    first, second = (open_writer(tmp_path / "store") for _ in range(2))
    shard = first.pending()[0]
    values = make_logits(0)[shard.start : shard.stop]
    first.write(shard, {"logits": values})
    second.write(shard, {"logits": values})  # the same values: nothing to do
    with pytest.raises(StoreInUse, match="with other values"):
        second.write(shard, {"logits": values + 1})
    other = first.pending()[0]
    values = make_logits(0)[other.start : other.stop]
    with (
        first.files.lock(f"records/{other.view}-{other.index}.lock"),
        pytest.raises(StoreInUse, match=rf"process {os.getpid()} on .* is writing here"),
    ):
        second.write(other, {"logits": values})


def test_fields_beside_the_logits(tmp_path: Path) -> None:
    fields = {"logits": FieldSpec((10,), "quantized"), "maps": FieldSpec((4, 3, 3))}
    maps = np.random.default_rng(0).normal(size=(2, SAMPLES, 4, 3, 3)).astype(np.float16)
    with open_writer(tmp_path / "store", views=2, fields=fields) as writer:
        for shard in writer.pending():
            rows = slice(shard.start, shard.stop)
            logits = make_logits(shard.view)[rows]
            writer.write(shard, {"logits": logits, "maps": maps[shard.view, rows]})
        writer.seal()
    store = open_store(tmp_path / "store")
    assert np.array_equal(store.read(1, [9, 2], field="maps"), maps[1, [9, 2]].astype(np.float32))
    assert describe(store)["fields"]["maps"]["fidelity"] is None
    with pytest.raises(UsageError, match="unknown field"):
        store.read(0, field="pooled")


def test_reading_into_a_buffer(store_path: Path) -> None:
    store = open_store(store_path)
    out = np.full((SAMPLES, 10), np.nan, np.float32)
    assert store.read(2, out=out) is out
    assert np.array_equal(out, half(2))
    for wrong in (out[:-1], out.astype("f8"), np.asfortranarray(out)):
        with pytest.raises(UsageError, match="out must be"):
            store.read(2, out=wrong)


def test_views_read_ahead_and_no_further(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(store_path)
    begun: list[int] = []
    original = Store.read

    def read(self: Store, view: int, **options: object) -> np.ndarray:
        begun.append(view)
        return original(self, view, **options)

    monkeypatch.setattr(Store, "read", read)
    before = set(threading.enumerate())  # those of other tests may end meanwhile
    views = store.views([0, 1, 2] * 20, prefetch=2)
    for count, (view, _) in enumerate(views):
        assert view == count % 3
        assert len(begun) <= count + 1 + 2 + 1  # in use, waiting, being decoded
        if count == 10:
            break
    mine = set(threading.enumerate()) - before
    assert any(thread.is_alive() for thread in mine)
    views.close()
    assert not any(thread.is_alive() for thread in mine)
    (store_path / "logits/values/c/1/0/0").unlink()
    damaged = open_store(store_path).views([0, 1, 2])
    assert next(damaged)[0] == 0
    with pytest.raises(CorruptStore, match="missing"):
        next(damaged)


def _read_in_child(store: Store, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put([float(values.sum()) for _, values in store.views(range(3))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_reading_after_a_fork_and_under_spawn(store_path: Path) -> None:
    store = open_store(store_path)
    expected = [float(values.sum()) for _, values in store.views(range(3))]
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(store, queue))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join()


def test_importing_stays_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kdcache_stores; "
        "heavy = {'torch', 'zarr', 'pyarrow', 'numcodecs', 'kdcache'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    path = os.pathsep.join(item for item in sys.path if item)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0


def test_the_public_names_are_what_is_exported() -> None:
    import kdcache_stores

    for name in kdcache_stores.__all__:
        assert getattr(kdcache_stores, name) is not None


def test_an_exception_never_seals(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def dump_and_stop() -> None:
        with open_writer(tmp_path / "store") as writer:
            write_pending(writer)
            raise Stop

    with pytest.raises(Stop):
        dump_and_stop()
    assert not (tmp_path / "store" / "manifest.sha256").exists()
    assert open_writer(tmp_path / "store").done == 9


def test_a_store_that_another_writer_sealed_is_finished(tmp_path: Path) -> None:
    late = open_writer(tmp_path / "store")
    with open_writer(tmp_path / "store") as writer:
        write_pending(writer)
        writer.seal()
    late.seal()
    assert late.sealed
    assert verify(open_store(tmp_path / "store")).ok


class FullDisk(QuickDisk):
    """Full from the n-th new object on; removing still works."""

    def __init__(self, n: int) -> None:
        self.left = n

    def create(self, path: str, data: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().create(path, data)


def test_an_import_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    logits = make_logits(0)
    bad = logits.copy()
    bad[40, 3] = np.nan
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for name, error in (("new", DataError), ("mine", DataError), ("other", StoreInUse)):
        with pytest.raises(error):
            write_arrays(tmp_path / name, bad, samples=make_samples(), shard_rows=20)
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / name for name in ("mine", "other", "other/thesis.tex")
    ]
    n = 0
    while not (tmp_path / "new").exists():
        try:
            write_arrays(tmp_path / "new", logits, samples=make_samples(), disk=FullDisk(n))
        except StoreError:
            assert not (tmp_path / "new").exists()
        n += 1
    assert n > 8
    whole = tree(tmp_path / "new")
    with pytest.raises(MismatchError):
        write_arrays(tmp_path / "new", 2 * logits, samples=make_samples())
    assert tree(tmp_path / "new") == whole


def test_two_dumps_at_once_leave_no_lock(tmp_path: Path) -> None:
    whole = tree(dump(tmp_path / "whole"))

    def try_to_dump(path: Path) -> None:
        with suppress(StoreInUse):  # the other one is at the same shard
            dump(path)

    for number in range(4):
        path = tmp_path / str(number)
        dumps = [threading.Thread(target=try_to_dump, args=(path,)) for _ in range(3)]
        for thread in dumps:
            thread.start()
        for thread in dumps:
            thread.join()
        assert not [key for key in tree(path) if key.endswith((".lock", ".tmp"))]
        assert tree(dump(path)) == whole
        assert not (path / "records").exists()

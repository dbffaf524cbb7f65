"""Damage of every kind is named, and none of it is read as data."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import (
    CorruptStore,
    FormatError,
    KDCacheError,
    MismatchError,
    Store,
    StoreNotFound,
    UnfinishedStore,
    open_store,
    verify,
)
from kdcache_stores.objects.files import LocalFiles

from .conftest import dump, make_logits, open_writer, tree, write_pending

SHARD = "logits/values/c/1/2/0"


def flip(at: float, bit: int = 0) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)

    return change


def cut(keep: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: -1 if keep == 1 else int(keep * len(data))])

    return change


def remove(path: Path) -> None:
    path.unlink()


def read_all(path: Path) -> list[np.ndarray]:
    store = open_store(path)
    store.samples, store.probes  # noqa: B018 (read lazily)
    return [store.read(view) for view in range(store.n_views)]


TABLE = [
    (SHARD, flip(0.3), CorruptStore, "is damaged: its SHA-256"),
    (SHARD, flip(1.0), CorruptStore, "is damaged: its SHA-256"),  # the index
    (SHARD, cut(1), CorruptStore, "bytes, the manifest says"),
    (SHARD, cut(0.5), CorruptStore, "bytes, the manifest says"),
    (SHARD, cut(0), CorruptStore, "has 0 bytes, the manifest says"),
    (SHARD, remove, CorruptStore, f"{SHARD} is missing"),
    ("zarr.json", flip(0.5), CorruptStore, "zarr.json is damaged: its SHA-256"),
    ("zarr.json", cut(0.5), CorruptStore, "bytes, the manifest says"),
    ("zarr.json", remove, CorruptStore, "zarr.json is missing"),
    ("logits/zarr.json", flip(0.5), CorruptStore, "logits/zarr.json is damaged"),
    ("logits/zarr.json", remove, CorruptStore, "logits/zarr.json is missing"),
    ("logits/values/zarr.json", flip(0.7), CorruptStore, "values/zarr.json is damaged"),
    ("logits/values/zarr.json", remove, CorruptStore, "values/zarr.json is missing"),
    ("samples.parquet", flip(0.5), CorruptStore, "samples.parquet is damaged"),
    ("samples.parquet", remove, CorruptStore, "samples.parquet is missing"),
    ("probes/0.parquet", flip(0.5), CorruptStore, "probes/0.parquet is damaged"),
    ("manifest.parquet", flip(0.5), CorruptStore, "manifest.parquet or manifest.sha256 is damaged"),
    ("manifest.parquet", cut(0.5), CorruptStore, "manifest.parquet or manifest.sha256 is damaged"),
    ("manifest.parquet", remove, CorruptStore, "manifest.parquet is missing"),
    ("manifest.sha256", flip(0.1), CorruptStore, "manifest"),
    ("manifest.sha256", flip(1.0), CorruptStore, "manifest.sha256 is damaged"),
    ("manifest.sha256", cut(0), CorruptStore, "manifest.sha256 is damaged"),
    ("manifest.sha256", remove, UnfinishedStore, "run the same dump"),
]


@pytest.mark.parametrize(("key", "change", "error", "message"), TABLE)
def test_the_table_of_damage(
    store_path: Path,
    key: str,
    change: Callable[[Path], None],
    error: type[KDCacheError],
    message: str,
) -> None:
    whole = tree(store_path)
    change(store_path / key)
    with pytest.raises(error, match=message):
        read_all(store_path)
    try:
        report = verify(open_store(store_path))
    except KDCacheError as raised:
        assert isinstance(raised, error)  # noqa: PT017 (either way it is found)
    else:
        assert not report.ok
        assert key in [problem.key for problem in report.problems]
        assert report.rewrite == ([(1, 34, 50)] if key == SHARD else [])
        assert report.to_dict()["ok"] is False
    # dumping again with `repair` brings back every byte, where the root's plan can still be read
    if key != "zarr.json":
        with open_writer(store_path, repair=True) as writer:
            pending = writer.pending()
            write_pending(writer)
            writer.seal()
        assert tree(store_path) == whole
        if not key.startswith(("manifest", "probes")):
            assert len(pending) == (key == SHARD)


def test_swapped_shards_are_refused(store_path: Path) -> None:
    early = open_store(store_path)
    early.read(0)
    first, second = (store_path / f"logits/values/c/{view}/0/0" for view in (0, 1))
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(CorruptStore, match="SHA-256"):
        early.read(0)  # also by a reader that had checked the shard before it was replaced
    store = open_store(store_path)
    assert np.array_equal(store.read(2), make_logits(2).astype("f2").astype("f4"))
    for view in (0, 1):
        with pytest.raises(CorruptStore, match="SHA-256"):
            store.read(view)
    trusting = open_store(store_path, verify=False)  # swapped shards are whole, each by itself
    assert np.array_equal(trusting.read(0), make_logits_swapped())
    first.write_bytes(a[:5] + bytes([a[5] ^ 8]) + a[6:])
    with pytest.raises(CorruptStore, match="crc32c"):
        trusting.read(0)


def make_logits_swapped() -> np.ndarray:
    values = make_logits(0)
    values[:17] = make_logits(1)[:17]
    return values.astype("f2").astype("f4")


def test_another_stores_shard_is_refused(tmp_path: Path, store_path: Path) -> None:
    other = dump(tmp_path / "other", views=4)
    shutil.copy(other / "logits/values/c/3/2/0", store_path / SHARD)
    with pytest.raises(CorruptStore, match="SHA-256"):
        open_store(store_path).read(1)


def test_stale_temporaries_and_strangers_are_noted(store_path: Path) -> None:
    (store_path / "logits/values/c/0/.0.0123456789abcdef.tmp").write_bytes(b"half")
    (store_path / "extra.bin").write_bytes(b"x")
    report = verify(open_store(store_path))
    assert report.ok
    assert len(report.notes) == 2
    assert "interrupted writer" in "".join(report.notes)
    assert "extra.bin is not in the manifest" in "".join(report.notes)


def test_only_the_card_may_change(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "README.md").write_text("A store.")
    dump(path)
    digest = open_store(path).digest
    (path / "README.md").write_text("Another text.")
    store = open_store(path, expect=digest)
    assert verify(store).ok
    assert store.source.entries["README.md"].kind == "card"


def bit_flips(path: Path, count: int, seed: int) -> None:
    """Flip one bit at a time, anywhere; each must be found by `verify` and never be read."""
    whole = tree(path)
    expected = read_all(path)
    rng = random.Random(seed)
    names = sorted(whole)
    total = sum(len(whole[name]) for name in names)
    caught = 0
    for _ in range(count):
        # half of the flips anywhere by size, half in a file chosen alike: small files count too
        name = (
            rng.choice(names)
            if rng.random() < 0.5
            else rng.choices(names, [len(whole[name]) / total for name in names])[0]
        )
        data = bytearray(whole[name])
        position = rng.randrange(len(data) * 8)
        data[position // 8] ^= 1 << position % 8
        (path / name).write_bytes(data)
        try:
            noticed = not verify(open_store(path)).ok
        except KDCacheError:
            noticed = True
        assert noticed, f"bit {position} of {name} was not found"
        try:
            values = read_all(path)
        except KDCacheError:
            caught += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(values, expected, strict=True))
        (path / name).write_bytes(whole[name])
    assert caught == count


@pytest.mark.parametrize("encoding", ["float16", "quantized", "topk:3", "compact"])
def test_bit_flips(tmp_path: Path, encoding: str) -> None:
    bit_flips(dump(tmp_path / "store", views=2, encoding=encoding), 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float16", "quantized", "topk:3", "compact"])
def test_ten_thousand_bit_flips(tmp_path: Path, encoding: str) -> None:
    bit_flips(dump(tmp_path / "store", views=2, encoding=encoding), 3334, seed=2)


@pytest.mark.parametrize("key", [SHARD, "samples.parquet", "zarr.json", "logits/values/zarr.json"])
def test_links_and_special_files_are_refused(tmp_path: Path, store_path: Path, key: str) -> None:
    target = tmp_path / "outside"
    shutil.move(store_path / key, target)
    (store_path / key).symlink_to(target)
    with pytest.raises((FormatError, CorruptStore, StoreNotFound)):
        read_all(store_path)
    (store_path / key).unlink()
    os.mkfifo(store_path / key)
    with pytest.raises((FormatError, CorruptStore, StoreNotFound)):
        read_all(store_path)


def test_linked_folders_are_refused(tmp_path: Path, store_path: Path) -> None:
    shutil.move(store_path / "logits", tmp_path / "outside")
    (store_path / "logits").symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="is a link"):
        read_all(store_path)


def test_a_store_of_other_values_is_pinned(tmp_path: Path, store_path: Path) -> None:
    digest = open_store(store_path).digest
    other = dump(tmp_path / "other", encoding="float32")
    with pytest.raises(MismatchError, match="expected"):
        open_store(other, expect=digest)


class Counted(LocalFiles):
    """Objects that note how often each was read, and in which order they were announced."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.announced: list[str] = []

    def get(self, key: str, most: int | None = None) -> bytes:
        self.reads[key] += 1
        return super().get(key, most)

    def prefetch(self, keys: Iterable[str]) -> None:
        self.announced += keys


@pytest.mark.parametrize("encoding", ["float16", "compact", "topk:3"])
def test_verify_reads_each_object_once(tmp_path: Path, encoding: str) -> None:
    files = Counted(dump(tmp_path / "store", encoding=encoding))
    store = Store(files)
    store.samples, store.layouts  # noqa: B018 (read lazily)
    files.reads.clear()
    files.announced.clear()
    assert verify(store).ok
    kinds = {key: entry.kind for key, entry in store.source.entries.items()}
    assert {key: files.reads[key] for key in kinds if kinds[key] in ("shard", "once")} == {
        key: 1 for key in kinds if kinds[key] in ("shard", "once")
    }
    assert sorted(files.announced) == sorted(kinds)


def test_what_shards_share_is_one_problem(tmp_path: Path) -> None:
    path = dump(tmp_path / "store", encoding="compact")
    flip(0.3)(path / "logits/basis/c/0/0/0/0")
    flip(0.3)(path / "logits/base/c/0/1/0")
    flip(0.3)(path / "logits/mean/c/2/0")
    report = verify(open_store(path))
    assert [problem.key for problem in report.problems] == [
        "logits/base/c/0/1/0", "logits/basis/c/0/0/0/0", "logits/mean/c/2/0"
    ]  # fmt: skip
    assert len(report.rewrite) == 9  # the basis is shared by all

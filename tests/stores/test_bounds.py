"""Every number of a store is bounded before anything is built from it, and all of its JSON is checked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdcache_stores import (
    DataError,
    FormatError,
    KDCacheError,
    Samples,
    UsageError,
    describe,
    open_store,
)
from kdcache_stores.format.canonical_json import DEEPEST, parse_json
from kdcache_stores.format.manifest import MANIFEST, SEAL, Entry, read_manifest, seal_text, sha256
from kdcache_stores.format.records import read_probes
from kdcache_stores.format.sample_table import read_samples, write_samples
from kdcache_stores.format.tables import read_table, write_table

from .conftest import dump
from .hostile import put, reseal
from .test_hostile import attack

HEADER = "attributes.kdcache."


@pytest.mark.parametrize(
    "text",
    ['{"a": 1e400}', '{"a": -1e999}', '{"a": NaN}', '{"a": Infinity}', f'{{"a": {2**64}}}',
     f'{{"a": {-(2**63 + 1)}}}', '{"a": "\\ud800"}', '{"\\udc80": 1}', "[]", "null",
     "{" + '"a":{' * (DEEPEST + 1) + "}" * (DEEPEST + 2),
     '{"a": ' + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1) + "}"],
)  # fmt: skip
def test_json_that_is_not_checked_metadata(text: str) -> None:
    with pytest.raises(FormatError, match="here"):
        parse_json(text.encode(), "here")


def test_json_up_to_the_bounds() -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    text = f'{{"a": [{2**64 - 1}, {-(2**63)}, 1e308, "é", null, true], "b": {deep}}}'
    assert parse_json(text.encode(), "here")["a"] == [2**64 - 1, -(2**63), 1e308, "é", None, True]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("provenance.versions", [1]),
        ("provenance.versions", {"torch": None}),
        ("provenance.time", {}),
        ("plan.class_names", [["a"]] * 10),
        ("plan.class_names", [None] * 10),
        ("plan.dataset", "x" * 5000),
        ("teacher.clean_top1", {"test": "high"}),
        ("teacher.clean_top1", {"test": [1]}),
        ("teacher.clean_top1", {"test": None}),
        ("teacher.clean_top1", {"test": 2}),
        ("config", []),
        ("fields.logits.shape", [2**31, 2**31, 4]),
    ],
)
def test_metadata_of_a_wrong_kind(store_path: Path, place: str, value: Any) -> None:
    root = store_path / "zarr.json"
    document = json.loads(root.read_bytes())
    document["attributes"]["kdcache"]["provenance"].setdefault("versions", {})
    root.write_bytes(put(document, HEADER + place, value))
    reseal(store_path)
    with pytest.raises(FormatError):
        describe(open_store(store_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0.0),
        ("rows", 1e9),
        ("top1_agreement", 1.5),
        ("kl_t1_mean", None),
        ("kl_z_worst", -1.0),
    ],
)
def test_fidelity_that_cannot_be(store_path: Path, name: str, value: Any) -> None:
    def change(entries: dict[str, Entry]) -> None:
        entry = entries["logits/values/c/0/0/0"]
        assert entry.fidelity is not None
        entry.fidelity[name] = value

    reseal(store_path, change)
    with pytest.raises(FormatError, match="repeated or wrong"):
        open_store(store_path)


def quickly(path: Path, message: str) -> None:
    started = time.process_time()
    with pytest.raises(KDCacheError, match=message):
        attack(path)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("encoding", ["float16", "topk:3", "compact", "quantized"])
def test_many_samples_that_are_claimed(tmp_path: Path, encoding: str) -> None:
    """2^39 samples in 14 kB: refused at the first shard that the manifest lacks, with no list of them."""
    path = dump(tmp_path / "store", encoding=encoding)
    for file in path.rglob("zarr.json"):
        document = json.loads(file.read_bytes())
        if document["node_type"] == "array" and document["shape"][1] == 50:
            document["shape"][1] = 2**39
        elif file.parent == path:
            document["attributes"]["kdcache"]["samples"] = 2**39
        file.write_text(json.dumps(document))
    reseal(path)
    quickly(path, "shards|does not list|shape")


def test_a_manifest_of_equal_rows(store_path: Path) -> None:
    entries = read_manifest((store_path / MANIFEST).read_bytes(), "manifest")
    row = {**entries["zarr.json"].to_dict(), "bytes": 1}
    del row["size"]
    from kdcache_stores.format.manifest import _schema

    one = pa.Table.from_pylist([row], schema=_schema())
    data = write_table(pa.concat_tables([one] * 300_000).combine_chunks())
    assert len(data) < 2**20
    (store_path / MANIFEST).write_bytes(data)
    (store_path / SEAL).write_bytes(seal_text(sha256(data)))
    quickly(store_path, "claims 300000 rows")


def test_long_texts_that_are_repeated() -> None:
    count = 2000
    table = pa.table({
        "row": pa.array(np.arange(count)),
        "key": pa.array(["x" * 100_000] * count),
        "label": pa.array(np.zeros(count, np.int64)),
    })  # fmt: skip
    with pytest.raises(FormatError, match="claims 2000 rows"):
        read_samples(write_table(table), count, 10, "samples")


def test_probes_are_no_more_than_the_views(store_path: Path) -> None:
    count = 151
    table = pa.table({
        "row": pa.array(np.zeros(count, np.int64)),
        "view": pa.array(np.zeros(count, np.int64)),
        "sha256": pa.array(["0" * 64] * count),
        "coarse": pa.array([b"x"] * count),
    })  # fmt: skip
    (store_path / "probes/0.parquet").write_bytes(write_table(table))
    reseal(store_path)
    quickly(store_path, "151 rows, more than 150")
    with pytest.raises(FormatError, match="151"):
        read_probes(write_table(table), 150, "probes")


def test_honest_tables_are_read_as_they_are() -> None:
    count = 300_000
    table = pa.table({"key": [f"train/{i:06d}" for i in range(count)], "label": [1] * count})
    read = read_table(write_table(table), {"key": "string", "label": "int64"}, count, "table")
    assert read.equals(table)


def test_an_object_that_is_larger_than_a_shard_may_be(store_path: Path) -> None:
    shard = store_path / "logits/values/c/0/0/0"
    with shard.open("r+b") as file:
        file.truncate(2**20)
    reseal(store_path)
    with pytest.raises(FormatError, match="no shard of it has more than"):
        open_store(store_path)


def test_a_manifest_larger_than_any(store_path: Path) -> None:
    with (store_path / MANIFEST).open("r+b") as file:
        file.truncate(2**31)  # a hole: no disk is used
    with pytest.raises(FormatError, match="too large"):
        open_store(store_path)


def test_labels_never_wrap() -> None:
    with pytest.raises(DataError, match="below 2\\^63, found 18446744073709551615 in row 0"):
        Samples(["a"], np.array([2**64 - 1], np.uint64))
    assert Samples(["a"], np.array([7], np.uint64)).labels.tolist() == [7]


@pytest.mark.parametrize("shape", [(20, 0), (0, 20, 5), (1, 20, 0)])
def test_logits_without_a_value_are_no_import(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from kdcache_stores import import_npz

    keys = [str(i) for i in range(20)]
    np.savez(tmp_path / "l.npz", logits=np.zeros(shape, np.float32), keys=keys)
    with pytest.raises(DataError, match="holds no value"):
        import_npz(tmp_path / "l.npz", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("key", ["{}", "{:08d}.jpg", "train/a class/" * 20 + "{}.jpg"])
def test_what_is_written_is_read(key: str) -> None:
    """Many regular keys and equal labels compress by a factor of 100; they are no attack."""
    count = 100_000
    samples = Samples([key.format(i) for i in range(count)], np.zeros(count, np.int64))
    data = write_samples(samples)
    assert read_samples(data, count, 1, "x")["key"][count - 1].as_py() == samples.keys[-1]


def test_keys_that_no_reader_would_take_are_not_written() -> None:
    samples = Samples([f"{i}" + "x" * 2000 for i in range(10)], np.zeros(10, np.int64))
    with pytest.raises(UsageError, match=r"2001 bytes on average.*--hash-keys"):
        write_samples(samples)
    write_samples(samples.hash_keys())

"""Whatever a store's files hold: a KDCacheError, little memory, nothing outside touched."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache_stores import FormatError, KDCacheError, StoreNotFound, describe, open_store, verify
from kdcache_stores.encodings.encoding_names import make_encoding
from kdcache_stores.format.canonical_json import digest, parse_json, pretty_json
from kdcache_stores.format.header import read_header
from kdcache_stores.format.layout import SHARD_BYTES, ArrayLayout, choose_shard_rows, read_layout
from kdcache_stores.format.manifest import Entry, read_manifest
from kdcache_stores.format.records import read_probes, read_record
from kdcache_stores.format.sample_table import read_samples
from kdcache_stores.format.shards import ShardReader, encode_shard
from kdcache_stores.objects.files import LocalFiles, check_key

from .conftest import dump, make_logits, open_writer, tree, write_pending
from .hostile import NASTY, mutate, put, reseal, scramble

HEADER = "attributes.kdcache."
VALUES = "logits/values/zarr.json"
SHARDING = "codecs.0.configuration."


def attack(path: Path) -> None:
    """Open and read everything; the process needs little more memory than it ever did."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        store = open_store(path)
        verify(store)
        store.samples, store.probes, describe(store)
        for view in range(min(store.n_views, 4)):
            for field in store.fields:
                store.read(view, field=field)
    finally:
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert more < 100 * (2**20 if sys.platform == "darwin" else 2**10)


CASES: list[tuple[str, str, Any, str]] = [
    ("zarr.json", HEADER + "format", [2, 0], "use a version of kdcache that knows it"),
    ("zarr.json", HEADER + "format", [1], "format must be"),
    ("zarr.json", HEADER + "format", "1.0", "format must be"),
    ("zarr.json", HEADER + "samples", 2**39, "shape"),
    ("zarr.json", HEADER + "samples", -1, "samples must be"),
    ("zarr.json", HEADER + "samples", 51, "shape|rows|samples"),
    ("zarr.json", HEADER + "fields", {}, "1 to 64 fields"),
    ("zarr.json", HEADER + "fields.logits.shape", [2**31], "larger than"),
    ("zarr.json", HEADER + "fields.logits.shape", [-10], "shape must be"),
    ("zarr.json", HEADER + "fields.logits.encoding.name", "wavelet", "a newer version may read it"),
    ("zarr.json", HEADER + "fields.logits.encoding.name", "os.system", "not known"),
    ("zarr.json", HEADER + "fields", {"../x": {"shape": [10]}}, "no proper name"),
    ("zarr.json", HEADER + "plan.seed", 8, "plan.digest"),
    ("zarr.json", HEADER + "teacher.precision", "float64", "teacher.digest"),
    ("zarr.json", HEADER + "plan.classes", "10", "wrong type"),
    ("zarr.json", HEADER + "plan.classes", 3, "logits must have shape"),
    ("zarr.json", HEADER + "keys", "rot13", "keys must be"),
    (VALUES, "shape", [2**40, 50, 10], "shards"),
    (VALUES, "shape", [3, 2**40, 10], "shape"),
    (VALUES, "shape", [0, 50, 10], "positive integer"),
    (VALUES, "shape", [-3, 50, 10], "positive integer"),
    (VALUES, "shape", [4, 50, 10], "shards"),
    (VALUES, "data_type", "object", "data_type"),
    (VALUES, "data_type", {"name": "pickle"}, "data_type"),
    (VALUES, "fill_value", 0.0, "fill_value"),
    (VALUES, "chunk_grid.configuration.chunk_shape", [1, 2**45, 10], "larger|multiple"),
    (VALUES, "chunk_grid.configuration.chunk_shape", [1, -17, 10], "positive integer"),
    (VALUES, "chunk_grid.configuration.chunk_shape", [2, 17, 10], "chunk_shape"),
    (VALUES, SHARDING + "chunk_shape", [1, 0, 10], "positive integer"),
    (VALUES, SHARDING + "chunk_shape", [1, 5, 10], "multiple"),
    (VALUES, SHARDING + "codecs.1", {"name": "zfp"}, "codec 'zfp' is not known"),
    (VALUES, SHARDING + "codecs.1", {"name": "pickle"}, "codec 'pickle' is not known"),
    (VALUES, SHARDING + "codecs.0", {"name": "blosc"}, "codecs"),
    (VALUES, SHARDING + "index_location", "start", "index_location"),
    (VALUES, "codecs", [{"name": "bytes"}], "sharded"),
    (VALUES, "storage_transformers", [{"name": "x"}], "storage_transformers"),
]


@pytest.mark.parametrize(("key", "place", "value", "message"), CASES)
def test_metadata_that_breaks_the_format(
    store_path: Path, key: str, place: str, value: Any, message: str
) -> None:
    document = json.loads((store_path / key).read_bytes())
    (store_path / key).write_bytes(put(document, place, value))
    reseal(store_path)
    with pytest.raises(FormatError, match=message):
        attack_and_check_samples(store_path)


def attack_and_check_samples(path: Path) -> None:
    attack(path)
    report = verify(open_store(path))
    if not report.ok:
        raise FormatError("; ".join(problem.message for problem in report.problems))


def test_deep_nesting_and_other_json(store_path: Path) -> None:
    root = store_path / "zarr.json"
    whole = root.read_bytes()
    for data in (
        b'{"attributes":' * 50_000 + b"{}" + b"}" * 50_000,
        b"[" * 100_000,
        b"",
        b"null",
        b"NaN",
        b'{"attributes": {"kdcache": {"format": [NaN, 0]}}}',
        b"\xff\xfe\x00",
        whole[:-30],
    ):
        root.write_bytes(data)
        reseal(store_path)
        with pytest.raises(KDCacheError):
            attack(store_path)


def test_a_newer_minor_version_is_read(store_path: Path) -> None:
    document = json.loads((store_path / "zarr.json").read_bytes())
    document["attributes"]["kdcache"]["later"] = {"some": "thing"}
    document["attributes"]["kdcache"]["plan"]["later"] = 1
    document["attributes"]["other"] = 1
    (store_path / "zarr.json").write_bytes(put(document, HEADER + "format", [1, 7]))
    (store_path / "later.bin").write_bytes(b"new kind")
    reseal(
        store_path,
        lambda entries: entries.update({"later.bin": Entry("later.bin", 8, "0" * 64, "codebook")}),
    )
    store = open_store(store_path)
    assert np.array_equal(store.read(2), make_logits(2).astype("f2").astype("f4"))


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a//b", "a/../b", ".", "", "a\\b", "a\0b", "C:/x", ".hidden", "é",
     "a/" * 600 + "a", "x" * 200],
)  # fmt: skip
def test_names_that_leave_the_store(store_path: Path, name: str) -> None:
    with pytest.raises(FormatError):
        check_key(name)
    with pytest.raises(FormatError):
        LocalFiles(store_path).get(name)
    outside = store_path.parent / "outside"
    outside.write_text("secret")
    reseal(store_path, lambda entries: entries.update({name: Entry(name, 6, "0" * 64, "shard")}))
    with pytest.raises(FormatError):
        open_store(store_path)
    assert outside.read_text() == "secret"


def test_manifests_that_lie(store_path: Path) -> None:
    whole = tree(store_path)
    shard = "logits/values/c/0/0/0"

    def lie(**changes: Any) -> None:
        def change(entries: dict[str, Entry]) -> None:
            entries[shard] = Entry(**{**vars(entries[shard]), **changes})

        reseal(store_path, change)

    for changes in (
        {"size": 2**61},
        {"size": -1},
        {"view": 2**40},
        {"view": None},
        {"start": 5},
        {"stop": 2**50},
        {"sha256": "x"},
        {"sha256": "AB" * 32},
        {"kind": "metadata"},
        {"kind": ""},
    ):
        lie(**changes)
        with pytest.raises(KDCacheError):
            attack(store_path)
        (store_path / "manifest.parquet").write_bytes(whole["manifest.parquet"])
    reseal(store_path, lambda entries: entries.pop(shard))
    with pytest.raises(FormatError, match="lists 8 shards"):
        attack(store_path)


def test_shards_of_not_a_number_are_refused(store_path: Path) -> None:
    store = open_store(store_path)
    layout = store._layouts["logits"][0]
    values = make_logits(0)[:17].astype(np.float16)
    for bad in (np.nan, np.inf):
        values[3, 3] = bad
        (store_path / "logits/values/c/0/0/0").write_bytes(encode_shard(layout, values))
        reseal(store_path)
        with pytest.raises(KDCacheError, match="never written"):
            attack(store_path)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(pretty_json({"zarr_format": 3, "node_type": "group"}))
    with pytest.raises(StoreNotFound, match="no kdcache store"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreNotFound):
        open_store(tmp_path / "file")


def fuzz(path: Path, count: int, seed: int) -> dict[str, int]:
    """Throw `count` broken inputs at every parser; returns how many each refused."""
    rng = random.Random(seed)
    files = tree(path)
    header = json.loads(files["zarr.json"])
    array = json.loads(files[VALUES])
    spec = make_encoding("quantized").arrays((10,))[0]
    layout = read_layout(array, "logits", spec, 50, "x")
    shard = files["logits/values/c/0/0/0"]
    with open_writer(path.parent / "records", encoding="quantized") as writer:
        write_pending(writer, 1)
        one = writer.shards[0]
        record = (path.parent / "records/records/0-0.json").read_bytes()

    def read_chunks(data: bytes) -> None:
        for start in range(0, layout.shard_rows, layout.chunk_rows):
            ShardReader(layout, data, "x").rows(range(start, start + 1))

    def fix_checksums(data: bytes) -> bytes:
        """The index and first chunk with fitting checksums: so that what lies behind is reached."""
        import google_crc32c

        size = 16 * layout.chunks
        if len(data) < size + 8:
            return data
        body, index = data[: -size - 4], data[-size - 4 : -4]
        body = body[:-4] + google_crc32c.value(body[:-4]).to_bytes(4, "little")
        return body + index + google_crc32c.value(index).to_bytes(4, "little")

    parsers = {
        "header": (0.45, lambda: read_header(mutate(header, rng), "x")),
        "layout": (0.25, lambda: read_layout(mutate(array, rng), "logits", spec, 50, "x")),
        "json": (0.1, lambda: read_header(parse_json(scramble(files["zarr.json"], rng), "x"), "x")),
        "shard": (0.1, lambda: read_chunks(fix_checksums(scramble(shard, rng)))),
        "record": (0.07, lambda: read_record(scramble(record, rng), one, "x")),
        "manifest": (0.01, lambda: read_manifest(scramble(files["manifest.parquet"], rng), "x")),
        "samples": (
            0.01,
            lambda: read_samples(scramble(files["samples.parquet"], rng), 50, 10, "x"),
        ),
        "probes": (0.01, lambda: read_probes(scramble(files["probes/0.parquet"], rng), 150, "x")),
    }
    refused = dict.fromkeys(parsers, 0)
    for name, (share, parse) in parsers.items():
        for _ in range(round(count * share)):
            try:
                parse()
            except KDCacheError:
                refused[name] += 1
    return refused


def check_fuzz(tmp_path: Path, count: int, seed: int) -> None:
    refused = fuzz(dump(tmp_path / "store", encoding="quantized"), count, seed)
    assert all(refused.values()), refused


def test_fuzzed_parsers_raise_nothing_else(tmp_path: Path) -> None:
    check_fuzz(tmp_path, 5000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_million_fuzzed_inputs(tmp_path: Path) -> None:
    check_fuzz(tmp_path, 1_000_000, seed=2)


def test_nasty_values_everywhere_in_a_sealed_store(tmp_path: Path) -> None:
    whole = dump(tmp_path / "whole", views=1)
    rng = random.Random(3)
    for case in range(60):
        path = tmp_path / "store"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        key = rng.choice(["zarr.json", "logits/zarr.json", VALUES])
        document = mutate(json.loads((path / key).read_bytes()), rng)
        try:
            (path / key).write_bytes(pretty_json(document))
        except UnicodeEncodeError:
            continue
        reseal(path)
        try:
            attack(path)
        except KDCacheError:
            continue
        assert case >= 0
    assert len(NASTY) > 30


def test_layouts_stay_within_their_bounds() -> None:
    for samples in (1, 2, 7, 50_000, 1_281_167):
        for row in (1, 3, 100, 1000, 21_841, 2**20, 2**24):
            spec = make_encoding("float32").arrays((row,))[0]
            rows = choose_shard_rows(samples, [spec], row)
            layout = ArrayLayout.choose("logits", spec, 3, samples, rows)
            assert rows * spec.row_bytes <= SHARD_BYTES
            assert rows % layout.chunk_rows == 0
            assert layout.chunk_rows == 1 or layout.chunk_rows * spec.row_bytes < 1.1 * 2**20
            assert read_layout(layout.metadata(), "logits", spec, samples, "x") == layout


@pytest.mark.parametrize(
    "changes",
    [
        {"correct": 18},
        {"labelled": 18},
        {"labelled": None},
        {"fidelity": {"rows": np.nan, "kl_z_mean": 0.0}},
        {"fidelity": {"rows": 3.0, "kl_z_mean": -1.0}},
        {"error": np.inf},
        {"error": -1.0},
        {"head_kl": -1e-9},
    ],
)
def test_measures_that_cannot_be_true(store_path: Path, changes: dict[str, Any]) -> None:
    key = "logits/values/c/0/0/0"

    def change(entries: dict[str, Entry]) -> None:
        assert (entries[key].labelled, entries[key].stop) == (17, 17)
        entries[key] = Entry(**{**vars(entries[key]), **changes})

    reseal(store_path, change)
    with pytest.raises(FormatError, match="is repeated or wrong"):
        open_store(store_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("entries.0.key", 0),
        ("entries.0.key", "../x"),
        ("entries.0.size", None),
        ("entries.0.kind", []),
        ("entries.0.sha256", "x"),
        ("entries.0.view", True),
        ("entries.0.stop", "NaN"),
        ("entries.0.stop", 3),
        ("entries.0.labelled", 1e308),
        ("entries.0.fidelity", "x"),
        ("entries.0.fidelity.kl_t1_mean", []),
        ("entries.0.error", "x"),
        ("entries.0.added", 1),
        ("entries.0", None),
        ("entries", 5),
        ("probes.0.row", "x"),
        ("probes.0.view", 2**63),
        ("probes.0.sha256", 0),
        ("probes.0.coarse", "xyz"),
    ],
)
def test_a_forged_record_counts_as_none(tmp_path: Path, place: str, value: Any) -> None:
    """Its shard is written again, and the store ends as it would have."""
    whole = tree(dump(tmp_path / "whole"))
    with open_writer(tmp_path / "store") as writer:
        write_pending(writer, 2)
    record = tmp_path / "store/records/0-0.json"
    document = json.loads(record.read_bytes())
    del document["digest"]
    document = json.loads(put(document, place, value))
    record.write_bytes(pretty_json({**document, "digest": digest("record", document)}))
    with open_writer(tmp_path / "store") as writer:
        assert writer.done == 1
        write_pending(writer)
        writer.seal()
    assert tree(tmp_path / "store") == whole

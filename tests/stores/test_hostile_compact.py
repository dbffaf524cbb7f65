"""What a compact store keeps once may be forged too: refused, or read as finite rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache_stores import CorruptStore, FormatError, KDCacheError, open_store
from kdcache_stores.format.manifest import Entry
from kdcache_stores.format.shards import ShardReader, encode_shard

from .conftest import CLASSES, dump
from .hostile import NASTY, mutate, put, reseal
from .test_hostile import HEADER, attack

SHARDING = "codecs.0.configuration."
OBJECTS = {
    "basis": "basis/c/0/0/0/0",
    "base": "base/c/0/1/0",
    "values": "values/c/2/1/0",
    "mean": "mean/c/2/1",
    "std": "std/c/2/1",
    "top": "top/c/2/1",
}


@pytest.fixture
def compact_path(tmp_path: Path) -> Path:
    return dump(tmp_path / "store", encoding="compact")


def forge(path: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change one array's shard and seal the store anew, all checksums right."""
    layout = next(
        candidate for candidate in open_store(path).layouts["logits"] if candidate.spec.name == name
    )
    file = path / "logits" / OBJECTS[name]
    reader = ShardReader(layout, file.read_bytes(), name)
    starts = range(0, layout.shard_rows, layout.chunk_rows)
    rows = np.concatenate([reader.rows(range(i, i + layout.chunk_rows)) for i in starts])
    change(rows)
    file.write_bytes(encode_shard(layout, rows))
    reseal(path)


def at(*place: int, value: Any) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[place] = value

    return change


def scaled(factor: float) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[0, 2] *= np.float32(factor)

    return change


ARRAYS: list[tuple[str, Callable[[np.ndarray], None], str]] = [
    ("basis", at(0, 0, 0, value=np.nan), "the basis has vectors nan"),
    ("basis", at(0, 8, 9, value=-np.inf), "the basis has vectors"),
    ("basis", at(0, 3, 1, value=3e38), "the basis has vectors"),
    ("basis", scaled(100), "the basis has vectors"),
    ("basis", scaled(1e-4), "the basis has vectors"),
    ("basis", scaled(1e-38), "the basis has vectors"),
    ("base", at(4, 2, value=2**14 + 1), "a code of 16385, beyond 16384"),
    ("base", at(0, 0, value=2**16 - 1), "a code of 65535"),
    ("values", at(4, 8, value=2**15), "a code of 32768"),
    ("values", at(slice(None), slice(None), value=2**16 - 1), "never written"),
    ("top", at(0, value=CLASSES + 1), "class 10 is not below 10"),
    ("top", at(3, value=255), "class 254 is not below 10"),
    ("std", at(1, value=-1.0), "a standard deviation of -1"),
    ("std", at(1, value=np.nan), "never written"),
    ("std", at(1, value=np.inf), "never written"),
    ("std", at(1, value=3e38), "never written"),
    ("mean", at(1, value=np.nan), "never written"),
    ("mean", at(1, value=-np.inf), "never written"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "change", "message"), ARRAYS)
def test_forged_arrays(
    compact_path: Path, name: str, change: Callable[[np.ndarray], None], message: str
) -> None:
    forge(compact_path, name, change)
    with pytest.raises(CorruptStore, match=message):
        attack(compact_path)


def test_the_largest_codes_are_read(compact_path: Path) -> None:
    forge(compact_path, "base", at(slice(None), slice(None), value=2**14))
    forge(compact_path, "values", at(slice(None), slice(None), value=2**14))
    with open_store(compact_path) as store:
        basis = ShardReader(
            next(layout for layout in store.layouts["logits"] if layout.spec.name == "basis"),
            (compact_path / "logits" / OBJECTS["basis"]).read_bytes(),
            "basis",
        ).rows(range(1))[0]
        expected = 3 * 2**13 * basis.astype(np.float64).sum(axis=0)
        start = store.shards(2)[1].start
        row = store.read(2, [start])[0].astype(np.float64)
        assert np.corrcoef(row, expected)[0, 1] > 0.9999


METADATA: list[tuple[str, str, Any, str]] = [
    ("basis", "shape", [1, 1, 9], "shape"),
    ("basis", "shape", [1, 1, 2**40, 10], "shape"),
    ("basis", "shape", [1, 1, 10, 9], "shape"),
    ("basis", "shape", [3, 1, 9, 10], "shape"),
    ("basis", "data_type", "float64", "data_type"),
    ("basis", "fill_value", 0.0, "fill_value"),
    ("base", "shape", [3, 50, 9], "shape"),
    ("base", "shape", [1, 49, 9], "shape"),
    ("base", "shape", [1, 50, 8], "shape"),
    ("base", "data_type", "int16", "data_type"),
    ("base", "chunk_grid.configuration.chunk_shape", [1, 1, 9], "rows|multiple"),
    ("base", SHARDING + "codecs.0.configuration.order", [0, 1, 2], "order"),
    ("values", "shape", [3, 50, 10], "shape"),
    ("values", "data_type", "uint8", "data_type"),
    ("values", SHARDING + "codecs.2.configuration.shuffle", "noshuffle", "shuffle"),
    ("values", SHARDING + "codecs.2.configuration.typesize", 1, "typesize"),
    ("top", "data_type", "uint16", "data_type"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), METADATA)
def test_forged_metadata(
    compact_path: Path, name: str, place: str, value: Any, message: str
) -> None:
    file = compact_path / "logits" / name / "zarr.json"
    file.write_bytes(put(json.loads(file.read_bytes()), place, value))
    reseal(compact_path)
    with pytest.raises(FormatError, match=message):
        attack(compact_path)


@pytest.mark.parametrize("value", [None, True, 0, -1.0, 0.2, 1, "3e-4", [3e-4], 1e308])
def test_a_forged_target(compact_path: Path, value: Any) -> None:
    for name, place in (("zarr.json", HEADER + "fields.logits"), ("logits/zarr.json", HEADER[:-1])):
        file = compact_path / name
        file.write_bytes(put(json.loads(file.read_bytes()), f"{place}.encoding.kl", value))
    reseal(compact_path)
    with pytest.raises(FormatError, match="target KL"):
        attack(compact_path)


@pytest.mark.parametrize("name", ["base", "basis"])
def test_what_is_kept_once_must_be_listed_once(compact_path: Path, name: str) -> None:
    key = f"logits/{OBJECTS[name]}"

    def lie(entries: dict[str, Entry], **changes: Any) -> None:
        entries[key] = Entry(**{**vars(entries[key]), **changes})

    manifest = (compact_path / "manifest.parquet").read_bytes()
    for changes in ({"kind": "shard"}, {"kind": "metadata"}, {"size": 2**50}, {"sha256": "0" * 64}):
        reseal(compact_path, lambda entries: lie(entries, **changes))  # noqa: B023
        with pytest.raises(KDCacheError):
            attack(compact_path)
        (compact_path / "manifest.parquet").write_bytes(manifest)
    reseal(compact_path, lambda entries: entries.pop(key))
    with pytest.raises(KDCacheError):
        attack(compact_path)


def forge_anywhere(path: Path, count: int, seed: int) -> int:
    """Forge entries at random, metadata or arrays; returns how often the store was refused."""
    rng, refused = random.Random(seed), 0
    whole = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for _ in range(count):
        name = rng.choice(list(OBJECTS))
        if rng.random() < 0.3:
            file = path / "logits" / name / "zarr.json"
            text = json.dumps(mutate(json.loads(file.read_bytes()), rng))
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            reseal(path)
        else:

            def change(rows: np.ndarray) -> None:
                flat, bits = rows.reshape(-1), rows.dtype.itemsize * 8
                chosen = [rng.randrange(len(flat)) for _ in range(rng.randint(1, 3))]
                flat[chosen] = np.array(
                    [rng.getrandbits(bits) for _ in chosen], f"u{rows.dtype.itemsize}"
                ).view(rows.dtype)

            forge(path, name, change)
        try:
            attack(path)
        except KDCacheError:
            refused += 1
        else:
            with open_store(path) as store:
                assert all(np.isfinite(store.read(view)).all() for view in range(store.n_views))
        for file, data in whole.items():
            file.write_bytes(data)
    return refused


@pytest.mark.filterwarnings("error")
def test_forged_anywhere(compact_path: Path) -> None:
    assert 5 < forge_anywhere(compact_path, 30, seed=1) < 30
    assert len(NASTY) > 30


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("error")
def test_forged_thousands_of_times(compact_path: Path) -> None:
    assert forge_anywhere(compact_path, 5000, seed=2) > 1000

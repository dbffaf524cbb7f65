"""Logits that an encoding would lose are refused before they are stored, and healthy ones never."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import DataError, open_store, write_arrays
from kdcache_stores.encodings.compact import Compact
from kdcache_stores.encodings.encoding_names import make_encoding
from kdcache_stores.encodings.fidelity import keeps_order, measure, require_faithful

from .conftest import make_logits, make_samples, open_writer

LABELS = np.full(2000, -1)


def healthy(classes: int, margin: float, rows: int = 2000) -> np.ndarray:
    """Logits whose class 0 to `classes` - 1 leads by `margin` on average; 0: a teacher that guesses."""
    rng = np.random.default_rng(classes)
    logits = rng.normal(-0.5, 2, (rows, classes)).astype(np.float32)
    logits[np.arange(rows), np.arange(rows) % classes] += np.float32(margin)
    return logits


@pytest.mark.parametrize(
    ("encoding", "change", "of"),
    [
        ("float16", lambda x: x * 1e-9, "256 rows .* float32"),
        ("float16", lambda x: x + 1e4, "float32"),
        ("topk:3", lambda x: x * 1e-9, "float32"),
        ("topk:3", lambda x: x + 1e4, "float32"),
        ("quantized", lambda x: x * 3e-45, "float32"),
        ("float16", lambda x: x * 1e5, "beyond float16 .* float32"),
        ("topk:3", lambda x: x * 1e5, "beyond float16 .* float32"),
    ],
)
def test_what_an_encoding_loses_is_refused(encoding: str, change: object, of: str) -> None:
    assert callable(change)
    rows = change(healthy(100, 6)).astype(np.float32)
    with pytest.raises(DataError, match=of):
        require_faithful(make_encoding(encoding), rows, LABELS)
    require_faithful(make_encoding("float32"), rows, LABELS)


@pytest.mark.parametrize("encoding", ["float16", "quantized", "quantized:0.5", "topk:5"])
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("margin", [0, 3, 10])
@pytest.mark.parametrize("rows", [1, 50, 2000])
def test_a_healthy_teacher_is_not(encoding: str, classes: int, margin: int, rows: int) -> None:
    """Nor one that guesses, whose two largest logits nearly tie in many rows."""
    logits = healthy(classes, margin)
    for start in range(0, 20, rows):
        part = logits[start : start + rows]
        require_faithful(make_encoding(encoding), part, LABELS[:rows])
        require_faithful(make_encoding(encoding), part + 20, LABELS[:rows])
        require_faithful(make_encoding(encoding), part * 1e-3, LABELS[:rows])


@pytest.mark.parametrize("encoding", ["float16", "quantized", "topk:3"])
def test_ties_are_no_loss(encoding: str) -> None:
    rows = np.round(healthy(10, 0))  # whole numbers: the largest is often there twice
    assert ((rows == rows.max(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.2
    require_faithful(make_encoding(encoding), rows, LABELS)
    require_faithful(make_encoding(encoding), np.zeros((300, 10), np.float32), LABELS[:300])


def test_order_is_kept_where_the_largest_stays_among_the_largest() -> None:
    live = np.array([[2, 2, 0], [2, 2, 0], [2, 1.98, 0], [2, 1.9, 0]], np.float32)
    decoded = np.array([[1, 2, 0], [1, 1, 2], [1, 2, 0], [1, 2, 0]], np.float32)
    assert keeps_order(live, decoded, 0.05).tolist() == [True, False, True, False]


def test_one_row_never_decides_and_two_of_many_do() -> None:
    """Of 256 rows that lie beside each other, some are spoiled by an offset that float16 loses."""
    for spoiled, refused in ((1, False), (2, True)):
        rows = healthy(100, 0, 256)
        rows[:spoiled] += 20000
        decoded = rows.astype(np.float16).astype(np.float32)
        assert (~keeps_order(rows, decoded, 0.05)).sum() == spoiled
        assert measure(rows, decoded)["kl_z_mean"] < 1e-2
        if refused:
            with pytest.raises(DataError, match="2 have another largest"):
                require_faithful(make_encoding("float16"), rows, LABELS[:256])
        else:
            require_faithful(make_encoding("float16"), rows, LABELS[:256])


def test_compact_may_lose_what_was_asked_for() -> None:
    assert Compact(kl=3e-4).most_kl == 1e-2
    assert Compact(kl=0.05).most_kl == 0.1


def tiny(rows: np.ndarray) -> np.ndarray:
    return (rows * 1e-9).astype(np.float32)


def test_a_dump_is_refused_before_its_first_shard(tmp_path: Path) -> None:
    with open_writer(tmp_path / "s", 2) as writer:
        shard = writer.pending()[0]
        rows = make_logits(0)[shard.start : shard.stop]
        with pytest.raises(
            DataError, match=r"logits of view 0, rows 0 to \d+: .* use the encoding float32"
        ):
            writer.write(shard, {"logits": tiny(rows)})
        assert writer.done == 0
        assert not list((tmp_path / "s").rglob("records/*.json"))
        writer.write(shard, {"logits": rows})
        assert writer.done == 1


def test_a_growth_is_refused_before_its_first_shard(store_path: Path) -> None:
    with open_writer(store_path, 4) as writer:
        shard = writer.pending()[0]
        with pytest.raises(DataError, match="use the encoding float32"):
            writer.write(shard, {"logits": tiny(make_logits(3)[shard.start : shard.stop])})
    with open_store(store_path) as store:
        assert store.n_views == 3


def test_compact_that_misses_its_target_by_far_is_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path / "s", 1, "compact") as writer:
        alike = np.zeros((1, 50, 10), np.float32)
        alike[:, :, 0] = 5  # fitted to rows that are all alike
        writer.fit({"logits": alike + np.float32(1e-6)})
        shard = writer.pending()[0]
        with pytest.raises(DataError, match="compact loses too much of these logits"):
            writer.write(shard, {"logits": make_logits(0)[shard.start : shard.stop]})
        assert writer.done == 0


@pytest.mark.parametrize("encoding", ["float16", "topk:3"])
def test_an_import_is_refused_before_a_store_is_begun(tmp_path: Path, encoding: str) -> None:
    rows = tiny(make_logits(0))
    for bad in (rows, make_logits(0) + 1e4, make_logits(0) * 1e5):
        with pytest.raises(DataError, match="use the encoding float32"):
            write_arrays(tmp_path / "s", bad, samples=make_samples(), encoding=encoding)
        assert not (tmp_path / "s").exists()
    with write_arrays(tmp_path / "s", rows, samples=make_samples(), encoding="float32") as store:
        assert np.array_equal(store.read(0), rows)

"""`verify` refuses what FORMAT.md calls invalid, though every SHA-256 agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache_stores import CorruptStore, open_store, verify
from kdcache_stores.format.manifest import Entry
from kdcache_stores.format.shards import ShardReader, encode_shard

from .conftest import dump
from .hostile import reseal


def forge(path: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change the rows of one array in the first shard of view 0, and seal the store anew."""
    store = open_store(path)
    (layout,) = [item for item in store.layouts["logits"] if item.spec.name == name]
    file = path / layout.key(0, 0)
    reader = ShardReader(layout, file.read_bytes(), "shard")
    starts = range(0, layout.shard_rows, layout.chunk_rows)
    rows = np.concatenate([reader.rows(range(i, i + layout.chunk_rows)) for i in starts])
    change(rows)
    file.write_bytes(encode_shard(layout, rows))
    reseal(path)


def swap(rows: Any) -> None:
    rows[0, [0, 1]] = rows[0, [1, 0]]


def put(value: Any, *place: int) -> Callable[[Any], None]:
    def change(rows: Any) -> None:
        rows[place] = value

    return change


@pytest.mark.parametrize(
    ("encoding", "array", "change", "message"),
    [
        ("float16", "values", put(np.inf, 3, 3), "never written"),
        ("float32", "values", put(np.nan, 3, 3), "never written"),
        ("quantized", "std", put(-1, 3), "standard deviation of -1"),
        ("quantized", "mean", put(np.nan, 3), "never written"),
        ("quantized", "values", put(-(2**15), 3, 3), "never written"),
        ("topk:3", "std", put(-1, 3), "standard deviation of -1"),
        ("topk:3", "ids", put(10, 3, 0), "not below 10"),
        ("topk:3", "ids", lambda rows: put(rows[3, 1], 3, 0)(rows), "named twice"),
        ("topk:3", "values", swap, "do not descend"),
        ("topk:3", "values", put(60000, 0, 3), "larger than they are"),
        ("topk:3", "ids", lambda rows: put(next(i for i in range(1, 10) if i not in rows[0]), 0,
                                           list(rows[0]).index(0))(rows), "entry of its label"),
        ("topk:3", "logsumexp", put(np.nan, 3), "logsumexp"),
        ("topk:3", "logsumexp", put(-50, 3), "logsumexp"),
        ("compact", "std", put(-1, 3), "standard deviation of -1"),
        ("compact", "top", put(11, 3), "class 10 is not below 10"),
        ("compact", "values", put(2**15, 3, 0), "a code of 32768"),
        ("compact", "mean", put(np.inf, 3), "never written"),
    ],
)  # fmt: skip
def test_invalid_though_it_is_sealed(
    tmp_path: Path, encoding: str, array: str, change: Callable[[Any], None], message: str
) -> None:
    path = dump(tmp_path / "store", views=2, encoding=encoding)
    assert verify(open_store(path)).ok
    forge(path, array, change)
    report = verify(open_store(path))
    assert [(problem.view, problem.start) for problem in report.problems] == [(0, 0)]
    assert message in report.problems[0].message
    assert "logits/" in report.problems[0].message
    assert report.rewrite == [(0, 0, report.rewrite[0][2])]
    # Rows that are handed over as they are stored are refused as those that are decoded.
    assert refusal(open_store(path).read) == refusal(open_store(path).read_encoded)


def refusal(read: Callable[[int], Any]) -> str | None:
    """What a reading of view 0 is refused with."""
    try:
        read(0)
    except CorruptStore as error:
        return str(error)
    return None


def test_labelled_rows_that_the_manifest_miscounts(store_path: Path) -> None:
    def change(entries: dict[str, Entry]) -> None:
        entry = entries["logits/values/c/0/0/0"]
        entries[entry.key] = Entry(**{**vars(entry), "labelled": 3, "correct": 1})

    reseal(store_path, change)
    (problem,) = verify(open_store(store_path)).problems
    assert "counts 3 labelled rows" in problem.message

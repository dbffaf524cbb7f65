"""`samples.parquet`, and joining a dataset to a store by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import FormatError, MismatchError
from kdcache_stores.nouns import Samples
from kdcache_stores.tables import read_table, write_table


def write_samples(samples: Samples) -> bytes:
    """The bytes of `samples.parquet`: row, key, label."""
    import pyarrow as pa

    table = pa.table(
        {
            "row": pa.array(np.arange(len(samples), dtype=np.int64)),
            "key": pa.array(samples.keys, pa.string()),
            "label": pa.array(samples.labels),
        }
    )
    return write_table(table)


def read_samples(data: bytes, count: int, classes: int, where: str) -> Any:
    """The Arrow table in `samples.parquet`; raises `FormatError` unless it holds `count` rows."""
    columns = {"row": "int64", "key": "string", "label": "int64"}
    table = read_table(data, columns, count, where)
    if not np.array_equal(table["row"].to_numpy(), np.arange(count)):
        raise FormatError(f"{where}: column row must count 0 to {count - 1}")
    labels = table["label"].to_numpy()
    if labels.min() < -1 or labels.max() >= classes:
        raise FormatError(f"{where}: labels must be -1 to {classes - 1}")
    return table


@dataclass(frozen=True)
class Join:
    """Where the samples of a dataset lie in a store.

    Args:
        rows: row of the store for each joined sample, int64 (n,).
        samples: position in the dataset of each joined sample, int64 (n,), ascending.
        missing: samples of the dataset that the store does not hold.
        extra: samples of the store that the dataset does not hold.
    """

    rows: NDArray[np.int64]
    samples: NDArray[np.int64]
    missing: int
    extra: int


def join_samples(store: Samples, dataset: Samples, subset: bool, where: str) -> Join:
    """Join by key, whatever the order.

    Args:
        store: what the store holds.
        dataset: what is looked for.
        subset: go on with the samples that the store holds, where some are missing from it.
        where: how errors name the store.

    Raises `MismatchError` for missing samples (without `subset`), for a label that differs, and if
    nothing is shared.
    """
    if store.hashed and not dataset.hashed:
        dataset = dataset.hash_keys()
    rows_of = {key: row for row, key in enumerate(store.keys)}
    rows = np.array([rows_of.get(key, -1) for key in dataset.keys], dtype=np.int64)
    found = np.flatnonzero(rows >= 0)
    missing = len(rows) - len(found)
    if missing and (not subset or not len(found)):
        first = [dataset.keys[i] for i in np.flatnonzero(rows < 0)[:3]]
        raise MismatchError(
            f"{where} does not hold {missing} of {len(rows)} samples, {_list(first)}"
            + (
                ""
                if subset
                else ": is it of another dataset? To train on those it holds, ask for a subset"
            )
        )
    rows = rows[found]
    theirs, ours = store.labels[rows], dataset.labels[found]
    if len(changed := np.flatnonzero(theirs != ours)):
        named = [
            f"{dataset.keys[found[i]]} ({theirs[i]} there, {ours[i]} here)" for i in changed[:3]
        ]
        raise MismatchError(
            f"{where} has other labels for {len(changed)} of {len(found)} samples, {_list(named)}"
        )
    return Join(rows, found, missing, len(store) - len(found))


def _list(names: Sequence[str]) -> str:
    return f"such as {', '.join(names)}"

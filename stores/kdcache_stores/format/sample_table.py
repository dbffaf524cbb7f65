"""`samples.parquet`: row, key and label of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache_stores.errors import FormatError
from kdcache_stores.format.tables import read_table, write_table
from kdcache_stores.types import Samples


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

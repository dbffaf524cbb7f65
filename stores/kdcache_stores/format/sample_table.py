"""`samples.parquet`: row, key and label of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache_stores.errors import FormatError, UsageError
from kdcache_stores.format.tables import MEAN_TEXT, read_table, write_table
from kdcache_stores.types import Samples


def write_samples(samples: Samples) -> bytes:
    """The bytes of `samples.parquet`: row, key, label.

    Raises `UsageError` for keys that a reader would take for an attack: `MEAN_TEXT` bytes on average.
    """
    import pyarrow as pa

    keys = pa.array(samples.keys, pa.string())
    mean = (keys.nbytes / len(samples)) - 4
    if mean > MEAN_TEXT:
        raise UsageError(
            f"the keys take {mean:.0f} bytes on average, a store's at most {MEAN_TEXT}: hash them "
            "(--hash-keys), or give shorter ones"
        )

    table = pa.table(
        {
            "row": pa.array(np.arange(len(samples), dtype=np.int64)),
            "key": keys,
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

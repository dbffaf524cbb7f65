"""What reading costs: measured on a store, to be laid beside a student's step."""

from __future__ import annotations

import time

import numpy as np

from kdcache_stores.canonical import Json
from kdcache_stores.reader import LogitStore


def read_cost(store: LogitStore, field: str = "logits", repeats: int = 3) -> dict[str, Json]:
    """Read and decode a view a few times; the best time counts, with all objects in the page cache.

    Args:
        store: an open store.
        field: which of its fields.
        repeats: how often, at least once.

    Returns `encoding`; `rows` of the view; `bytes_per_row` on disk, all views and what is kept once
    together; `wall_us_per_row` and `cpu_us_per_row` (all threads), microseconds.
    """
    described = store.info()["fields"][field]
    out = np.empty((len(store), *store.fields[field].shape), np.float32)
    view = store.n_views - 1  # the first view may be cheaper than the others
    store.read(view, field=field, out=out)  # SHA-256 is checked once, decoding is paid every time
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        store.read(view, field=field, out=out)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "encoding": described["encoding"],
        "rows": len(store),
        "bytes_per_row": described["bytes_per_row"],
        "wall_us_per_row": 1e6 * min(walls) / len(store),
        "cpu_us_per_row": 1e6 * min(cpus) / len(store),
    }

"""The parameters of every view as a table, for readers that do not have kdcache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdcache.augment.augmentation import Parameters
from kdcache.views.plan import ViewPlan
from kdcache_stores.errors import naming
from kdcache_stores.format.tables import table_writer

_ROWS = 65536


def parameter_batches(plan: ViewPlan, views: Iterable[int]) -> Iterator[pa.RecordBatch]:
    """All parameters of some views, piece by piece: `row`, `key`, `view` and one column per parameter.

    A parameter without effect on a view is null there. Coordinates are pixels of the image that the
    step receives, so for pad-crop-flip of the padded image; steps of a chain are in the order of
    the augmentation in the schema's metadata (`kdcache.plan`, JSON). For mixup and cutmix `partner`
    is the row of the other image, whose own parameters stand in its own row of the same view.
    Images of differing sizes are opened for their headers.
    """
    keys = pa.array(plan.samples.keys, pa.string())
    for view in views:
        for start in range(0, len(plan), _ROWS):
            rows = np.arange(start, min(start + _ROWS, len(plan)))
            yield _record_batch(plan, keys, rows, view)


def _record_batch(plan: ViewPlan, keys: pa.Array, rows: np.ndarray, view: int) -> pa.RecordBatch:
    drawn, unused = plan.parameters(rows, view)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "key": keys.slice(int(rows[0]), len(rows)),
        "view": pa.array(np.full(len(rows), view), pa.int64()),
    }
    columns |= _columns(drawn, unused)
    if "partner" in drawn:
        columns["partner_key"] = keys.take(pa.array(drawn["partner"]))
    batch = pa.record_batch(columns)
    return batch.replace_schema_metadata({"kdcache.plan": _describe(plan)})


def _columns(drawn: Parameters, unused: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    return {
        name: pa.array(values.tolist(), pa.string(), mask=unused.get(name))
        if values.dtype.kind == "U"
        else pa.array(values, mask=unused.get(name))
        for name, values in drawn.items()
    }


def _describe(plan: ViewPlan) -> str:
    store = plan.to_store()
    names = ("dataset", "split", "fingerprint", "augmentation", "seed")
    return json.dumps({"digest": store.digest} | {name: getattr(store, name) for name in names})


def write_parameters(plan: ViewPlan, views: Iterable[int], path: Path) -> int:
    """Write `parameter_batches` to a Parquet file; returns the number of its rows.

    The file appears under its name when it is complete.
    """
    part = path.with_name(path.name + ".part")
    writer = None
    count = 0
    with naming(path):
        try:
            for batch in parameter_batches(plan, views):
                writer = writer or table_writer(part, batch.schema)
                writer.write_batch(batch)
                count += batch.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is not None:
            os.replace(part, path)
    return count

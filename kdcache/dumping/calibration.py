"""Fitting a store's encodings before a dump begins: to some samples, spread over the dataset."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kdcache.data.dataset import Rows
from kdcache.dumping.first_rows import FirstRows, first_rows
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import StoreWriter


def union(calibration: Mapping[str, Rows]) -> Rows:
    """The calibration rows of all fields, sorted; int64 (n,)."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *calibration.values()]))


def fit_writer(
    plan: ViewPlan,
    teacher: Teacher,
    writer: StoreWriter,
    batch_size: int,
    device: torch.device,
    workers: int,
    known: tuple[FirstRows, int] | None = None,
) -> None:
    """Forward two views of the calibration rows (one, where the plan has no more), if there are any.

    Args:
        known: what teachers gave already, and which of them this one is; used where it is of these rows.

    Raises:
        DataError: outputs that are not finite or of another shape, or an encoding that cannot reach
            what is asked of it.
    """
    if not (calibration := writer.calibration_rows):
        return
    rows = union(calibration)
    if known is None or not np.array_equal(known[0].rows, rows):
        here = first_rows(
            plan, [teacher], rows, batch_size=batch_size, device=device, workers=workers
        )
        known = here, 0
    outputs = known[0].outputs[known[1]]
    writer.fit(
        {
            name: outputs[name][:, np.searchsorted(rows, wanted)]
            for name, wanted in calibration.items()
        }
    )

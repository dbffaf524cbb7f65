"""Fitting a store's encodings before a dump begins: to some samples, spread over the dataset."""

from __future__ import annotations

import numpy as np
import torch

from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import StoreWriter


def fit_writer(
    plan: ViewPlan,
    teacher: Teacher,
    writer: StoreWriter,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> None:
    """Forward two views of the calibration rows (one, where the plan has no more), if there are any.

    Raises:
        DataError: outputs that are not finite or of another shape, or an encoding that cannot reach
            what is asked of it.
    """
    if not (calibration := writer.calibration_rows):
        return
    rows = np.unique(np.concatenate(list(calibration.values())))
    views = range(min(2, plan.views or 2))
    starts = range(0, len(rows), batch_size)
    cuts = [(rows[i : i + batch_size], view) for view in views for i in starts]
    outputs: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in views] for name in calibration}
    stream = plan.stream(cuts, device=device, workers=workers)
    for (_, view), batch in zip(cuts, stream, strict=True):
        given = teacher(batch.images)
        for name, parts in outputs.items():
            parts[view].append(given[name].cpu().numpy())
    writer.fit(
        {
            name: np.stack([np.concatenate(parts) for parts in outputs[name]])[
                :, np.searchsorted(rows, wanted)
            ]
            for name, wanted in calibration.items()
        }
    )

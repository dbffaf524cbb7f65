"""Fitting a store's encodings before a dump begins: to some samples, spread over the dataset."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.teachers import Teacher
from kdcache.views import ViewPlan
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
        DataError: the logits are not finite or of another shape, or the encoding cannot reach what
            is asked of it.
    """
    if (rows := writer.calibration_rows.get("logits")) is None:
        return
    views = range(min(2, plan.views or 2))
    starts = range(0, len(rows), batch_size)
    cuts = [(rows[i : i + batch_size], view) for view in views for i in starts]
    outputs: list[list[NDArray[np.float32]]] = [[] for _ in views]
    stream = plan.stream(cuts, device=device, workers=workers)
    for (_, view), batch in zip(cuts, stream, strict=True):
        outputs[view].append(teacher(batch.images).float().cpu().numpy())
    writer.fit({"logits": np.stack([np.concatenate(parts) for parts in outputs])})

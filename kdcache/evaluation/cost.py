"""What a network costs: parameters, multiply-adds, bytes of its file, time per batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdcache.models.weights import split_entry
from kdcache.runs import WEIGHTS, is_run
from kdcache.teachers.teacher import Teacher


def weights_file(spec: str | Path, weights: str | Path | None = None) -> Path | None:
    """The file that holds the weights of a model named as `load_teacher` takes it, if there is one."""
    name, _, after = str(spec).partition("@")
    own = Path(name) / WEIGHTS if is_run(name) else None
    file = split_entry(weights or after)[0] if weights or after else own
    return file if file is not None and file.is_file() else None


def macs(model: Teacher, views: Tensor) -> int:
    """Multiply-adds of one image, counted in convolutions and matrix products as they run."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.module(model.preprocessing(views[:1]))
    return int(counter.get_total_flops()) // 2


def costs(
    models: Sequence[Teacher],
    files: Sequence[Path | None],
    views: Tensor,
    repeats: int = 50,
) -> list[dict[str, Any]]:
    """Size and speed of models, timed in turns so that what else the machine does hits all alike.

    Args:
        models: on one device.
        files: of their weights, None where there is none.
        views: uint8 (B, C, H, W) on that device; a forward pass of all B is what is timed.
        repeats: timed passes per model, after five that are not.

    Returns:
        Per model: parameters, macs (of one image), file_bytes, batch_size, latency_p50_ms and
        latency_p95_ms (of the batch, preprocessing included).
    """
    times: list[list[float]] = [[] for _ in models]
    for turn in range(-5, repeats):
        for model, taken in zip(models, times, strict=True):
            _synchronize(views.device)
            begun = time.perf_counter()
            model.logits(views)
            _synchronize(views.device)
            if turn >= 0:
                taken.append(time.perf_counter() - begun)
    return [
        {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "macs": macs(model, views),
            "file_bytes": None if file is None else file.stat().st_size,
            "batch_size": len(views),
            "latency_p50_ms": 1e3 * float(np.percentile(taken, 50)),
            "latency_p95_ms": 1e3 * float(np.percentile(taken, 95)),
        }
        for model, file, taken in zip(models, files, times, strict=True)
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a network costs: parameters, multiply-adds, bytes of its file, time per batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    return macs_of(lambda image: model.module(model.preprocessing(image)), views[:1])


def macs_of(network: Callable[[Tensor], object], inputs: Tensor) -> int:
    """Multiply-adds of what torch computes of some inputs, in convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(inputs)
    return int(counter.get_total_flops()) // 2


def latencies(
    networks: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor], repeats: int = 50
) -> list[dict[str, float]]:
    """Time per forward pass, networks in turns so that what else the machine does hits all alike.

    Args:
        networks: what is timed.
        inputs: of each, the batch of its pass.
        repeats: timed passes of each, after five that are not.

    Returns:
        Per network latency_p50_ms and latency_p95_ms.
    """
    times: list[list[float]] = [[] for _ in networks]
    for turn in range(-5, repeats):
        for network, given, taken in zip(networks, inputs, times, strict=True):
            _synchronize(given.device)
            begun = time.perf_counter()
            network(given)
            _synchronize(given.device)
            if turn >= 0:
                taken.append(time.perf_counter() - begun)
    return [
        {f"latency_p{rank}_ms": 1e3 * float(np.percentile(taken, rank)) for rank in (50, 95)}
        for taken in times
    ]


def costs(
    models: Sequence[Teacher],
    files: Sequence[Path | None],
    views: Tensor,
    repeats: int = 50,
) -> list[dict[str, Any]]:
    """Size and speed of models.

    Args:
        models: on one device.
        files: of their weights, None where there is none.
        views: uint8 (B, C, H, W) on that device; a forward pass of all B is what is timed.
        repeats: as of `latencies`.

    Returns:
        Per model: parameters, macs (of one image), file_bytes, batch_size, and what `latencies` gives (of the
        batch, preprocessing included).
    """
    timed = latencies([model.logits for model in models], [views] * len(models), repeats)
    return [
        {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "macs": macs(model, views),
            "file_bytes": None if file is None else file.stat().st_size,
            "batch_size": len(views),
        }
        | latency
        for model, file, latency in zip(models, files, timed, strict=True)
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

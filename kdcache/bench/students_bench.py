"""Students side by side against one alone: what they share is paid for once."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.random_data import random_photos
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared_together
from kdcache.training.settings import Training


def bench_students(
    files: int = 512,
    students: int = 4,
    model: str = "resnet8",
    rounds: int = 5,
    size: int = 32,
    device: str = "cpu",
    folder: Path | None = None,
) -> dict[str, Any]:
    """Epochs of one student and of several side by side, by labels, from JPEG files, in turns.

    Args:
        files: photos that are made for it.
        students: how many.
        model: of each.
        rounds: epochs counted of either; one before them warms up.
        size: side that the photos are cropped and resized to.
        folder: a folder of images by class, instead of random photos.

    Returns:
        For "one" and "all": `seconds` and `cpu_seconds` (of the process, which decodes itself) of each
        round; `stream_cpu_seconds`, of an epoch of the images alone; and the settings.
    """
    base = Training(
        dataset="",
        model=model,
        augment=f"resized-crop-flip:size={size}",
        optimization=Optimization(epochs=rounds + 1, batch_size=64),
        device=device,
    )
    with ExitStack() as opened:
        temporary = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="kdcache-bench-")))
        base = replace(
            base, dataset=f"folder:{folder or random_photos(temporary / 'photos', files)}"
        )
        if folder is not None:
            base = replace(base, train_samples=files)
        loops = {
            name: opened.enter_context(
                prepared_together(
                    [replace(base, seed=seed, data_seed=0) for seed in range(count)],
                    [temporary / name / str(seed) for seed in range(count)],
                )
            )
            for name, count in (("one", 1), ("all", students))
        }
        times: dict[str, dict[str, list[float]]] = {
            name: {"seconds": [], "cpu_seconds": []} for name in loops
        }
        for epoch in range(rounds + 1):
            for name in [*loops] if epoch % 2 else [*loops][::-1]:
                begun, work = time.perf_counter(), time.process_time()
                loops[name].train_epoch(epoch)
                if epoch:
                    times[name]["seconds"].append(time.perf_counter() - begun)
                    times[name]["cpu_seconds"].append(time.process_time() - work)
        work = time.process_time()
        for _ in loops["one"].views.epoch(0):
            pass
        stream = time.process_time() - work
        used = len(loops["one"].views.rows)
    settings = {"files": used, "students": students, "model": model, "rounds": rounds,
                "size": size, "device": device, "threads": torch.get_num_threads()}  # fmt: skip
    return {"settings": settings, "stream_cpu_seconds": stream, **times}

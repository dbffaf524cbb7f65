"""How fast views are made, against plain torchvision doing the same work in the same process.

Every function alternates the two contenders round by round, so that a busy machine slows both, and
returns plain figures: medians over the rounds, in views (or images) per second, and their ratio.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import ResidentDataset, index_keys
from kdcache.views.batches import ImageBatch, make_batches
from kdcache.views.plan import ViewPlan


def bench_resident(
    count: int = 50_000,
    batch_size: int = 256,
    rounds: int = 5,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """pad-crop-flip in memory (CIFAR's size), against v2.RandomCrop and RandomHorizontalFlip.

    torchvision works sample by sample on uint8 tensors, in this process and in a DataLoader with a
    worker per core; the ratio is to the faster of the two. On a GPU it also pays for the copy
    there.

    Args:
        count: images; torchvision gets a tenth of them per round.
        batch_size: views per batch.
        rounds: rounds to take medians of.
        device: where the images live.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    dataset = ResidentDataset(
        "random",
        "train",
        images=pixels,
        keys=index_keys("train", range(count), count),
        labels=np.zeros(count, dtype=np.int64),
        classes=2,
    )
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip:padding=4", dataset), seed=0)
    order = np.random.default_rng(0).permutation(count)
    batches = make_batches(order, 0, batch_size)
    transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    fewer = order[: max(batch_size, count // 10)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def ours() -> float:
        return _rate(plan.stream(batches, device), device)

    def loop() -> float:
        return _rate(
            (
                torch.stack([transform(pixels[row]) for row in fewer[i : i + batch_size]]).to(
                    device
                )
                for i in range(0, len(fewer), batch_size)
            ),
            device,
        )

    def loader() -> float:
        rows = torch.utils.data.Subset(_Transformed(pixels, transform), fewer.tolist())
        return _rate(torch.utils.data.DataLoader(rows, batch_size, num_workers=cores or 1), device)

    contenders = {"kdcache": ours, "torchvision": loop, "torchvision_loader": loader}
    figures = _alternate(contenders, rounds)
    best = max(figures["torchvision"], figures["torchvision_loader"])
    return {
        "what": "pad-crop-flip, 3x32x32, resident, views/s",
        "device": str(device),
        "batch_size": batch_size,
        "cores": cores,
        "threads": torch.get_num_threads(),
        **figures,
        "ratio": figures["kdcache"] / best,
    }


class _Transformed(torch.utils.data.Dataset[Any]):
    def __init__(self, images: torch.Tensor, transform: Callable[[Any], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.transform(self.images[row]), 0


def _rate(batches: Any, device: torch.device) -> float:
    """Images per second of an iterable of batches, all the way to the device."""
    total = 0
    start = time.perf_counter()
    for batch in batches:
        if isinstance(batch, ImageBatch):
            images = batch.images
        else:
            images = batch if isinstance(batch, torch.Tensor) else batch[0]
        total += len(images.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return total / (time.perf_counter() - start)


def _alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median rate of each contender after one round of warming up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            rate = run()
            if turn:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}

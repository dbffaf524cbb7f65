"""How close a dump comes to its teachers' bare forward passes, and how much memory it takes.

Contenders alternate round by round, so that a busy machine slows both; figures are medians over
the rounds. Images, weights and labels are random: speed does not depend on them.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import ResidentDataset, index_keys
from kdcache.dumping.dump import dump
from kdcache.dumping.opening import Target
from kdcache.models.weights import tensor_digest
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan


def bench_dump(
    models: Sequence[str] = ("resnet20", "resnet8x4"),
    samples: int = 4096,
    views: int = 1,
    classes: int = 100,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch_size: int = 256,
    encoding: str = "float16",
    rounds: int = 5,
    device: str | torch.device = "cpu",
    augment: str = "pad-crop-flip",
) -> dict[str, Any]:
    """Dump rows per second over bare forward rows per second.

    The bare forward pass runs on the same batches, augmented and on the device already. The dump
    does everything: augments, forwards, encodes, hashes, flushes to the disk, seals.

    Args:
        models: names of the zoo; the first alone, then all of them in one pass.
        samples: images.
        views: of each.
        classes: logits per row.
        shape: (C, H, W) of the images.
        batch_size: images per forward.
        encoding: of the stores.
        rounds: rounds to take medians of.
        device: where the teachers are.
        augment: of the views.

    Returns:
        Per case "one" and, with several models, "all": `forward_rows_per_second`,
        `dump_rows_per_second`, their `ratio` (1 is perfect) and `time_over_forwards` (its
        inverse), as medians; `ratios` of every round; and `cpu_over_forwards`, processor seconds
        of the dump over those of the forwards, which a busy machine hardly disturbs.
    """
    device = torch.device(device)
    plan = _plan(samples, classes, shape, augment)
    teachers = [random_teacher(name, classes, shape, device) for name in models]
    batches = [
        (np.arange(start, min(start + batch_size, samples)), view)
        for view in range(views)
        for start in range(0, samples, batch_size)
    ]
    ready = [batch.images for batch in plan.stream(batches, device)]
    cases = {"one": teachers[:1]} | ({"all": teachers} if len(teachers) > 1 else {})
    rows, summary = samples * views, {}
    for name, chosen in cases.items():
        _forward(chosen, ready[:2], device)
        _dump(plan, chosen, 1, batch_size, encoding, device)
        forward, dumping, work = [], [], []
        for _ in range(rounds):
            started = time.process_time()
            forward.append(rows / _forward(chosen, ready, device))
            between = time.process_time()
            dumping.append(rows / _dump(plan, chosen, views, batch_size, encoding, device))
            work.append((time.process_time() - between) / (between - started))
        ratios = [d / f for d, f in zip(dumping, forward, strict=True)]
        summary[name] = {
            "models": [teacher.architecture for teacher in chosen],
            "forward_rows_per_second": statistics.median(forward),
            "dump_rows_per_second": statistics.median(dumping),
            "ratio": statistics.median(ratios),
            "time_over_forwards": 1 / statistics.median(ratios),
            "cpu_over_forwards": statistics.median(work),
            "ratios": ratios,
        }
    settings = {"samples": samples, "views": views, "classes": classes, "shape": list(shape),
                "augment": augment, "batch_size": batch_size, "encoding": encoding, "rounds": rounds,
                "device": str(device), "threads": torch.get_num_threads()}  # fmt: skip
    return {"settings": settings, **summary}


def bench_dumps(
    plan: ViewPlan,
    teacher: Teacher,
    encodings: Sequence[str] = ("float16", "compact"),
    views: int = 8,
    batch_size: int = 256,
    rounds: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Whole dumps of the same views in several encodings, in turns.

    Returns:
        Per encoding: `cpu_seconds` (of the process, all threads) and `seconds`, one per round.
    """
    device = torch.device(device)
    rounds_of: dict[str, dict[str, list[float]]] = {
        encoding: {"cpu_seconds": [], "seconds": []} for encoding in encodings
    }
    for turn in range(rounds + 1):
        for encoding in encodings if turn % 2 else encodings[::-1]:
            begun = time.process_time()
            many = views if turn else 1  # the first warms up
            seconds = _dump(plan, [teacher], many, batch_size, encoding, device)
            if turn:
                rounds_of[encoding]["cpu_seconds"].append(time.process_time() - begun)
                rounds_of[encoding]["seconds"].append(seconds)
    return rounds_of


def random_dumps(
    model: str,
    samples: int,
    classes: int = 100,
    shape: tuple[int, int, int] = (3, 32, 32),
    rounds: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """`bench_dumps` of a network of the zoo with random weights, over random images."""
    teacher = random_teacher(model, classes, shape, torch.device(device))
    return bench_dumps(_plan(samples, classes, shape), teacher, rounds=rounds, device=device)


def bench_memory(
    samples: Sequence[int] = (2048, 8192), views: Sequence[int] = (2, 16), classes: int = 1000
) -> list[dict[str, Any]]:
    """Peak memory of dumps that differ in samples and views, each in a process of its own.

    Returns:
        Per dump: `samples`, `views`, `before_bytes` (the process after a dump of one view) and
        `peak_bytes` (its most during the dump). The peak must not depend on the views, and on the
        samples only until they fill the shards in flight. Measured on Linux alone.
    """
    context, results = multiprocessing.get_context("spawn"), []
    for count in samples:
        for many in views:
            with context.Pool(1) as pool:
                before, peak = pool.apply(_measure_memory, (count, many, classes))
            results.append(
                {"samples": count, "views": many, "before_bytes": before, "peak_bytes": peak}
            )
    return results


def _measure_memory(samples: int, views: int, classes: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    plan, device = _plan(samples, classes, (1, 8, 8)), torch.device("cpu")
    teacher = random_teacher("resnet8", classes, (1, 8, 8), device)
    _dump(plan, [teacher], 1, 256, "float16", device)  # allocators and imports settle
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _dump(plan, [teacher], views, 256, "float16", device)
    return before, _resident("VmHWM")


def _resident(field: str) -> int:
    """A field of this process's memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _plan(
    samples: int, classes: int, shape: tuple[int, int, int], augment: str = "pad-crop-flip"
) -> ViewPlan:
    generator = torch.Generator().manual_seed(0)
    dataset = ResidentDataset(
        "random",
        "train",
        images=torch.randint(0, 256, (samples, *shape), dtype=torch.uint8, generator=generator),
        keys=index_keys("train", range(samples), samples),
        labels=np.arange(samples) % classes,
        classes=classes,
    )
    return ViewPlan(dataset, make_augmentation(augment, dataset), seed=0)


def random_teacher(
    name: str, classes: int, shape: tuple[int, int, int], device: torch.device
) -> Teacher:
    """A network of the zoo with random weights, for images (C, H, W)."""
    from kdcache.models.zoo import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_model(name, classes, shape[0], shape[-1]).eval().requires_grad_(False)
    digest = tensor_digest(module.state_dict())
    normal = Preprocessing((0.5,) * shape[0], (0.25,) * shape[0])
    return Teacher(name, module.to(device), normal, classes, digest)


def _forward(
    teachers: Sequence[Teacher], ready: Sequence[torch.Tensor], device: torch.device
) -> float:
    """Seconds that the teachers alone take."""
    _wait(device)
    begun = time.perf_counter()
    for images in ready:
        for teacher in teachers:
            teacher.logits(images)
    _wait(device)
    return time.perf_counter() - begun


def _dump(
    plan: ViewPlan,
    teachers: Sequence[Teacher],
    views: int,
    batch_size: int,
    encoding: str,
    device: torch.device,
) -> float:
    """Seconds of a whole dump."""
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        targets = [Target(t, Path(folder) / f"{i}.zarr") for i, t in enumerate(teachers)]
        begun = time.perf_counter()
        dump(plan, targets, views, encoding=encoding, batch_size=batch_size, device=device)
        return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

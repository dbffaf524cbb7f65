"""Photographs, stage by stage: decoding and augmenting, the teacher, a whole dump, a student's epochs.

What stands beside them does the same work in the same process and round: PyTorch's ImageFolder and
DataLoader with torchvision's augmentations, as timm and most trainers have it, and plain cross-entropy.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdcache.augment.specs import make_augmentation
from kdcache.bench.dump_bench import random_teacher
from kdcache.bench.random_data import random_photos
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.opening import Target
from kdcache.methods.config import ObjectiveConfig
from kdcache.teachers.teacher import Teacher
from kdcache.training.loop import Loop
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared
from kdcache.training.settings import Training
from kdcache.views.batches import make_batches
from kdcache.views.plan import ViewPlan

BATCH = 64
#: Of the generated photographs, see `random_photos`.
GRAIN = 24


def bench_photos(
    files: int = 512,
    teacher: str = "resnet20",
    student: str = "resnet8",
    rounds: int = 5,
    size: int = 64,
    student_size: int = 32,
    views_per_decode: int = 4,
    device: str = "cpu",
    folder: Path | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Seconds of each stage alone, of all together, and of a student's epochs, in turns.

    Args:
        files: photographs that are made for it, or taken of ``folder``, spread evenly.
        teacher, student: of the zoo, with random weights; speed does not depend on them.
        rounds: counted; one before them warms up.
        size, student_size: sides that the photographs are cropped and resized to, for the teacher and for
            the student's epochs.
        views_per_decode: of the student's epoch beside that with one.
        device: where the networks are.
        folder: photographs by class, in train and val or test; None: random ones, 375 x 500 pixels
            in 110 kB.
        workers: processes that decode (default: one for each core).

    Returns:
        Per contender `seconds` and `cpu_seconds` (of this process and its workers), one per round:
        "decode" (resized-crop-flip and RandAugment of every file), "loader" (the same by a DataLoader),
        "forward" (the teacher on batches that lie ready), "dump" (both, encoded, hashed, written, sealed),
        "ce" (an epoch by labels), "several" (a pass from a store, which shows ``views_per_decode``
        times as many images; per image of one view). And `settings`.
    """
    where, many = torch.device(device), workers
    if many is None:
        many = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with ExitStack() as opened:
        temporary = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="kdcache-bench-")))
        photos = folder or random_photos(temporary / "photos", files, grain=GRAIN)
        whole = load_dataset(f"folder:{photos}")
        files = min(files, len(whole))
        dataset = whole.subset(np.arange(files) * len(whole) // files)
        varied = make_augmentation(f"resized-crop-flip:size={size}+rand-augment", dataset)
        plan = ViewPlan(dataset, varied, seed=0)
        frozen = random_teacher(teacher, dataset.classes, (3, size, size), where)
        batches = make_batches(np.arange(files), 0, BATCH)
        ready = [batch.images for batch in plan.stream(batches, where, many)]
        loader = _loader(photos, dataset.keys, size, many)
        store, spec = temporary / "several.zarr", f"resized-crop-flip:size={student_size}"
        plain = ViewPlan(dataset, make_augmentation(spec, dataset), seed=0)
        dump(plain, [Target(frozen, store)], views_per_decode, batch_size=BATCH, device=where,
             workers=many, views_per_decode=views_per_decode)  # fmt: skip
        base: dict[str, Any] = {
            "dataset": f"folder:{photos}",
            "model": student,
            "device": device,
            "workers": many,
        }
        ways = {
            "ce": Training(**base, augment=spec, train_samples=files if folder else None,
                           optimization=_epochs(rounds + 1)),
            "several": Training(**base, stores=(str(store),), subset=True,
                                objective=ObjectiveConfig(method="kd"),
                                views_per_decode=views_per_decode,
                                optimization=_epochs((rounds + 1) * views_per_decode)),
        }  # fmt: skip
        loops = {
            name: opened.enter_context(prepared(way, temporary / name))
            for name, way in ways.items()
        }
        contenders: dict[str, Callable[[int], None]] = {
            "decode": lambda turn: _drain(plan, turn, files, where, many),
            "loader": lambda turn: _drain_loader(loader, where),
            "forward": lambda turn: _forward(frozen, ready, where),
            "dump": lambda turn: _dump(plan, frozen, where, many),
        } | {name: partial(_epoch, loop) for name, loop in loops.items()}
        times: dict[str, dict[str, list[float]]] = {
            name: {"seconds": [], "cpu_seconds": []} for name in contenders
        }
        for turn in range(rounds + 1):
            shift = turn % len(contenders)
            for name in [*contenders][shift:] + [*contenders][:shift]:
                begun, work = time.perf_counter(), _processor_seconds()
                contenders[name](turn)
                spent = time.perf_counter() - begun, _processor_seconds() - work
                if turn:
                    each = views_per_decode if name == "several" else 1
                    times[name]["seconds"].append(spent[0] / each)
                    times[name]["cpu_seconds"].append(spent[1] / each)
        trained = {name: len(loop.views.rows) for name, loop in loops.items()}
    settings = {
        "files": files, "trained_on": trained, "teacher": teacher, "student": student, "size": size,
        "student_size": student_size, "views_per_decode": views_per_decode, "batch_size": BATCH,
        "workers": many, "rounds": rounds, "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return {"settings": settings, **times}


def _epochs(count: int) -> Optimization:
    return Optimization(epochs=count, batch_size=BATCH)


def _loader(photos: Path, keys: list[str], size: int, workers: int) -> DataLoader[Any]:
    """The files of a dataset, as most trainers read and augment them."""
    transform = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.RandAugment(),
        v2.PILToTensor(),
    ])  # fmt: skip
    images = ImageFolder(photos / "train", transform)
    number = {Path(file).relative_to(photos / "train").as_posix(): i
              for i, (file, _) in enumerate(images.samples)}  # fmt: skip
    chosen = torch.utils.data.Subset(images, [number[key] for key in keys])
    return DataLoader(chosen, BATCH, num_workers=workers, persistent_workers=workers > 0)


def _drain(plan: ViewPlan, view: int, files: int, device: torch.device, workers: int) -> None:
    for batch in plan.stream(make_batches(np.arange(files), view, BATCH), device, workers):
        batch.images.sum()  # on the device, for whoever waits
    _wait(device)


def _drain_loader(loader: DataLoader[Any], device: torch.device) -> None:
    for images, _ in loader:
        images.to(device).sum()
    _wait(device)


def _forward(teacher: Teacher, ready: list[torch.Tensor], device: torch.device) -> None:
    for images in ready:
        teacher.logits(images)
    _wait(device)


def _dump(plan: ViewPlan, teacher: Teacher, device: torch.device, workers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        dump(plan, [Target(teacher, Path(folder) / "store")], 1, batch_size=BATCH, device=device,
             workers=workers)  # fmt: skip


def _epoch(loop: Loop, turn: int) -> None:
    loop.train_epoch(turn * loop.views.views_per_decode)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor_seconds() -> float:
    """Of this process, of its workers that live, and of those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.NoSuchProcess:  # it ended just now, and counts among the ended
            continue
        total += spent.user + spent.system
    return total

"""What a cached teacher saves, against what it costs: teachers of 2 to 200 times the student's price."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.swa_utils import update_bn

from kdcache.augment.specs import make_augmentation
from kdcache.bench.random_data import random_images, random_photos
from kdcache.bench.training_bench import bench_train
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.opening import Target
from kdcache.methods.config import ObjectiveConfig
from kdcache.models.zoo import build_model
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.teachers.load import load_teacher
from kdcache.training.optim import Optimization
from kdcache.training.settings import Training
from kdcache.views.plan import ViewPlan


class Pair(NamedTuple):
    """A teacher and its student; `side` is that of the crops of JPEG files, None CIFAR-100's images."""

    teacher: str
    student: str
    side: int | None = None


#: By the teacher's multiply-adds over the student's: 1.8, 6.2, 24, 44, 199 and 207.
PAIRS = (
    Pair("resnet56", "resnet32"),
    Pair("resnet110", "resnet20"),
    Pair("resnet32x4", "ShuffleV2"),
    Pair("vgg13", "MobileNetV2"),
    Pair("ResNet50", "MobileNetV2"),
    Pair("torchvision:resnet152", "torchvision:mobilenet_v3_small", 224),
)


def bench_saving(
    pairs: Sequence[Pair] = PAIRS,
    images: int = 256,
    photos: int = 32,
    rounds: int = 3,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Per pair a student's epochs, cached and online, in turns, and the dump that the cached ones need.

    Weights and images are random: no time depends on them.

    Args:
        images: of an epoch, of CIFAR-100's shape.
        photos: of an epoch of JPEG files.
        rounds: epochs counted of each way.

    Returns:
        Per pair its names, `side`, `macs` (of one image, teacher over student), `dump_seconds` (of one view,
        checks, writing and sealing included), `crossing` (student epochs after which that view has paid for
        itself) and `epochs`, see `bench_train`: of that, online over cached is the saving of an epoch,
        and (step + forward) / step what it is where views and logits cost nothing.
    """
    return [_measure(pair, photos if pair.side else images, rounds, device) for pair in pairs]


def _measure(pair: Pair, images: int, rounds: int, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as temporary:
        folder = Path(temporary)
        if pair.side is None:
            name, spec = random_images(folder / "images.npz", images), "pad-crop-flip"
        else:
            name = f"folder:{random_photos(folder / 'photos', images, grain=24)}"
            spec = f"resized-crop-flip:size={pair.side}"
        dataset = load_dataset(name)
        side = pair.side or 32
        network = build_model(pair.teacher, dataset.classes, size=side)
        update_bn([torch.randn(8, 3, side, side)], network)  # or deep ones leave float16
        torch.save(network.state_dict(), folder / "teacher.pth")
        teacher, store = f"{pair.teacher}@{folder / 'teacher.pth'}", folder / "teacher.zarr"
        loaded = load_teacher(
            teacher,
            classes=dataset.classes,
            preprocessing=PREPROCESSINGS["cifar100"],
            device=device,
        )
        plan = ViewPlan(dataset, make_augmentation(spec, dataset), seed=0)
        begun = time.perf_counter()
        dump(plan, [Target(loaded, store)], 1, batch_size=64, device=device)
        dumped = time.perf_counter() - begun
        student = Training(
            dataset=name,
            model=pair.student,
            objective=ObjectiveConfig(method="kd"),
            optimization=Optimization(epochs=rounds + 1, batch_size=min(64, images)),
            stores=(str(store),),
            device=device,
        )
        epochs = bench_train(student, teacher, rounds)
    saved = epochs["online"]["median"] - epochs["cached"]["median"]
    macs = epochs["macs"]["teacher"] / epochs["macs"]["student"]
    return {
        "teacher": pair.teacher, "student": pair.student, "side": pair.side, "macs": macs,
        "dump_seconds": dumped, "crossing": dumped / saved if saved > 0 else None, "epochs": epochs,
    }  # fmt: skip

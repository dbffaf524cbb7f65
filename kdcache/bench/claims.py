"""The claims about speed, size and memory, measured on this machine as ratios within one run.

Contenders take turns, so that whatever else the machine does slows all of them; a claim is the median
over the rounds with its quartiles.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache._version import __version__
from kdcache.augment.specs import make_augmentation
from kdcache.bench.dump_bench import bench_dump, random_dumps
from kdcache.bench.photo_bench import bench_photos
from kdcache.bench.random_data import random_images
from kdcache.bench.saving_bench import PAIRS, bench_saving
from kdcache.bench.store_bench import bench_encodings, bench_memory, bench_reading
from kdcache.bench.students_bench import bench_students
from kdcache.bench.training_bench import bench_graph, bench_train
from kdcache.bench.view_bench import bench_resident
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.opening import Target
from kdcache.methods.config import ObjectiveConfig
from kdcache.teachers.load import load_teacher
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train
from kdcache.training.settings import Training
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import UnknownName


@dataclass(frozen=True)
class Claim:
    """One ratio: what it is of, in short and in full, and everything that was measured for it."""

    what: str
    about: str
    median: float
    p25: float
    p75: float
    rounds: int
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, what: str, about: str, ratios: Sequence[float], details: dict[str, Any]) -> Claim:
        """From the ratios of the rounds: their median and quartiles."""
        low, middle, high = (float(v) for v in np.percentile(ratios, [25, 50, 75]))
        return cls(what, about, middle, low, high, len(ratios), details)


@dataclass(frozen=True)
class Scale:
    """How much is measured: networks, images and rounds."""

    teacher: str
    student: str
    train_images: int
    view_images: int
    store_rows: int
    encoding_rows: int
    memory_rows: int
    dump_rows: int
    compact_samples: int
    rounds: int
    train_rounds: int
    student_files: int
    photo_rows: int
    saving_images: int
    saving_photos: int
    factors: tuple[int, ...] = (1, 4, 16)


QUICK = Scale(
    "resnet20", "resnet8", 128, 2048, 4000, 1000, 20_000, 512, 256, 2, 2, 128, 64, 32, 8, (1, 4)
)
CPU = Scale(
    "resnet56", "resnet20", 512, 20_000, 50_000, 10_000, 20_000, 2048, 2048, 7, 5, 512, 256, 256, 32
)
#: Sized to take two minutes on a GPU that nobody has had yet.
GPU = Scale(
    "resnet32x4", "resnet8x4", 25_600, 50_000, 50_000, 10_000, 20_000, 50_000, 8192, 3, 3, 2048, 1024,
    6400, 512, (1, 4),
)  # fmt: skip


def bench(
    scale: Scale,
    device: str = "cpu",
    store: str | None = None,
    only: Sequence[str] = (),
    watch: Callable[[str], None] = lambda section: None,
    photos: Path | None = None,
) -> dict[str, Any]:
    """Measure everything, or some of it.

    Args:
        scale: `QUICK` (a minute or two, noisy), `CPU` or `GPU` (resnet32x4 and resnet8x4 on
            CIFAR-100's shapes).
        device: where the networks run.
        store: a store to take the logits for the encodings from, instead of synthetic ones.
        only: names of `SECTIONS`, which alone are measured; none: all, but "saving", which takes minutes
            on a CPU, and "graph" on a GPU alone, since compiling takes a CPU a minute.
        watch: called with the name of each section before it is measured.
        photos: a folder of photographs by class, in train and val or test, for the section "photos";
            None: generated ones.

    Returns:
        `machine`, `versions`, `scale`, `seconds` (of each section), `claims` (list of `Claim` as dicts),
        `encodings` (see `bench_encodings`) and `memory` (see `bench_memory`): plain JSON. What was not
        measured is empty.

    Raises:
        UnknownName: for a section that there is not.
    """
    for name in only:
        if name not in SECTIONS:
            raise UnknownName("section of the benchmark", name, SECTIONS)
    claims: list[Claim] = []
    encodings: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    seconds = {}
    left_out = ("saving", "graph") if device == "cpu" else ("saving",)
    usual = [name for name in SECTIONS if name not in left_out]
    for name in [name for name in SECTIONS if name in (only or usual)]:
        watch(name)
        begun = time.perf_counter()
        if name == "encodings":
            encodings = bench_encodings(scale.encoding_rows, store=store)
        elif name == "memory":
            memory = bench_memory(scale.memory_rows, factors=scale.factors)
        elif name == "photos":
            claims += photo_claims(scale, device, photos)
        else:
            claims += CLAIMS[name](scale, device)
        seconds[name] = time.perf_counter() - begun
    return {
        "machine": machine(device),
        "versions": {"kdcache": __version__, "python": platform.python_version()}
        | replay.versions(),
        "scale": asdict(scale),
        "seconds": seconds,
        "claims": [asdict(claim) for claim in claims],
        "encodings": {"logits": "of a store" if store else "synthetic", "table": encodings},
        "memory": memory,
    }


def machine(device: str) -> dict[str, Any]:
    """What was measured on; no host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cores": cores, "processor": _processor(), "gpu": gpu, "system": platform.system(),
            "torch_threads": torch.get_num_threads(), "load_before": load}  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _with_teacher(scale: Scale, device: str, folder: Path) -> tuple[Training, str, str]:
    """A student with a store, its teacher, and the same store as `compact`."""
    name = random_images(folder / "images.npz", scale.train_images)
    base = Training(
        dataset=name,
        model=scale.teacher,
        optimization=Optimization(epochs=1, batch_size=64),
        train_samples=64,
        device=device,
    )
    teacher = str(train(base, folder / "teacher").path)
    store, compact = folder / "teacher.zarr", folder / "compact.zarr"
    dataset = load_dataset(name)
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    loaded = load_teacher(teacher, classes=dataset.classes, device=device)
    dump(plan, [Target(loaded, store)], 2, device=device)
    dump(plan, [Target(loaded, compact)], 2, encoding="compact", device=device)
    student = Training(
        dataset=name,
        model=scale.student,
        objective=ObjectiveConfig(method="kd"),
        optimization=Optimization(epochs=scale.train_rounds + 1, batch_size=64),
        stores=(str(store),),
        device=device,
    )
    return student, teacher, str(compact)


def graph_claims(scale: Scale, device: str) -> list[Claim]:
    """A student's steps captured, against those of the eager loop; in bf16 and channels-last on a GPU."""
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as temporary:
        student, _, _ = _with_teacher(scale, device, Path(temporary))
        student = replace(student, objective=ObjectiveConfig(method="kd", standardize="unbiased"))
        if device != "cpu":
            student = replace(student, precision="bf16", channels_last=True)
        measured = bench_graph(student, scale.train_rounds)
    both = zip(measured["graph"]["seconds"], measured["eager"]["seconds"], strict=True)
    return [
        Claim.of(
            "step: --graph / eager",
            f"seconds of the steps of an epoch ({scale.student}, kd, standardized, batches of 64 that lie "
            "ready); below 1: capturing pays",
            [graph / eager for graph, eager in both],
            measured,
        )
    ]


def training_claims(scale: Scale, device: str) -> list[Claim]:
    """A student's epoch from the cache, against labels alone and against its teacher in the loop."""
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as temporary:
        student, teacher, compact = _with_teacher(scale, device, Path(temporary))
        others = {"compact": compact}
        measured = bench_train(student, teacher, scale.train_rounds, others)
    pair = f"{scale.student} taught by {scale.teacher}, {scale.train_images} images of CIFAR-100's shape"
    seconds = {way: measured[way]["seconds"] for way in ("ce", "cached", "online")}
    unit, of = ("seconds", "seconds") if device != "cpu" else ("cpu_seconds", "processor seconds")
    return [
        Claim.of(
            "epoch: cached / labels alone",
            f"seconds of a student's epoch ({pair}); 1: the teacher is free",
            [a / b for a, b in zip(seconds["cached"], seconds["ce"], strict=True)],
            measured,
        ),
        Claim.of(
            "epoch: online / cached",
            f"the same with the teacher in the loop; {measured['online_over_ce_by_macs']:.2f} is what "
            "multiply-adds alone would give",
            [a / b for a, b in zip(seconds["online"], seconds["cached"], strict=True)],
            {},
        ),
        _over_float16("epoch", "a student's epoch", measured["compact"], measured["cached"], {}),
        Claim.of(
            "epoch: cached / the student's step alone",
            f"{of} of the same epoch, against its steps on batches that lie ready; 1: views and logits are "
            "free",
            [a / b for a, b in zip(measured["cached"][unit], measured["step"][unit], strict=True)],
            {},
        ),
        Claim.of(
            "epoch: online / step + forward",
            f"{of} of the epoch with the teacher in the loop, against the student's steps and the teacher's "
            "passes on batches that lie ready; 1: no more than the networks themselves",
            [
                online / (step + forward)
                for online, step, forward in zip(
                    measured["online"][unit],
                    measured["step"][unit],
                    measured["forward"][unit],
                    strict=True,
                )
            ],
            {},
        ),
    ]


def saving_claims(scale: Scale, device: str) -> list[Claim]:
    """An epoch with the teacher in the loop over one from the cache, of teachers of rising cost."""
    rounds = min(3, scale.train_rounds)
    measured = bench_saving(PAIRS, scale.saving_images, scale.saving_photos, rounds, device)
    claims = []
    for pair in measured:
        epochs = pair["epochs"]
        ways = {name: epochs[name]["seconds"] for name in ("online", "cached", "step", "forward")}
        bound = [(a + b) / a for a, b in zip(ways["step"], ways["forward"], strict=True)]
        crossing = pair["crossing"]
        claims.append(
            Claim.of(
                f"saving: {pair['teacher']} -> {pair['student']}",
                f"seconds of an epoch online, against cached; the teacher takes {pair['macs']:.1f} times the "
                f"student's multiply-adds; (step + forward) / step: {np.median(bound):.2f}; a view that is "
                "stored has paid for itself after "
                + (
                    "no number of epochs here"
                    if crossing is None
                    else f"{crossing:.2f} student epochs"
                ),
                [a / b for a, b in zip(ways["online"], ways["cached"], strict=True)],
                pair | {"bound": bound},
            )
        )
    return claims


def student_claims(scale: Scale, device: str) -> list[Claim]:
    """Students side by side from one stream of JPEG files, against one alone."""
    measured = bench_students(scale.student_files, 4, rounds=scale.train_rounds, device=device)
    alone, together = (measured[name]["cpu_seconds"] for name in ("one", "all"))
    return [
        Claim.of(
            "epoch: four students / one",
            f"processor seconds of an epoch of four resnet8 side by side, of {scale.student_files} JPEG "
            "files of 375 x 500 pixels at 32, against one alone; 4: nothing is shared",
            [a / b for a, b in zip(together, alone, strict=True)],
            measured,
        )
    ]


def _over_float16(
    what: str,
    of: str,
    compact: dict[str, list[float]],
    float16: dict[str, list[float]],
    details: dict[str, Any],
) -> Claim:
    """Processor seconds: what others do on the machine disturbs them least."""
    ratios = zip(compact["cpu_seconds"], float16["cpu_seconds"], strict=True)
    about = f"processor seconds of {of} with `compact`, against `float16`; 1: small costs no time"
    return Claim.of(f"{what}: compact / float16", about, [a / b for a, b in ratios], details)


def dump_claims(scale: Scale, device: str) -> list[Claim]:
    """A whole dump against its teacher's forward passes on batches that lie ready."""
    measured = bench_dump((scale.teacher,), scale.dump_rows, rounds=scale.rounds, device=device)
    both = random_dumps(
        scale.student, scale.compact_samples, rounds=min(3, scale.rounds), device=device
    )
    return [
        Claim.of(
            "dump / bare forward",
            f"seconds: {scale.teacher} augmented, encoded, hashed, written and sealed, against its "
            f"forward passes alone ({scale.dump_rows:,} rows); 1: storing is free",
            [1 / ratio for ratio in measured["one"]["ratios"]],
            measured,
        ),
        _over_float16(
            "dump",
            f"a whole dump ({scale.student}, 8 views of {scale.compact_samples:,} images)",
            both["compact"],
            both["float16"],
            both,
        ),
    ]


def photo_claims(scale: Scale, device: str, photos: Path | None = None) -> list[Claim]:
    """Stages of JPEG files alone and together, and a student's epoch with several views a decode."""
    measured = bench_photos(scale.photo_rows, scale.teacher, rounds=scale.train_rounds,
                            device=device, folder=photos)  # fmt: skip
    how = measured["settings"]
    seconds = {name: measured[name]["seconds"] for name in ("decode", "loader", "forward", "dump")}
    work = {name: of["cpu_seconds"] for name, of in measured.items() if name != "settings"}
    what = f"{how['files']:,} JPEG files at {how['size']} pixels, {how['workers']} workers"
    small = what.replace(f"{how['size']} pixels", f"{how['student_size']} pixels")
    if device == "cpu":  # both stages have the same cores
        unit, bound = "processor seconds", "the sum of its stages"
        spent = {name: work[name] for name in ("dump", "ce", "several")}
        least = [a + b for a, b in zip(work["decode"], work["forward"], strict=True)]
    else:
        unit, bound = "seconds", "its slowest stage"
        spent = {name: measured[name]["seconds"] for name in ("dump", "ce", "several")}
        least = [max(pair) for pair in zip(seconds["decode"], seconds["forward"], strict=True)]
    return [
        Claim.of(
            f"photos: dump / {bound}",
            f"{unit} of a dump of {how['teacher']} ({what}, RandAugment), encoded, written and sealed, "
            "against decoding and augmenting alone, and its forward passes alone; 1: nothing is lost",
            [a / b for a, b in zip(spent["dump"], least, strict=True)],
            measured,
        ),
        Claim.of(
            "photos: views / a DataLoader's",
            f"images per second, decoded and augmented ({what}, RandAugment), against torchvision's "
            "ImageFolder and the same augmentations in a DataLoader; more is faster",
            [a / b for a, b in zip(seconds["loader"], seconds["decode"], strict=True)],
            {},
        ),
        Claim.of(
            f"photos: epoch, {how['views_per_decode']} views a decode / labels alone",
            f"{unit} an image of {how['student']} by kd from a store, --views-per-decode "
            f"{how['views_per_decode']} ({small}), against plain cross-entropy with one view a decode",
            [a / b for a, b in zip(spent["several"], spent["ce"], strict=True)],
            {},
        ),
    ]


def reading_claims(scale: Scale, device: str) -> list[Claim]:
    """MB/s of whole views, against plain reads of the same files and the same conversion."""
    measured = bench_reading(scale.store_rows, rounds=scale.rounds)
    ratios = measured.pop("ratios")
    return [
        Claim.of(
            "read / plain read",
            "MB/s of whole float16 views from the page cache, checksums checked, on all cores, against "
            "NumPy reading the same files and converting them on one; more is faster",
            ratios["again"],
            measured,
        ),
        Claim.of(
            "first read / plain read",
            "the same on the first pass, which also checks the SHA-256 of every shard",
            ratios["first"],
            {},
        ),
    ]


def view_claims(scale: Scale, device: str) -> list[Claim]:
    """Views per second in memory, against torchvision sample by sample."""
    results = [
        bench_resident(scale.view_images, rounds=1, device=device) for _ in range(scale.rounds)
    ]
    return [
        Claim.of(
            "views / torchvision's",
            "views per second of pad-crop-flip in memory, against torchvision's transforms sample by "
            "sample, in the loop or in a DataLoader, whichever is faster; more is faster",
            [result["ratio"] for result in results],
            {"rounds": results},
        )
    ]


CLAIMS: dict[str, Callable[[Scale, str], list[Claim]]] = {
    "epochs": training_claims,
    "saving": saving_claims,
    "graph": graph_claims,
    "students": student_claims,
    "dump": dump_claims,
    "photos": photo_claims,
    "reading": reading_claims,
    "views": view_claims,
}
#: What `bench` measures, in this order.
SECTIONS = (*CLAIMS, "encodings", "memory")

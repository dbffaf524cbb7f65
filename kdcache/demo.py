"""The main job, end to end, on data that comes with scikit-learn.

A resnet20 learns 1,437 handwritten digits; its logits for nine views of each (every shift by at most one
pixel) are stored once; then the same resnet8 is trained on 80 of the digits by labels alone and with
the store, three seeds each. All four methods see the same samples in the same order, the same views and
as many steps, so the difference is what the teacher's logits add.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kdcache.augment.specs import make_augmentation
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import DumpObserver, dump
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.noise import Noise
from kdcache.runs import read_summary
from kdcache.teachers.load import load_teacher
from kdcache.training.observer import TrainingObserver
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train
from kdcache.training.settings import Training
from kdcache.views.plan import ViewPlan

DATASET, TEACHER, STUDENT = "digits", "resnet20", "resnet8"
AUGMENT, ENCODING = "pad-crop-flip", "float16"
TEACHER_EPOCHS, EPOCHS, SAMPLES, BATCH, VIEWS, SEEDS = 20, 64, 80, 16, 9, (0, 1, 2)
THREADS = 1  # two compute threads are slower on networks as small as these

OBJECTIVES = {
    "ce": ObjectiveConfig(method="ce"),
    "kd": ObjectiveConfig(method="kd"),
    "kd+std": ObjectiveConfig(method="kd", standardize="unbiased"),
    "kd+std+noise": ObjectiveConfig(
        method="kd", standardize="unbiased", noise=Noise.parse("gaussian:0.1,relative")
    ),
}
FLAGS = {
    "ce": ("--method", "ce"),
    "kd": ("--method", "kd"),
    "kd+std": ("--method", "kd", "--standardize"),
    "kd+std+noise": ("--method", "kd", "--standardize", "--noise", "gaussian:0.1,relative"),
}


@dataclass(frozen=True)
class DemoStep:
    """One step of the demo: its title, the command that repeats it by hand, and how to do it."""

    title: str
    command: str
    run: Callable[[Any], Any]


def steps(out: Path) -> Iterator[DemoStep]:
    """The demo's steps in order: teacher, store, then every student.

    Each ``run`` takes an observer, of `train` or (for the store) of `dump`.
    """
    teacher, store = out / "teacher", out / "teacher.zarr"
    training = Training(
        dataset=DATASET,
        model=TEACHER,
        augment=AUGMENT,
        optimization=Optimization(epochs=TEACHER_EPOCHS),
        threads=THREADS,
    )

    def train_teacher(watch: TrainingObserver | None) -> Any:
        return train(training, teacher, watch)

    yield DemoStep(
        "teacher",
        _command("train-teacher", "--dataset", DATASET, "--model", TEACHER, "--out", str(teacher),
                 "--epochs", str(TEACHER_EPOCHS)),
        train_teacher,
    )  # fmt: skip

    dumping = ("--dataset", DATASET, "--teacher", str(teacher), "--views", str(VIEWS),
               "--augment", AUGMENT, "--encoding", ENCODING, "--out", str(store))  # fmt: skip
    yield DemoStep(
        "store", _command("dump-teacher", *dumping), lambda watch: _dump(teacher, store, watch)
    )

    for method, objective in OBJECTIVES.items():
        for seed in SEEDS:
            path = out / f"{method}-seed{seed}"
            student = Training(
                dataset=DATASET,
                model=STUDENT,
                objective=objective,
                optimization=Optimization(epochs=EPOCHS, batch_size=BATCH),
                stores=(str(store),),
                train_samples=SAMPLES,
                seed=seed,
                threads=THREADS,
            )
            flags = ("--store", str(store), "--dataset", DATASET, "--train-samples", str(SAMPLES),
                     "--student", STUDENT, *FLAGS[method], "--out", str(path), "--epochs",
                     str(EPOCHS), "--batch-size", str(BATCH), "--seed", str(seed))  # fmt: skip

            def train_student(
                watch: TrainingObserver | None, student: Training = student, path: Path = path
            ) -> Any:
                return train(student, path, watch)

            yield DemoStep(
                f"{method}, seed {seed}", _command("train-student", *flags), train_student
            )


def _command(*words: str) -> str:
    return shlex.join(["kdcache", *words, "--device", "cpu", "--threads", str(THREADS)])


def _dump(teacher: Path, store: Path, watch: DumpObserver | None) -> None:
    dataset = load_dataset(DATASET, "train")
    plan = ViewPlan(dataset, make_augmentation(AUGMENT, dataset), seed=0)
    channels, size = (dataset.image_shape or (1, 8, 8))[0::2]
    model = load_teacher(str(teacher), classes=dataset.classes, channels=channels, size=size)
    how = f"kdcache demo ({AUGMENT})"
    dump(plan, [(model, store)], VIEWS, encoding=ENCODING, watch=watch, command=how)


def results(out: Path) -> dict[str, Any]:
    """The demo's table from the summaries of its runs.

    Returns:
        ``rows`` (method, top1_mean, top1_std over seeds in [0, 1], seconds_per_epoch, teacher_forwards
        summed over the seeds), ``store`` and ``runs`` (paths).
    """
    rows, runs = [], [out / "teacher"]
    for method in OBJECTIVES:
        paths = [out / f"{method}-seed{seed}" for seed in SEEDS]
        summaries = [read_summary(path) for path in paths]
        top1 = [summary["last_top1"] for summary in summaries]
        rows.append(
            {
                "method": method,
                "top1_mean": fmean(top1),
                "top1_std": stdev(top1),
                "seconds_per_epoch": fmean(s["seconds_per_epoch"] for s in summaries),
                "teacher_forwards": sum(s["teacher_forwards"] for s in summaries),
            }
        )
        runs += paths
    return {"rows": rows, "store": str(out / "teacher.zarr"), "runs": [str(path) for path in runs]}

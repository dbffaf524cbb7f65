"""The main job, end to end, on data that comes with scikit-learn.

A resnet20 learns 1,437 handwritten digits; its logits for nine views of each (every shift by at most one
pixel) are stored once; then a resnet8 is trained on a few of the digits by labels alone and with the store,
from several seeds. A seed draws the digits, their order and the initial weights, the same for every method,
whose students train side by side: what differs within a seed is what the teacher's logits add.
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
from kdcache.report.collect import difference
from kdcache.runs import read_summary
from kdcache.teachers.load import load_teacher
from kdcache.training.observer import TrainingObserver
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train, train_together
from kdcache.training.settings import Training
from kdcache.views.plan import ViewPlan

DATASET, TEACHER, STUDENT = "digits", "resnet20", "resnet8"
AUGMENT, ENCODING, VIEWS = "pad-crop-flip", "float16", 9
TEACHER_STEPS = Optimization(epochs=10, batch_size=128)
STEPS = Optimization(epochs=60, batch_size=25, lr=0.02, lr_schedule="cosine")
EVAL_EVERY = 6
SAMPLES, SEEDS = 50, tuple(range(8))
THREADS = 1  # two compute threads are slower on networks as small as these
NOISE = "gaussian:0.1,relative"

OBJECTIVES = {
    "ce": ObjectiveConfig(method="ce"),
    "kd": ObjectiveConfig(method="kd"),
    "kd+std": ObjectiveConfig(method="kd", standardize="unbiased"),
    "kd+std+noise": ObjectiveConfig(method="kd", standardize="unbiased", noise=Noise.parse(NOISE)),
}
STUDENTS = f"""\
# The students of each seed, side by side: kdcache train-student --runs
[[run]]
name = "ce"
method = "ce"
[[run]]
name = "kd"
method = "kd"
[[run]]
name = "kd-std"
method = "kd"
standardize = true
[[run]]
name = "kd-std-noise"
method = "kd"
standardize = true
noise = "{NOISE}"
"""
"""The objectives as a list of runs for the command line."""


@dataclass(frozen=True)
class DemoStep:
    """One step of the demo.

    Attributes:
        title: for people.
        command: repeats it by hand.
        run: does it.
        brief: in what its command differs from that of the step before, where it differs in little.
    """

    title: str
    command: str
    run: Callable[[Any], Any]
    brief: str = ""


def steps(out: Path, threads: int = THREADS) -> Iterator[DemoStep]:
    """The demo's steps in order: teacher, store, then the students of every seed.

    Each ``run`` takes an observer, of `train` or (for the store) of `dump`.

    Args:
        out: the folder that holds them; what is finished there is not done again.
        threads: compute threads.
    """
    teacher, store, students = out / "teacher", out / "teacher.zarr", out / "students.toml"

    def train_teacher(watch: TrainingObserver | None) -> Any:
        training = Training(
            dataset=DATASET,
            model=TEACHER,
            augment=AUGMENT,
            optimization=TEACHER_STEPS,
            threads=threads,
        )
        return train(training, teacher, watch)

    yield DemoStep(
        "teacher",
        _command(threads, "train-teacher", "--dataset", DATASET, "--model", TEACHER,
                 "--augment", AUGMENT, *_flags(TEACHER_STEPS), "--out", teacher),
        train_teacher,
    )  # fmt: skip
    yield DemoStep(
        "store",
        _command(threads, "dump-teacher", "--dataset", DATASET, "--teacher", teacher,
                 "--augment", AUGMENT, "--views", VIEWS, "--encoding", ENCODING, "--out", store),
        lambda watch: _dump(teacher, store, watch),
    )  # fmt: skip
    for seed in SEEDS:
        trainings = [
            Training(
                dataset=DATASET,
                model=STUDENT,
                objective=objective,
                optimization=STEPS,
                stores=(str(store),),
                train_samples=SAMPLES,
                seed=seed,
                eval_every=EVAL_EVERY,
                threads=threads,
            )
            for objective in OBJECTIVES.values()
        ]
        paths = [run_path(out, method, seed) for method in OBJECTIVES]

        def train_students(
            watch: TrainingObserver | None,
            trainings: list[Training] = trainings,
            paths: list[Path] = paths,
        ) -> Any:
            students.write_text(STUDENTS, encoding="utf-8")
            watches = None if watch is None else [watch] * len(trainings)
            return train_together(trainings, paths, watches)

        yield DemoStep(
            f"students, seed {seed}",
            _command(threads, "train-student", "--store", store, "--dataset", DATASET,
                     "--train-samples", SAMPLES, "--student", STUDENT, "--runs", students,
                     *_flags(STEPS), "--eval-every", EVAL_EVERY, "--seed", seed,
                     "--out", out / f"seed{seed}"),
            train_students,
            f"... --seed {seed} --out {shlex.quote(str(out / f'seed{seed}'))}" if seed else "",
        )  # fmt: skip


def run_path(out: Path, method: str, seed: int) -> Path:
    """The run of a method's student from a seed."""
    return out / f"seed{seed}" / method.replace("+", "-")


def _flags(steps: Optimization) -> list[object]:
    words: list[object] = [
        "--epochs",
        steps.epochs,
        "--batch-size",
        steps.batch_size,
        "--lr",
        steps.lr,
    ]
    return [*words, "--lr-schedule", steps.lr_schedule]


def _command(threads: int, *words: object) -> str:
    return shlex.join(["kdcache", *map(str, words), "--device", "cpu", "--threads", str(threads)])


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
        ``rows`` (method, top1 of each seed, top1_mean, top1_std over seeds in [0, 1], minus_ce,
        teacher_forwards summed over the seeds), ``store`` and ``runs`` (paths). ``minus_ce`` is None for
        ce; of the others the mean of the differences seed by seed, its standard error, the 95% interval
        ``low`` to ``high`` (Student's t), and ``leads``: whether the mean is at least twice its error.
    """
    summaries = {
        method: {seed: read_summary(run_path(out, method, seed)) for seed in SEEDS}
        for method in OBJECTIVES
    }
    top1 = {
        method: {seed: float(summary["last_top1"]) for seed, summary in of_seed.items()}
        for method, of_seed in summaries.items()
    }
    rows = [
        {
            "method": method,
            "top1": list(values.values()),
            "top1_mean": fmean(values.values()),
            "top1_std": stdev(values.values()),
            "minus_ce": None if method == "ce" else lead(values, top1["ce"]),
            "teacher_forwards": sum(s["teacher_forwards"] for s in summaries[method].values()),
        }
        for method, values in top1.items()
    ]
    runs = [
        out / "teacher",
        *(run_path(out, method, seed) for seed in SEEDS for method in OBJECTIVES),
    ]
    return {"rows": rows, "store": str(out / "teacher.zarr"), "runs": [str(path) for path in runs]}


def lead(values: dict[int, float], baseline: dict[int, float]) -> dict[str, Any]:
    """How far ``values`` are from ``baseline``, seed by seed, see `results`."""
    gap = difference(values, baseline)
    assert gap is not None
    assert gap.paired
    return {
        "mean": gap.mean,
        "error": gap.error,
        "low": gap.mean - gap.half,
        "high": gap.mean + gap.half,
        "leads": gap.mean >= 2 * gap.error and gap.mean > 0,
    }


def verdict(row: dict[str, Any]) -> str:
    """What a row of `results` that has a ``minus_ce`` shows, and no more."""
    gap = row["minus_ce"]
    mean, low, high = (f"{100 * gap[name]:+.2f}" for name in ("mean", "low", "high"))
    interval = f"95% interval {low} to {high}, paired over {len(row['top1'])} seeds"
    if gap["leads"]:
        return f"{row['method']} leads ce by {mean[1:]} points ({interval})"
    return f"{row['method']}: no lead over ce is shown ({mean} points, {interval})"

"""What the studies share: their data, teacher, stores and students, and the statistics of the outcome.

A study trains a student per arm and seed, several side by side, and writes one small JSON file: the
command, the machine and versions, every accuracy, and each arm's difference from its control with a 95%
confidence interval. Runs and stores stay in --folder, so an interrupted study goes on where it stopped and
studies of one setting share the runs that they have in common.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

import kdcache
from kdcache import Training, ViewPlan, dump, load_dataset, load_teacher, make_augmentation, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import PREPROCESSINGS, slow_precision
from kdcache.runs import SUMMARY, read_summary
from kdcache.training.optim import Optimization
from kdcache_stores import describe, open_store


@dataclass(frozen=True)
class Arm:
    """One way to train the student; ``options`` are fields of `Training` beyond the study's own."""

    objective: ObjectiveConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    control: str | None = None


class Study:
    """One study: its options, its folder, and its results."""

    def __init__(self, doc: str, **defaults: Any) -> None:
        parser = argparse.ArgumentParser(
            description=doc.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )  # fmt: skip
        add = parser.add_argument
        add("--dataset", default="cifar100")
        add("--data-root", type=Path)
        add("--teacher", default="", help="a run, or NAME@FILE")
        add("--normalisation", help="of the teacher, where it does not say")
        add("--student", default="resnet8")
        add("--samples", type=int, default=4000, help="training images, the first of each class")
        add("--test-samples", type=int, default=5000, help="test images, the first of the split")
        add("--epochs", type=int, default=12)
        add("--batch-size", type=int, default=64)
        add("--lr", type=float, default=0.05)
        add("--precision", help="of the student [default: bf16 where the device has it]")
        add("--views", type=int, default=16)
        add("--seeds", type=int, default=4)
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--jobs", type=int, default=1, help="students side by side")
        add("--only", default="", help="arms to train, separated by semicolons")
        add("--folder", type=Path, required=True, help="keeps data, stores and runs")
        add("--out", type=Path, required=True)
        parser.set_defaults(**defaults)
        self.args = parser.parse_args()
        fast = not slow_precision(torch.device(self.args.device), "bf16")
        self.args.precision = self.args.precision or ("bf16" if fast else "float32")
        self.folder: Path = self.args.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    # -- data, teachers, stores -----------------------------------------------------------------
    def data(self, samples: int | None = None) -> str:
        """The study's own small dataset, drawn from --dataset once: a name for `load_dataset`."""
        args, count = self.args, samples or self.args.samples
        path = self.folder / f"{count}-{args.test_samples}.npz"
        return small_dataset(args.dataset, args.data_root, count, args.test_samples, path)

    def teacher(self, model: str, samples: int, epochs: int, seed: int = 0) -> str:
        """A teacher trained for the study on labels alone: the path of its run."""
        training = Training(
            dataset=self.data(samples),
            model=model,
            optimization=self.optimization(epochs),
            seed=seed,
            **self._machine(),
        )
        return str(train(training, self.folder / f"teacher-{model}-{samples}-{epochs}-{seed}").path)

    def store(
        self,
        augmentation: str = "pad-crop-flip",
        views: int | None = None,
        encoding: str = "float16",
        teacher: str | None = None,
    ) -> str:
        """The path of a store of the study's data, written unless it is there."""
        spec = teacher or self.args.teacher
        named = sha256(spec.encode()).hexdigest()[:8]
        views = views or self.args.views
        label = f"{named}-{augmentation}-{views}-{encoding.replace(':', '-')}"
        path = self.folder / f"{label}.zarr"
        dataset = load_dataset(self.data(), "train")
        plan = ViewPlan(dataset, make_augmentation(augmentation, dataset), seed=0)
        loaded = load_teacher(
            spec,
            classes=dataset.classes,
            channels=dataset.image_shape[0],
            size=dataset.image_shape[-1],
            preprocessing=PREPROCESSINGS.get(self.args.normalisation),
            device=self.args.device,
        )
        dump(
            plan, [(loaded, path)], plan.views or views, encoding=encoding, device=self.args.device
        )
        return str(path)

    def bytes_per_view(self, store: str) -> float:
        """Bytes on disk per sample and view, everything but keys and labels included."""
        with open_store(store) as opened:
            return round(describe(opened)["fields"]["logits"]["bytes_per_row"], 2)

    # -- students -------------------------------------------------------------------------------
    def optimization(self, epochs: int | None = None) -> Optimization:
        """SGD with a cosine over the study's few epochs."""
        return Optimization(
            epochs=epochs or self.args.epochs,
            batch_size=self.args.batch_size,
            lr=self.args.lr,
            lr_schedule="cosine",
            warmup_epochs=1,
        )

    def training(self, arm: Arm, seed: int) -> Training:
        """The arm's training from one seed: the seed gives initial weights, orders and noise."""
        return Training(
            **(
                {
                    "dataset": self.data(),
                    "model": self.args.student,
                    "objective": arm.objective,
                    "optimization": self.optimization(),
                    "seed": seed,
                    "schedule": "random",
                }
                | self._machine()
                | dict(arm.options)
            )
        )

    def _machine(self) -> dict[str, Any]:
        return {
            "device": self.args.device,
            "precision": self.args.precision,
            "channels_last": True,
            "threads": 1,
        }

    def run(self, arms: Mapping[str, Arm]) -> dict[str, list[Path]]:
        """Train every arm from every seed; the runs of each arm in the order of the seeds."""
        wanted = [word for word in self.args.only.split(";") if word]
        arms = {name: arm for name, arm in arms.items() if not wanted or name in wanted}
        jobs: dict[Path, tuple[str, Training]] = {}
        paths: dict[str, list[Path]] = {name: [] for name in arms}
        for seed in range(self.args.seeds):
            for name, arm in arms.items():
                training = self.training(arm, seed)
                path = self.folder / "runs" / named(training, self.folder)
                paths[name].append(path)
                jobs.setdefault(path, (name, training))  # studies and arms share runs
        jobs = {path: job for path, job in jobs.items() if not (path / SUMMARY).exists()}
        if not jobs:
            return paths
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.jobs, context, _quiet) as pool:
            running = {pool.submit(train, todo, path): name for path, (name, todo) in jobs.items()}
            for done, future in enumerate(as_completed(running), 1):
                top1 = read_summary(future.result().path)["last_top1"]
                print(f"{done}/{len(jobs)} {running[future]}: {100 * top1:.2f}", flush=True)
        return paths

    def compare(self, arms: Mapping[str, Arm]) -> dict[str, Any]:
        """Train every arm; the accuracies in percent of the test images, as JSON values.

        Per arm: last_top1 and best_top1 of each seed, their mean and standard deviation over seeds, and the
        difference of the last epoch from the arm's control, see `paired`.
        """
        paths = self.run(arms)
        results: dict[str, Any] = {}
        for name, runs in paths.items():
            summaries = [read_summary(path) for path in runs]
            last = [round(100 * summary["last_top1"], 2) for summary in summaries]
            best = [round(100 * summary["best_top1"], 2) for summary in summaries]
            results[name] = {"last_top1": last, "mean": mean(last), "std": spread(last)}
            results[name] |= {"best_top1": best, "best_mean": mean(best)}
        for name, arm in arms.items():
            if name in results and arm.control in results:
                results[name]["control"] = arm.control
                for epoch in ("last", "best"):
                    results[name][f"{epoch}_minus_control"] = paired(
                        results[name][f"{epoch}_top1"], results[arm.control][f"{epoch}_top1"]
                    )
        return results

    def report(self, results: Mapping[str, Any], **more: Any) -> None:
        """Write the JSON file and print its table."""
        args = self.args
        setting = {
            name: str(getattr(args, name)).rpartition("/")[2]
            if isinstance(getattr(args, name), (str, Path))
            else getattr(args, name)
            for name in ("dataset", "teacher", "student", "samples", "test_samples", "epochs",
                         "batch_size", "lr", "precision", "views", "seeds")
        }  # fmt: skip
        document = about() | {"setting": setting} | more | {"found": dict(results)}
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        for name, arm in results.items():
            if isinstance(arm, dict) and "last_top1" in arm:
                less = arm.get("last_minus_control")
                words = (
                    f"{less['mean']:+.2f} +- {less['ci95']:.2f} to {arm['control']}" if less else ""
                )
                print(f"{name:<28} {arm['mean']:6.2f} +- {arm['std']:.2f}  {words}")


def small_dataset(name: str, root: Path | None, samples: int, test_samples: int, path: Path) -> str:
    """A part of a dataset in memory as a file, unless it is there: its name for `load_dataset`.

    The first training images of each class, equally many, and the first test images.
    """
    if not path.exists():
        content: dict[str, Any] = {}
        for split, most in (("train", samples), ("test", test_samples)):
            whole = load_dataset(name, split, root)
            each = -(-most // whole.classes) if split == "train" else len(whole)
            first = np.concatenate(
                [np.flatnonzero(whole.labels == label)[:each] for label in range(whole.classes)]
            )
            rows = np.sort(first)[:most]
            content[f"x_{split}"] = whole.images[rows].numpy()
            content[f"y_{split}"] = whole.labels[rows]
            content[f"keys_{split}"] = np.array([whole.keys[row] for row in rows])
        written = path.with_name(f"{path.stem}-{os.getpid()}.npz")
        np.savez(written, **content)
        written.replace(path)
    return f"arrays:{path}"


def about() -> dict[str, Any]:
    """What made the figures: command, machine and versions."""
    script = Path(sys.argv[0]).name
    words = [re.sub(r"[^:@=]*/", "", word) for word in sys.argv[1:]]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", f"evidence/{script}", *words]),
        "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdcache": kdcache.__version__,
    }


def paired(values: Sequence[float], control: Sequence[float]) -> dict[str, float]:
    """Mean of the differences seed by seed, with the half-width of its 95% interval (Student's t)."""
    differences = [a - b for a, b in zip(values, control, strict=True)]
    n = len(differences)
    half = student_t.ppf(0.975, n - 1) * stdev(differences) / n**0.5 if n > 1 else float("nan")
    return {"mean": mean(differences), "ci95": round(float(half), 2), "n": n}


def mean(values: Iterable[float]) -> float:
    """To the hundredth of a point."""
    return round(fmean(values), 2)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation to the hundredth of a point; 0 for a single value."""
    return round(stdev(values), 2) if len(values) > 1 else 0.0


def named(training: Training, folder: Path) -> str:
    """A folder name for a training: the same training has the same name wherever the study lies."""
    words = json.dumps(asdict(replace(training, device="any")), default=str, sort_keys=True)
    digest = sha256(words.replace(str(folder), "").encode()).hexdigest()[:12]
    return f"{training.objective.method}-seed{training.seed}-{digest}"


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)

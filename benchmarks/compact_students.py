"""Students taught from float16, compact and topk stores of the same logits, side by side.

    python benchmarks/compact_students.py --data cifar100.npz --weights resnet20.pth --out RESULT.json

The teacher says once what it thinks of some views of a CIFAR-100 subset; each encoding keeps that in
a store of its own. A resnet8 on half the resolution learns from each, by KD, standardized KD and
DKD, from several seeds. A small setting on purpose: it shows whether an encoding changes what a
student learns, not how good students get.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kdcache import CachedViews, load_dataset
from kdcache.datasets import Dataset
from kdcache.models import build_model
from kdcache.objectives import Objective, Step
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.teachers import Teacher, load_teacher
from kdcache.views import ViewPlan, make_augmentation, replay
from kdcache_stores import FieldSpec, LogitStore, StoreWriter, open_store

ENCODINGS = ("float16", "compact:2.5e-5", "compact:3e-4", "topk:10")
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "kd standardized": {"method": "kd", "standardize": "unbiased"},
    "dkd": {"method": "dkd", "dkd_warmup": 3},
}
PREPROCESSING = PREPROCESSINGS["cifar100"]


def small(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, 32, 32) as the student sees it: normalised, at half the resolution."""
    return functional.avg_pool2d(PREPROCESSING(images), 2)


def write_stores(dataset: Dataset, weights: str, views: int, folder: Path) -> dict[str, LogitStore]:
    """One store per encoding, of the same logits."""
    teacher = load_teacher("resnet20", weights, classes=100, preprocessing=PREPROCESSING)
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    rows = np.arange(len(dataset))
    batches = [(part, view) for view in range(views) for part in np.array_split(rows, 10)]
    logits = torch.cat([teacher(batch.images).float() for batch in plan.stream(batches)])
    values = logits.numpy().reshape(views, len(dataset), 100)
    return {
        name: write_store(folder / name.replace(":", "-"), plan, teacher, values, name)
        for name in ENCODINGS
    }


def write_store(
    path: Path, plan: ViewPlan, teacher: Teacher, values: NDArray[np.float32], encoding: str
) -> LogitStore:
    """A sealed store of logits (views, samples, classes), with the probes that a student asks for."""
    with StoreWriter(
        path,
        plan=plan.to_store(),
        teacher=teacher.to_store(),
        samples=plan.samples,
        views=len(values),
        fields={"logits": FieldSpec((values.shape[2],), encoding)},
    ) as writer:
        if (lesson := writer.lesson) is not None:
            writer.prepare({"logits": values[:2, lesson]})
        for shard in writer.pending():
            rows = replay.probe_rows(plan, shard.view)
            rows = rows[(rows >= shard.start) & (rows < shard.stop)]
            (batch,) = plan.stream([(rows, shard.view)])
            probes = replay.measure(plan, rows, shard.view, batch.images)
            writer.write(shard, {"logits": values[shard.view, shard.start : shard.stop]}, probes)
        writer.seal()
    return open_store(path)


def train(
    dataset: Dataset, test: Dataset, store: LogitStore, method: str, seed: int, epochs: int
) -> float:
    """Test accuracy of a student after its last epoch."""
    torch.manual_seed(seed)
    student = build_model("resnet8", classes=100, channels=3, size=16)
    objective = Objective(**METHODS[method])
    optimizer = torch.optim.SGD(
        student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    with CachedViews(dataset, [store], 64, seed=seed) as views:
        steps = epochs * -(-len(dataset) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
        for epoch in range(epochs):
            for images, labels, logits, _ in views.epoch(epoch):
                loss, _ = objective(student(small(images)), logits, labels, Step(epoch=epoch))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    student.eval()
    with torch.inference_mode():
        said = torch.cat([student(small(part)) for part in test.images.split(1000)])
    return float((said.argmax(1).numpy() == test.labels).mean())


def main() -> None:
    """Write the stores, train, and write the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="npz of CIFAR-100: x_train, y_train, ...")
    parser.add_argument("--weights", required=True, help="a resnet20 trained on CIFAR-100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    dataset = load_dataset(f"arrays:{arguments.data}", "train")
    dataset = dataset.subset(np.arange(arguments.samples))
    test = load_dataset(f"arrays:{arguments.data}", "test").subset(np.arange(5000))
    result: dict[str, Any] = {
        "setting": {
            "dataset": f"CIFAR-100, the first {arguments.samples} training and 5000 test images",
            "teacher": "resnet20",
            "student": "resnet8 at 16x16",
            "views": arguments.views,
            "epochs": arguments.epochs,
            "seeds": arguments.seeds,
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
        "encodings": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        stores = write_stores(dataset, arguments.weights, arguments.views, Path(folder))
        runs: dict[tuple[str, str], list[float]] = {}
        for seed in range(arguments.seeds):
            for method in METHODS:
                for name, store in stores.items():
                    top1 = train(dataset, test, store, method, seed, arguments.epochs)
                    runs.setdefault((name, method), []).append(round(100 * top1, 2))
                    seconds = time.perf_counter() - begun
                    print(f"{seconds:5.0f} s  {method:16} {name:15} {100 * top1:.2f}", flush=True)
            for name, store in stores.items():
                field = store.info()["fields"]["logits"]
                result["encodings"][name] = {
                    "bytes_per_row": round(field["bytes_per_row"], 2),
                    "kl_z": field["fidelity"]["kl_z_mean"],
                    "top1": {
                        method: {
                            "runs": (values := runs[name, method]),
                            "mean": round(float(np.mean(values)), 2),
                            "std": round(float(np.std(values, ddof=min(1, seed))), 2),
                        }
                        for method in METHODS
                    },
                }
            result["setting"]["seeds"] = seed + 1
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

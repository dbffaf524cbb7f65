"""A usual trainer beside kdcache: the same pair, images, batches and loss; seconds and processor seconds.

    python evidence/peer.py --dataset arrays:cifar100.npz --images 2048 --out evidence/peer.json

The usual trainer is written here as most published ones are: a Dataset of PIL images, crop, flip, ToTensor and
Normalize image by image in a DataLoader's workers, the teacher's forward pass in each step, and loss and
accuracy read with .item() after each. kdcache trains from its store, and with its teacher in the loop. Epochs
are taken in turns; weights are random, since no time depends on them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from study import about, small_dataset
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdcache import Training, ViewPlan, dump, load_dataset, load_teacher, make_augmentation
from kdcache.methods.config import ObjectiveConfig
from kdcache.models.zoo import build_model
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared

NORMAL = PREPROCESSINGS["cifar100"]
TEMPERATURE, CE, KD = 4.0, 0.1, 0.9


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images as PIL has them, augmented one by one."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.images = np.ascontiguousarray(arrays["x_train"].transpose(0, 2, 3, 1))
            self.labels = arrays["y_train"]
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(NORMAL.mean, NORMAL.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class Usual:
    """The usual trainer."""

    def __init__(self, file: Path, teacher: str, weights: Path, student: str, args: Any) -> None:
        self.device = torch.device(args.device)
        self.teacher = build_model(teacher, 100)
        self.teacher.load_state_dict(torch.load(weights, weights_only=True))
        self.teacher.eval().to(self.device)
        self.student = build_model(student, 100).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4
        )
        self.loader = DataLoader(
            Pictures(file), args.batch_size, shuffle=True, num_workers=args.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def epoch(self, turn: int) -> None:
        """One pass over the loader."""
        self.student.train()
        losses, right = [], []
        for images, labels in self.loader:
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            logits = self.student(images)
            with torch.no_grad():
                targets = self.teacher(images)
            kd = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1), F.softmax(targets / TEMPERATURE, 1),
                reduction="batchmean",
            )  # fmt: skip
            loss = CE * F.cross_entropy(logits, labels) + KD * TEMPERATURE**2 * kd
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            right.append((logits.argmax(1) == labels).float().mean().item())


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--teachers", nargs="+", default=["resnet56", "resnet110"])
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="of the usual trainer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for teacher in args.teachers:
        results |= measure(teacher, args)
        report = about() | {"threads": args.threads, "images": args.images, "found": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(teacher: str, args: Any) -> dict[str, dict[str, float]]:
    """Epochs of each way, in turns: their medians, and the usual trainer's seconds over each other's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = small_dataset(args.dataset, args.data_root, args.images, 100, folder / "images.npz")
        network, weights = build_model(teacher, 100), folder / "teacher.pth"
        update_bn([torch.randn(64, 3, 32, 32)], network)
        torch.save(network.state_dict(), weights)
        spec, store = f"{teacher}@{weights}", folder / "teacher.zarr"
        dataset = load_dataset(name)
        plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
        loaded = load_teacher(spec, classes=100, preprocessing=NORMAL, device=args.device)
        dump(plan, [(loaded, store)], 2, device=args.device)
        objective = ObjectiveConfig("kd", ce_weight=CE, kd_weight=KD, temperature=TEMPERATURE)
        cached = Training(
            name, args.student, objective, stores=(str(store),), device=args.device,
            optimization=Optimization(epochs=args.rounds + 1, batch_size=args.batch_size),
        )  # fmt: skip
        online = replace(cached, online=(spec,))
        with (
            prepared(cached, folder / "cached") as first,
            prepared(online, folder / "online") as second,
        ):
            usual = Usual(folder / "images.npz", teacher, weights, args.student, args)
            ways: dict[str, Callable[[int], Any]] = {
                "usual": usual.epoch, "online": second.train_epoch, "cached": first.train_epoch,
            }  # fmt: skip
            spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for turn in range(args.rounds + 1):
                for way in [*ways][turn % 3 :] + [*ways][: turn % 3]:
                    spent[way].append(seconds_of(ways[way], turn))
    pair = f"{teacher} -> {args.student}"
    middle = {
        way: tuple(median(column) for column in zip(*times[1:], strict=True))
        for way, times in spent.items()
    }
    ratios = {
        way: [a[0] / b[0] for a, b in zip(spent["usual"][1:], spent[way][1:], strict=True)]
        for way in ("online", "cached")
    }
    return {
        f"{pair}, {label}": {
            "seconds": round(middle[way][0], 3), "processor seconds": round(middle[way][1], 3)
        } | ({"usual / this": round(median(ratios[way]), 3)} if way in ratios else {})
        for way, label in (
            ("usual", "a usual trainer"), ("online", "kdcache, teacher in the loop"),
            ("cached", "kdcache, from its store"),
        )
    }  # fmt: skip


def seconds_of(epoch: Callable[[int], Any], turn: int) -> tuple[float, float]:
    """Wall and processor seconds of an epoch, its workers included."""
    process = psutil.Process()

    def work() -> float:
        times = process.cpu_times()
        living = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
        return sum(times[:4]) + living

    begun, before = time.perf_counter(), work()
    epoch(turn)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, work() - before


if __name__ == "__main__":
    main()

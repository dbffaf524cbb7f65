"""How many views? Accuracy of a student against the number of stored views.

    python evidence/views.py --dataset digits --teacher TEACHER --out evidence/views-digits.json

Every number of views is trained from the same store (`--views`), so runs differ in nothing else. The
schedule `random` draws each sample's view afresh every epoch; `exhaustive` is the store of all views
of pad-crop-flip, which makes it online distillation with fresh random crops.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import fmean, stdev

import torch

from kdcache import Training, ViewPlan, dump, load_dataset, load_teacher, make_augmentation, train
from kdcache.objectives import ObjectiveConfig
from kdcache.training.optim import Optimization
from kdcache.runs import read_summary


def main() -> None:
    """Train every student and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--teacher", required=True, help="a run, or NAME@FILE")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--views", default="1,2,4,8,16,32")
    parser.add_argument("--no-exhaustive", action="store_true")
    parser.add_argument("--samples", type=int, help="train on so many")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--online", action="store_true", help="and the teacher in the loop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep stores and runs here")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    counts = [int(word) for word in args.views.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        stores = _dump(args, folder, max(counts))
        ways = {
            f"{count} view{'s' * (count > 1)}": {"stores": (stores["views"],), "views": count}
            for count in counts
        }
        if not args.no_exhaustive:
            ways["exhaustive"] = {"stores": (stores["exhaustive"],)}
        if args.online:
            ways["online, fresh crops"] = {"online": (args.teacher,), "schedule": "epoch"}
        found = {}
        for name, way in ways.items():
            top1 = [
                _train(args, folder / f"{name}-{seed}", seed, way) for seed in range(args.seeds)
            ]
            spread = stdev(top1) if len(top1) > 1 else 0.0
            found[name] = {"top1": top1, "mean": fmean(top1), "std": spread}
            print(f"{name:<20} {found[name]['mean']:.4f} +- {spread:.4f}", flush=True)
    words = [word.rpartition("/")[2] if "/" in word else word for word in sys.argv[1:]]
    about = {
        "command": "python evidence/views.py " + " ".join(words),
        "machine": f"{platform.machine()}, {args.device}, {args.threads} thread(s)",
        "torch": torch.__version__,
        "seeds": args.seeds,
        "accuracy": "test top-1 after the last epoch",
    }
    args.out.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")


def _dump(args: argparse.Namespace, folder: Path, most: int) -> dict[str, str]:
    dataset = load_dataset(args.dataset, "train", args.data_root)
    teacher = load_teacher(
        args.teacher,
        classes=dataset.classes,
        channels=dataset.image_shape[0],
        size=dataset.image_shape[-1],
        device=args.device,
    )
    stores = {}
    for name in ("views",) if args.no_exhaustive else ("views", "exhaustive"):
        augmentation = "pad-crop-flip" if name == "views" else "exhaustive"
        plan = ViewPlan(dataset, make_augmentation(augmentation, dataset), seed=0)
        stores[name] = str(folder / f"{name}.zarr")
        dump(plan, [(teacher, stores[name])], plan.views or most, device=args.device)
    return stores


def _train(args: argparse.Namespace, out: Path, seed: int, way: dict[str, object]) -> float:
    options = {"schedule": "random"} | way
    training = Training(
        dataset=args.dataset,
        data_root=str(args.data_root) if args.data_root else None,
        model=args.student,
        objective=ObjectiveConfig(method="kd", standardize="unbiased"),
        optimization=Optimization(epochs=args.epochs, batch_size=args.batch_size),
        train_samples=args.samples,
        seed=seed,
        device=args.device,
        threads=args.threads,
        **options,
    )
    top1: float = read_summary(train(training, out).path)["last_top1"]
    return top1


if __name__ == "__main__":
    warnings.simplefilter("error", category=RuntimeWarning)
    main()

"""The price of a teacher on this machine: `kdcache.bench.train` as JSON.

    python evidence/price.py --dataset arrays:cifar100.npz --student resnet8x4 --teacher resnet20@FILE \
        --normalisation cifar100 --samples 1024 --out evidence/price.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from kdcache import Training, ViewPlan, dump, load_dataset, load_teacher, make_augmentation
from kdcache import training as training_module
from kdcache.bench.train import bench_train
from kdcache.objectives import ObjectiveConfig
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.training.optim import Optimization


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--teacher", required=True, help="a run, or NAME@FILE")
    parser.add_argument("--normalisation", help="of the teacher, where it does not say")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset = load_dataset(args.dataset, "train")
    teacher = load_teacher(
        args.teacher,
        classes=dataset.classes,
        channels=dataset.image_shape[0],
        size=dataset.image_shape[-1],
        preprocessing=PREPROCESSINGS.get(args.normalisation),
        device=args.device,
    )
    training_module.load_teacher = lambda spec, **options: teacher
    optimization = Optimization(epochs=240, batch_size=args.batch_size)
    probe = Training(dataset=args.dataset, model=args.student, train_samples=args.samples)
    rows, _ = training_module._choose(dataset, probe)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "teacher.zarr"
        some = dataset.subset(rows)
        plan = ViewPlan(some, make_augmentation("pad-crop-flip", some), seed=0)
        dump(plan, [(teacher, store)], views=4, device=args.device)
        training = replace(
            probe,
            objective=ObjectiveConfig(method=args.method, standardize="unbiased"),
            optimization=optimization,
            stores=(str(store),),
            device=args.device,
            threads=args.threads,
        )
        found = bench_train(training, args.teacher, args.rounds)
    words = [word.rpartition("/")[2] if "/" in word else word for word in sys.argv[1:]]
    about = {
        "command": "python evidence/price.py " + " ".join(words),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.device}",
        "load_average_at_the_end": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    args.out.write_text(json.dumps(about | found, indent=1) + "\n")
    for way in ("ce", "cached", "online"):
        print(f"{way:<7} {found[way]['median']:.3f} s/epoch, waiting {found[way]['data_wait']:.2%}")
    for ratio in ("cached_over_ce", "cached_over_ce_cpu", "online_over_cached"):
        print(ratio, {name: round(value, 3) for name, value in found[ratio].items()})


if __name__ == "__main__":
    main()

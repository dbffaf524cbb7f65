"""Cached equals online on real images, for every objective and several encodings.

    python evidence/equality.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --out evidence/equality-cifar100.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from study import about, small_dataset

from kdcache import (
    CachedViews,
    Training,
    ViewPlan,
    dump,
    load_dataset,
    load_teacher,
    make_augmentation,
)
from kdcache.bench.equality import OBJECTIVES, drift, first_step
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import held_by, read_fields, shapes_of_model
from kdcache.training.optim import Optimization
from kdcache_stores import open_store

FIELDS = ("logits", "pooled", "last", "attention", "stages", "stages:pre")


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--normalisation", help="of the teacher, where it does not say")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--encodings", default="float32,float16,quantized")
    parser.add_argument("--control", type=int, default=5, help="batch of the control's teacher")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = small_dataset(args.dataset, None, args.samples, 1000, Path(folder) / "data.npz")
        dataset = load_dataset(data, "train")
        teacher = load_teacher(
            args.teacher,
            classes=dataset.classes,
            channels=dataset.image_shape[0],
            size=dataset.image_shape[-1],
            preprocessing=PREPROCESSINGS.get(args.normalisation),
            fields=FIELDS,
        )
        stores = _stores(Path(folder), dataset, teacher, args.encodings.split(","))
        for name, config in ((name, OBJECTIVES[name]) for name in args.objectives.split(",")):
            read, pairs = config.needs_teacher, config.record.pairs
            shape = dataset.image_shape
            shapes = shapes_of_model(args.student, dataset.classes, shape, config)
            for encoding in args.encodings.split(",") if read else ["float32"]:
                store = stores[pairs, encoding]
                with open_store(store) as opened:
                    fields = read_fields(config, shapes, held_by([opened])) if read else ()
                live = replace(teacher, fields=tuple(dict.fromkeys(("logits", *fields))))
                with CachedViews(dataset, [store], args.batch_size, fields, pairs=pairs) as views:
                    first = first_step(views, live, args.student, config)
                training = Training(
                    dataset=data,
                    model=args.student,
                    objective=config,
                    optimization=Optimization(epochs=2, batch_size=args.batch_size),
                    stores=(str(store),),
                )
                runs = drift(
                    training, args.teacher, Path(folder) / f"{name}-{encoding}", args.control
                )
                results[f"{name}, {encoding}"] = {"first_step": first, "two_epochs": runs}
                print(name, encoding, json.dumps(results[f"{name}, {encoding}"]), flush=True)
    more = {
        "samples": args.samples,
        "teacher_batch_of_the_dump": 256,
        "teacher_batch_of_the_control": args.control,
    }
    args.out.write_text(json.dumps(about() | more | {"found": results}, indent=1) + "\n")


def _of_logits(encoding: str) -> dict[str, str]:
    """The encoding of the logits beside other fields in one: channels are not for logits."""
    return {"logits": "float16"} if encoding.startswith("channels") else {}


def _stores(
    folder: Path, dataset: object, teacher: Teacher, encodings: list[str]
) -> dict[tuple[bool, str], Path]:
    stores = {}
    for pairs, augmentation in ((False, "pad-crop-flip"), (True, "weak+strong")):
        plan = ViewPlan(dataset, make_augmentation(augmentation, dataset), seed=0)
        for encoding in encodings:
            path = stores[pairs, encoding] = folder / f"{augmentation}-{encoding}.zarr"
            given = replace(teacher, fields=("logits",)) if pairs else teacher
            dump(plan, [(given, path)], views=4 if pairs else 2,
                 encoding=dict.fromkeys(given.fields, encoding) | _of_logits(encoding))  # fmt: skip
    return stores


if __name__ == "__main__":
    main()

"""Feature, relation and self-distillation beside logits, on all of CIFAR-100: accuracy, seconds, bytes.

    python evidence/features.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/features.json

A row is a method with its published weights; what is read of its teacher comes from a store of its
own, at float16. FitNet, OFD and ReviewKD run their teacher in the loop, born-again networks learn from the
row of labels alone. The rows stand in the order of their worth, --only names those wanted ("kd;crd"), and
the file is written after each: a study that is stopped has whole rows, and a repeated call trains what is
missing. A resnet8 takes about seven minutes of one core for 20 epochs, CRD with 16,384 negatives six times
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from study import Arm, Study, named

from kdcache import ViewPlan, dump, load_dataset, load_teacher, make_augmentation
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import PREPROCESSINGS
from kdcache.runs import SUMMARY, read_summary
from kdcache.training.preparation import train_together
from kdcache_stores import describe, open_store

#: Row -> (objective, the fields that it reads of its store, whether its teacher runs in the loop).
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "ce": ({"method": "ce"}, (), False),
    "kd": ({"method": "kd"}, ("logits",), False),
    "kd+std": ({"method": "kd", "standardize": "unbiased"}, ("logits",), False),
    "simkd": ({"method": "simkd"}, ("last",), False),
    "cat-kd": ({"method": "cat-kd"}, ("last",), False),
    "at": ({"method": "at"}, ("attention",), False),
    "rkd": ({"method": "rkd"}, ("pooled",), False),
    "rkd, kd+std added": (
        {"method": "rkd", "add": ("kd",), "standardize": "unbiased"}, ("pooled", "logits"), False,
    ),
    "dist": ({"method": "dist"}, ("logits",), False),
    "ps-kd": ({"method": "ps-kd"}, (), False),
    "byot": ({"method": "byot"}, (), False),
    "dml": ({"method": "dml"}, (), False),
    "ban": ({"method": "ban"}, ("logits",), False),
    "kd, hard labels": ({"method": "kd", "options": {"target": "hard"}}, ("logits",), False),
    "fitnet": ({"method": "fitnet"}, (), True),
    "reviewkd": ({"method": "reviewkd"}, (), True),
    "ofd": ({"method": "ofd", "options": {"statistics": "batch"}}, (), True),
    "crd": ({"method": "crd"}, ("pooled",), False),
    "crd, kd+std added": (
        {"method": "crd", "add": ("kd",), "standardize": "unbiased"}, ("pooled", "logits"), False,
    ),
}  # fmt: skip

#: Warm-ups that the papers give in epochs of 240 are shortened with the training.
WARMUPS = {"reviewkd": 20}


class Features(Study):
    """A study whose stores hold one field each."""

    def field_store(self, field: str, teacher: str) -> str:
        """The path of a store of one field, written unless it is there."""
        name = Path(teacher.partition("@")[0]).name
        path = self.folder / f"{name}-{field}-{self.args.views}.zarr"
        dataset = load_dataset(self.data(), "train")
        plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
        loaded = load_teacher(
            teacher,
            classes=dataset.classes,
            channels=dataset.image_shape[0],
            size=dataset.image_shape[-1],
            preprocessing=PREPROCESSINGS.get(self.args.normalisation),
            device=self.args.device,
            fields=(field,),
        )
        encodings = dict.fromkeys(loaded.fields, "float16")
        dump(plan, [(loaded, path)], self.args.views, encoding=encodings, device=self.args.device)
        return str(path)

    def arm(self, name: str) -> tuple[Arm, float]:
        """A row, and the bytes that it reads of each view."""
        values, fields, online = ROWS[name]
        teacher = self.args.teacher
        if name == "ban":
            teacher = str(self.run({"ce": self.arm("ce")[0]})["ce"][0])
        options = dict(values.get("options", {}))
        if name in WARMUPS:
            options["warmup"] = max(1, round(WARMUPS[name] * self.args.epochs / 240))
        # Everybody is shown the views of the stores.
        stores = [self.field_store(field, teacher) for field in fields or ("logits",)]
        settings: dict[str, Any] = {"stores": tuple(stores), "schedule": "epoch"}
        if online:
            settings["online"] = (teacher,)
        objective = ObjectiveConfig(**(values | {"options": options}))
        control = None if name == "ce" or self.args.seeds < 2 else "ce"
        return Arm(objective, settings, control), sum(
            bytes_of(store) for store in (stores if fields else [])
        )

    def row(self, name: str) -> dict[str, Any]:
        """Train a row's students; what became of them."""
        arm, nbytes = self.arm(name)
        if arm.objective.record.peers:
            self.train_pairs(arm)
        arms = {"ce": self.arm("ce")[0]} | {name: arm}
        result: dict[str, Any] = self.compare(arms)[name]
        summaries = [read_summary(path) for path in self.run({name: arm})[name]]
        return result | {
            "seconds_per_epoch": round(fmean(s["seconds_per_epoch"] for s in summaries), 2),
            "bytes_per_view": round(nbytes),
            "teacher_forwards": summaries[0]["teacher_forwards"],
        }

    def train_pairs(self, arm: Arm) -> None:
        """Train each seed's student with one that teaches it, whose run lies beside; seconds are of both."""
        for seed in range(self.args.seeds):
            first = self.training(arm, seed)
            other = replace(first, seed=seed + 1000, data_seed=first.stream_seed)
            path = self.folder / "runs" / named(first, self.folder)
            if not (path / SUMMARY).exists():
                train_together([first, other], [path, path.with_name(f"{path.name}-peer")])


def bytes_of(store: str) -> float:
    """Bytes on disk per sample and view, of all fields."""
    with open_store(store) as opened:
        fields: Mapping[str, Any] = describe(opened)["fields"]
        return sum(field["bytes_per_row"] for field in fields.values())


def main() -> None:
    """Train every row and write one JSON file, anew after each."""
    study = Features(
        __doc__, samples=50000, test_samples=10000, epochs=20, batch_size=64, lr=0.05, views=4, seeds=1
    )  # fmt: skip
    wanted = [word for word in study.args.only.split(";") if word] or list(ROWS)
    study.args.only = ""
    results: dict[str, Any] = {}
    for name in wanted:
        results[name] = study.row(name)
        study.report(results)


if __name__ == "__main__":
    main()

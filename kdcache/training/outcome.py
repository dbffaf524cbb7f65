"""What a training says of itself: the resolved configuration at its start, the summary at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kdcache._version import __version__
from kdcache.data.item import Item
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import Inputs
from kdcache.pruning.narrowing import Widths
from kdcache.teachers.teacher import Teacher
from kdcache.training.settings import Training
from kdcache.training.tuning import computing
from kdcache.views.cached import CachedViews
from kdcache.views.sizes import input_shape
from kdcache_stores.objects.urls import redact


def resolved(
    training: Training,
    views: CachedViews,
    preprocessing: Inputs,
    objective: ObjectiveConfig,
    teachers: list[Teacher],
    ranks: int,
    projector: dict[str, int] | None = None,
    widths: Widths | None = None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that decides the result, as tables of TOML values.

    Args:
        projector: what the network has beside its model, see `kdcache.models.projected`.
        widths: of the layers that a pruning makes narrower than its model has them.
        peers: the students that teach each other, in the order of their steps, this one among them.
    """
    t, dataset, plan = training, views.dataset, views.plan.to_store()
    shape = input_shape(preprocessing, views.plan)
    if isinstance(shape, Item):
        inputs: dict[str, Any] = {"item": shape.to_dict()}
    else:
        channels, height, width = shape
        inputs = {
            "channels": channels,
            "size": width,
            "height": None if height == width else height,
        }
    config = {
        "kdcache": __version__,
        "data": {
            "name": t.dataset, "root": t.data_root, "fingerprint": dataset.fingerprint,
            "train_samples": t.train_samples, "val_split": t.val_split, "subset": t.subset,
            "augmentation": plan.augmentation, "view_seed": plan.seed, "views": views.views,
            "schedule": t.schedule, "seed": t.data_seed,
            "resident_views": views.window * views.group if t.schedule == "random" else None,
            "views_per_decode": views.views_per_decode if views.views_per_decode > 1 else None,
        },
        "model": {
            "name": t.model, "classes": dataset.classes, **inputs,
            "init_weights": t.init_weights, "projector": projector,
            "widths": widths or None,
        },
        "preprocessing": preprocessing.to_dict(),
        "objective": objective.to_dict(),
        "training": asdict(t.optimization) | {
            "seed": t.seed, "precision": t.precision, "channels_last": t.channels_last,
            "compile": t.compile, "ema": t.ema, "device": t.device, "threads": t.threads,
            "prune": t.prune, "prune_by": t.prune_by if t.prune else None,
            "prune_epochs": t.pruning.epochs if t.pruning else None,
            "ranks": ranks, "eval_every": t.eval_every if t.eval_every > 1 else None,
        },
        "computing": computing(t),
        "online": [teacher.to_store().digest for teacher in teachers],
        "stores": [
            {"digest": digest, "plan": store.plan.digest}
            for store, digest in zip(views.stores, views.digests, strict=True)
        ],
        "peers": list(peers),
        "store_paths": [redact(str(path)) for path in t.stores],
    }  # fmt: skip
    return {key: value for key, value in _without_none(config).items() if value not in ({}, [])}


def summarized(
    training: Training,
    views: CachedViews,
    records: list[dict[str, Any]],
    *,
    parameters: int,
    held_out: bool,
    test_samples: int,
    teacher_forwards: int,
    side_by_side: int,
) -> dict[str, Any]:
    """The summary of a finished training: last and best accuracy, seconds per epoch, what it read and knows.

    Its `teachers` are those whose dump measured them on clean test images, with that top-1.
    """
    chosen_on = "val_top1" if held_out else "test_top1"
    tested = [record for record in records if chosen_on in record]
    last, best = records[-1], max(tested, key=lambda record: record[chosen_on])
    seconds = sum(record["seconds"] for record in records)
    each = views.views_per_decode
    measured = {s.teacher.architecture: s.teacher.clean_top1 or {} for s in views.stores}
    teachers = {name: top1["test"] for name, top1 in measured.items() if "test" in top1}
    random = training.schedule == "random" and views.views is not None
    return {
        "method": training.objective.method,
        "model": training.model,
        "parameters": parameters,
        "epochs": last["epoch"],
        "last_top1": last["test_top1"],
        "last_top5": last["test_top5"],
        "best_top1": best["test_top1"],
        "best_top5": best["test_top5"],
        "best_epoch": best["epoch"],
        "best_chosen_on": "held-out training samples" if held_out else "test set",
        "last_nll": last["test_nll"],
        "last_ece": last["test_ece"],
        "seconds_per_epoch": float(np.median([record["seconds"] for record in records])) / each,
        "data_wait_fraction": sum(r["data_wait_seconds"] for r in records) / max(seconds, 1e-9),
        "teacher_forwards": teacher_forwards,
        "train_samples": len(views.rows),
        "samples_left_out": views.left_out,
        "test_samples": test_samples,
        "stores": views.digests,
        **({"class_names": names} if (names := views.dataset.class_names) else {}),
        **({"teachers": teachers} if teachers else {}),
        **({"students_side_by_side": side_by_side} if side_by_side > 1 else {}),
        **({"views_per_decode": each} if each > 1 else {}),
    } | ({"resident_views": views.window * views.group, "views": views.views} if random else {})


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not set is not written."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value

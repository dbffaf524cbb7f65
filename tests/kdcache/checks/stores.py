"""Stores and cases with one thing wrong, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdcache.checks.all_rules import run_rules
from kdcache.checks.case import Case
from kdcache.methods.config import ObjectiveConfig
from kdcache_stores import FieldSpec, Plan, Samples, Store, StoredTeacher, StoreWriter, open_store

CLASSES, ROWS, VIEWS = 10, 1000, 8


def teacher_logits(
    labels: np.ndarray,
    *,
    views: int = VIEWS,
    classes: int = CLASSES,
    right: float = 0.8,
    scale: float = 3.0,
    within: float = 0.15,
    seed: int = 0,
) -> np.ndarray:
    """(V, N, K): a teacher that is right so often, with spread `scale` and so much change over views."""
    rng = np.random.default_rng(seed)
    n = len(labels)
    said = np.where(rng.random(n) < right, labels, rng.integers(0, classes, n))
    base = rng.normal(size=(n, classes))
    base[np.arange(n), said] = base.max(1) + 2.5
    base = (base - base.mean(1, keepdims=True)) / base.std(1, keepdims=True)
    noise = within * rng.normal(size=(views, n, classes))
    return (scale * (base + noise)).astype(np.float32)


def write(
    path: Path,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    encoding: str = "float16",
    clean: dict[str, float] | None = None,
    augmentation: str | dict[str, Any] = "pad-crop-flip",
    shard_rows: int | None = None,
    name: str = "toy",
    provenance: dict[str, Any] | None = None,
) -> Store:
    """A sealed store of given logits, opened."""
    views, n, classes = logits.shape
    named = {"name": augmentation} if isinstance(augmentation, str) else augmentation
    samples = Samples([f"train/{i}" for i in range(n)], labels)
    plan = Plan("toy", "train", classes, samples.fingerprint, named, seed=0)
    teacher = StoredTeacher(name, "ab" * 32, {}, "float32", classes, clean_top1=clean)
    with StoreWriter(path, plan=plan, teacher=teacher, samples=samples, views=views,
                     fields={"logits": FieldSpec((classes,), encoding)}, config={},
                     shard_rows=shard_rows, provenance=provenance) as writer:  # fmt: skip
        for name, rows in writer.calibration_rows.items():
            writer.fit({name: logits[:2, rows]})
        for shard in writer.pending():
            writer.write(shard, {"logits": logits[shard.view, shard.start : shard.stop]})
        writer.seal()
    return open_store(path)


def store(path: Path, *, labels: np.ndarray | None = None, **options: Any) -> Store:
    """A store of `teacher_logits`; options of both."""
    labels = np.arange(ROWS) % CLASSES if labels is None else labels
    kept = {"encoding", "clean", "augmentation", "shard_rows", "name", "provenance"}
    told = {k: options.pop(k) for k in kept & options.keys()}
    given = options.pop("shown", labels)
    return write(path, teacher_logits(given, **options), labels, **told)


def rules(case: Case) -> list[str]:
    """The names of the rules that speak."""
    return [finding.rule for finding in run_rules(case)]


def taught(*stores: Store, **options: Any) -> Case:
    """A student of plain KD for 240 epochs; options of `Case`, or of the objective."""
    own = {k: v for k, v in options.items() if k in Case.__dataclass_fields__}
    loss = {k: v for k, v in options.items() if k not in own}
    objective = ObjectiveConfig(**({"method": "kd"} | loss))
    return Case(**({"stores": list(stores), "objective": objective, "epochs": 240} | own))

"""Small stores to test with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache_stores import FieldSpec, Plan, Probe, Samples, StoredTeacher, StoreWriter

from .faults import QuickDisk

CLASSES = 10
SAMPLES = 50


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def make_samples(n: int = SAMPLES, classes: int = CLASSES) -> Samples:
    return Samples([f"train/{i:05d}" for i in range(n)], np.arange(n) % classes)


def make_plan(samples: Samples, classes: int = CLASSES, **changes: Any) -> Plan:
    values = {
        "dataset": "toy",
        "split": "train",
        "classes": classes,
        "fingerprint": samples.fingerprint,
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "seed": 7,
    }
    return Plan(**{**values, **changes})


def make_teacher(classes: int = CLASSES, **changes: Any) -> StoredTeacher:
    values = {
        "architecture": "toy",
        "weights_sha256": "ab" * 32,
        "preprocessing": {"mean": [0.5], "std": [0.25]},
        "precision": "float32",
        "classes": classes,
    }
    return StoredTeacher(**{**values, **changes})


def make_logits(view: int, n: int = SAMPLES, classes: int = CLASSES) -> np.ndarray:
    rng = np.random.default_rng(view)
    logits = rng.normal(0, 2, (n, classes)).astype(np.float32)
    logits[np.arange(n), np.arange(n) % classes] += 6
    return logits


def make_probe(row: int, view: int) -> Probe:
    return Probe(row, view, f"{row:032x}{view:032x}", bytes([row % 256, view % 256, 0]))


def open_writer(
    path: Path, views: int = 3, encoding: str = "float16", **changes: Any
) -> StoreWriter:
    samples = changes.pop("samples", None) or make_samples()
    arguments: dict[str, Any] = {
        "plan": make_plan(samples),
        "teacher": make_teacher(),
        "samples": samples,
        "views": views,
        "fields": {"logits": FieldSpec((CLASSES,), encoding)},
        "config": {"batch_size": 16},
        "shard_rows": 20,
        "disk": QuickDisk(),
    }
    return StoreWriter(path, **{**arguments, **changes})


def write_pending(writer: StoreWriter, limit: int | None = None) -> None:
    n, classes = len(writer.samples), writer.header.plan.classes
    for name, rows in writer.calibration_rows.items():
        writer.fit({name: np.stack([make_logits(v, n, classes)[rows] for v in (0, 1)])})
    for shard in writer.pending()[:limit]:
        logits = make_logits(shard.view, n, classes)[shard.start : shard.stop]
        probes = [make_probe(shard.start, shard.view)]
        writer.write(shard, {"logits": logits}, probes)


def dump(path: Path, views: int = 3, encoding: str = "float16", **changes: Any) -> Path:
    with open_writer(path, views, encoding, **changes) as writer:
        write_pending(writer)
        writer.seal()
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return dump(tmp_path / "store")

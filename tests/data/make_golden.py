"""Make the golden stores of formats 1.0 and 1.1 in this folder: one for each thing that the format must hold.

    PYTHONPATH=stores python tests/data/make_golden.py [FOLDER]

Their logits are small integers over 64, exact in every float type and computed without a random
number generator, so that `logits` can tell what each store must hold.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kdcache_stores import FieldSpec, Plan, Probe, Samples, StoredTeacher, StoreWriter

STORES: dict[str, dict[str, Any]] = {
    # what it holds: keys, labels, augmentation, views, fields with shape and encoding
    "train": {
        "keys": [f"train/{row:03d}" for row in range(12)],
        "labels": [row % 7 for row in range(12)],
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "views": 3,
        "fields": {"logits": ((7,), "float16")},
    },
    "test": {
        "keys": [f"test/{row:03d}" for row in range(9)],
        "labels": [(3 * row) % 7 for row in range(9)],
        "augmentation": {"name": "none"},
        "views": 1,
        "fields": {"logits": ((7,), "float32")},
    },
    "unlabelled": {
        "keys": [f"unlabelled/{row:03d}" for row in range(10)],
        "labels": [-1] * 10,
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "views": 2,
        "fields": {"logits": ((7,), "quantized:0.05")},
        "hash_keys": True,
    },
    "weak-strong": {  # view = pair * 2 + branch
        "keys": [f"train/{row:03d}" for row in range(8)],
        "labels": [row % 7 for row in range(8)],
        "augmentation": {"name": "branches", "branches": ["weak", "strong"]},
        "views": 4,
        "fields": {"logits": ((7,), "float16")},
    },
    "feature-map": {
        "keys": [f"train/{row:03d}" for row in range(6)],
        "labels": [row % 7 for row in range(6)],
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "views": 2,
        "fields": {"logits": ((7,), "float16"), "pooled": ((3, 2, 2), "float16")},
    },
    "sequences": {  # a row is a token position; labels are next tokens, -1 after the last
        "keys": [f"text-{text}#{place}" for text, n in enumerate((5, 2, 4)) for place in range(n)],
        "labels": [299, 4, 5, 17, -1, 8, -1, 120, 0, 6, -1],
        "augmentation": {"name": "none"},
        "views": 1,
        "classes": 300,
        "fields": {"logits": ((300,), "topk:4")},
    },
    "compact": {  # a base of integer components per row and a basis are kept once
        "keys": [f"train/{row:03d}" for row in range(12)],
        "labels": [row % 7 for row in range(12)],
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "views": 3,
        "fields": {"logits": ((7,), "compact:0.003")},
    },
    "features": {  # format 1.1: a head, `channels` of one and two axes, an error in the manifest
        "keys": [f"train/{row:03d}" for row in range(12)],
        "labels": [row % 7 for row in range(12)],
        "augmentation": {"name": "pad-crop-flip", "padding": 4},
        "views": 2,
        "fields": {
            "logits": ((7,), "quantized:0.05"),
            "pooled": ((5,), "channels:0.02"),
            "maps": ((3, 2, 2), "channels:0.05"),
            "tokens": ((4, 3), "channels:0.05"),
        },
        "head": True,
    },
}


def values(view: int, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """The live output of one view, float32 (rows, *shape): multiples of 1/64 within +-8."""
    count = int(np.prod(shape))
    numbers = np.arange(rows * count, dtype=np.int64).reshape(rows, *shape)
    return (((numbers * 7919 + view * 104729) * 31 % 1021 - 510) / 64).astype(np.float32)


def head() -> tuple[np.ndarray, np.ndarray]:
    """Weight (7, 5) and bias (7,)."""
    return values(8, 7, (5,)), values(9, 1, (7,))[0]


def samples(name: str) -> Samples:
    return Samples(STORES[name]["keys"], np.array(STORES[name]["labels"]))


def make(name: str, path: Path) -> None:
    about = STORES[name]
    classes = about.get("classes", 7)
    fields = about["fields"]
    plan = Plan(
        "golden", name, classes, samples(name).fingerprint, about["augmentation"], seed=2026
    )
    teacher = StoredTeacher(
        "golden", "5e" * 32, {"mean": [0.5], "std": [0.25]}, "float32", classes, clean_top1=None
    )
    with StoreWriter(
        path,
        plan=plan,
        teacher=teacher,
        samples=samples(name),
        views=about["views"],
        fields={field: FieldSpec(shape, encoding) for field, (shape, encoding) in fields.items()},
        config={"batch_size": 4},
        provenance={"command": "make_golden.py"},
        shard_rows=5,
        hash_keys=about.get("hash_keys", False),
        head=head() if about.get("head") else None,
    ) as writer:
        for field, rows in writer.calibration_rows.items():
            shape, both = fields[field][0], (0, 1)
            writer.fit(
                {field: np.stack([values(v, len(about["keys"]), shape)[rows] for v in both])}
            )
        for shard in writer.pending():
            rows = slice(shard.start, shard.stop)
            arrays = {
                field: values(shard.view, len(about["keys"]), shape)[rows]
                for field, (shape, _) in fields.items()
            }
            probe = Probe(shard.start, shard.view, f"{shard.start:064x}", bytes([shard.view, 255]))
            writer.write(shard, arrays, [probe])
        writer.seal()


if __name__ == "__main__":
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for store in STORES:
        make(store, folder / f"golden-{store}")

"""How close `compact` comes to the rate-distortion bound, and what it costs at every scale.

    python evidence/compact_bound.py live.zarr exhaustive.zarr --views 1 2 4 --classes 1000 \
        --out evidence/compact_bound.json

The logits of each store (live ones: float32) are written anew by `compact` for several targets and
numbers of views. The bound is that of Gaussian vectors of the same covariances, no nearer to the live
rows in mean square: with B the covariance between samples and W that within them, the views of a sample
are V B + W once and W V - 1 times, each coded by reverse water-filling (Cover & Thomas, Elements of
Information Theory, ch. 10.3.3). It knows all views of a sample at once; a store decodes each view
alone. With --classes synthetic logits follow: a stand-in for teachers that have more classes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study import about

from kdcache.bench.store_bench import write_store
from kdcache_stores import Store, describe, open_store
from kdcache_stores.encodings.fidelity import standardize

Floats = NDArray[np.float32]
TARGETS = (3e-4, 2.5e-5)


def live_logits(path: str, samples: int) -> Floats:
    """Float32 (views, samples, K) of a store, samples spread evenly."""
    with open_store(path) as store:
        rows = np.linspace(0, len(store) - 1, min(samples, len(store))).round().astype(np.int64)
        return np.stack([store.read(view, rows) for view in store.view_range])


def synthetic_logits(views: int, samples: int, classes: int, features: int = 512) -> Floats:
    """A linear layer over features whose spread falls as a power, a winner, 4% of the variance within.

    The power, 0.4, is near that of the components of a CIFAR-100 teacher's logits.
    """
    rng = np.random.default_rng(0)
    spread = np.arange(1, features + 1) ** -0.4
    layer = rng.normal(size=(features, classes)) / np.sqrt(features)
    centre = rng.normal(size=(samples, features)) + 4 * layer.T[np.arange(samples) % classes]
    moved = (centre + 0.2 * rng.normal(size=centre.shape).astype(np.float32) for _ in range(views))
    return np.stack([(3 * (view * spread) @ layer).astype(np.float32) for view in moved])


def gaussian_bits(variances: NDArray[np.float64], distortion: float) -> float:
    """Bits of R(D) for independent Gaussians, in all, at a total squared error."""
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (
            (level, high) if np.minimum(level, variances).sum() < distortion else (low, level)
        )
    return float(0.5 * np.log2(np.maximum(variances / high, 1)).sum())


def bound(live: Floats, decoded: Sequence[Floats]) -> float:
    """Bytes a row of the bound at the distortion of `decoded`, both Z-scored."""
    views, _, classes = live.shape
    z = [standardize(view.astype(np.float64)) for view in live]
    rows = [standardize(view.astype(np.float64)) for view in decoded]
    distortion = sum(((a - b) ** 2).sum(axis=1).mean() for a, b in zip(z, rows, strict=True))
    mean = sum(z) / views
    between = views * np.cov(mean.T).reshape(classes, classes)
    variances = np.linalg.eigvalsh(between)
    if views > 1:
        within = sum((view - mean).T @ (view - mean) for view in z) / (len(mean) * (views - 1))
        variances = np.concatenate([variances, *[np.linalg.eigvalsh(within)] * (views - 1)])
    return gaussian_bits(np.maximum(variances, 0), distortion) / 8 / views


def decoding_cost(store: Store, repeats: int = 3) -> float:
    """CPU microseconds per row of the last view, all threads, the best of a few reads."""
    view = store.view_range[-1]
    out = store.read(view)  # SHA-256 is checked once, decoding is paid every time
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        store.read(view, out=out)
        times.append(time.process_time() - begun)
    return 1e6 * min(times) / len(store)


def measure(live: Floats, target: float) -> dict[str, Any]:
    """What a `compact` store of these logits is made of, reaches and costs."""
    views, samples, classes = live.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(path, list(live), np.full(samples, -1), f"compact:{target}")
        with open_store(path) as store:
            field = describe(store)["fields"]["logits"]
            decoded = [store.read(view) for view in range(views)]
            cost = decoding_cost(store)
    each = {name: round(size / (views * samples), 3) for name, size in field["arrays"].items()}
    row = sum(each[name] for name in ("values", "base", "basis"))
    return {
        "classes": classes,
        "samples": samples,
        "views": views,
        "target_kl_z": target,
        "reached": {name: field["fidelity"][name] for name in ("kl_z_mean", "kl_t4_mean")},
        "bytes_a_row": each,
        "codes_base_basis": round(row, 2),
        "gaussian_bound": round(bound(live, decoded), 2),
        "fitted": field["fitted"],
        "decoding_cpu_us_per_row": round(cost, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stores", nargs="*", help="of live logits, float32 or float16")
    parser.add_argument("--views", type=int, nargs="*", default=[], help="and all of the store's")
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--classes", type=int, help="synthetic logits too, 8 views of them")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sources = {f"{Path(path).stem}, ": live_logits(path, args.samples) for path in args.stores}
    if args.classes:
        sources["synthetic, "] = synthetic_logits(8, args.samples, args.classes)
    results = {}
    for name, logits in sources.items():
        for views in sorted({views for views in args.views if views < len(logits)} | {len(logits)}):
            for target in TARGETS:
                results[f"{name}{views} views, KL {target:g}"] = row = measure(
                    logits[:views], target
                )
                print(json.dumps(row), flush=True)
    args.out.write_text(json.dumps(about() | {"found": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

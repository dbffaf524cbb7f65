"""How fast stores are read, how small and faithful each encoding is, and that memory stays flat."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores import (
    ENCODINGS,
    FieldSpec,
    Plan,
    Samples,
    Store,
    StoredTeacher,
    StoreWriter,
    describe,
    open_store,
)

CLASSES = 100

KEPT = (10, 50)
"""How many entries `topk` keeps where it is measured; the other encodings are at their defaults."""

Floats = NDArray[np.float32]


def write_store(path: Path, logits: list[Floats], labels: NDArray[np.int64], encoding: str) -> None:
    """A store of logits float32 (N, K), one array per view."""
    samples = Samples([f"{row:07d}" for row in range(len(labels))], labels)
    classes = logits[0].shape[1]
    plan = Plan("bench", "train", classes, samples.fingerprint, {"name": "none"}, seed=0)
    teacher = StoredTeacher("bench", "0" * 64, {}, "float32", classes)
    fields = {"logits": FieldSpec((classes,), encoding)}
    with StoreWriter(
        path, plan=plan, teacher=teacher, samples=samples, views=len(logits), fields=fields
    ) as writer:
        for name, rows in writer.calibration_rows.items():
            writer.fit({name: np.stack([view[rows] for view in logits[:2]])})
        for shard in writer.pending():
            writer.write(shard, {"logits": logits[shard.view][shard.start : shard.stop]})
        writer.seal()


def synthetic_logits(
    samples: int, views: int, classes: int = CLASSES
) -> tuple[list[Floats], NDArray[np.int64]]:
    """Logits shaped as a CIFAR-100 teacher's: related classes, a clear winner, small changes by view.

    Std about 3 over classes; a sample keeps to itself what it shares between views. Made of 30 latent
    dimensions and independent noise, so they can neither be compressed as well as real ones nor as badly
    as white noise: give a store of your own for figures that count.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    mixing = rng.normal(size=(30, classes)).astype(np.float32) / np.float32(np.sqrt(30))
    hidden = rng.normal(size=(samples, 30)).astype(np.float32)
    own = 2.0 * hidden @ mixing + 0.7 * rng.normal(size=(samples, classes)).astype(np.float32)
    own[np.arange(samples), labels] += 9
    made = []
    for _ in range(views):
        moved = 0.8 * rng.normal(size=(samples, 30)).astype(np.float32) @ mixing
        noise = 0.3 * rng.normal(size=(samples, classes)).astype(np.float32)
        made.append((own + moved + noise).astype(np.float32))
    return made, labels


def bench_reading(samples: int = 50_000, views: int = 4, rounds: int = 7) -> dict[str, Any]:
    """Whole views of a float16 store, against its shard files read and converted by NumPy alone.

    All from the page cache, in turns. "first" opens the store anew and checks every shard's SHA-256;
    "again" is every later pass, which checks the checksums of the chunks; "plain" checks nothing.

    Returns:
        `mb_per_second` of stored bytes, a list over rounds for each; `ratios` of "again" and of
        "first" to "plain", per round.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        path = Path(folder) / "store.zarr"
        write_store(path, *synthetic_logits(samples, views), "float16")
        shards = sorted((path / "logits" / "values" / "c").rglob("*"))
        files = [file for file in shards if file.is_file()]
        nbytes = sum(file.stat().st_size for file in files)
        out = np.empty((samples, CLASSES), np.float32)
        flat = np.empty(max(file.stat().st_size for file in files) // 2, np.float32)

        def plain() -> None:
            for file in files:
                raw = file.read_bytes()
                values = np.frombuffer(raw, np.float16, count=len(raw) // 2)
                flat[: len(values)] = values

        def read(store: Store) -> None:
            for view in range(views):
                store.read(view, out=out)

        speeds: dict[str, list[float]] = {"first": [], "again": [], "plain": []}
        for turn in range(rounds + 1):
            with open_store(path) as store:
                for name, kept in speeds.items():
                    begun = time.perf_counter()
                    if name == "plain":
                        plain()
                    else:
                        read(store)
                    if turn:  # the first round warms the page cache
                        kept.append(nbytes / 1e6 / (time.perf_counter() - begun))
    ratios = {
        name: [a / b for a, b in zip(speeds[name], speeds["plain"], strict=True)]
        for name in ("first", "again")
    }
    return {"samples": samples, "views": views, "nbytes": nbytes, "mb_per_second": speeds,
            "ratios": ratios}  # fmt: skip


def bench_encodings(
    samples: int = 10_000, views: int = 4, store: str | None = None
) -> list[dict[str, Any]]:
    """Size and fidelity of every encoding at its defaults, on the same logits.

    Args:
        store: take the logits of its first views and samples, instead of synthetic ones.

    Returns:
        Per encoding: `encoding`, `bytes_per_row`, the measures of fidelity (KL in nats at T=1, T=4 and
        Z-scored at tau=2, means and worst; agreement of the best class), and `rows_per_second` of
        decoding whole views, best of three.
    """
    logits, labels = (
        _logits_of(store, samples, views) if store else synthetic_logits(samples, views)
    )
    results = []
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        for name in encodings_for(logits[0].shape[1]):
            path = Path(folder) / name.replace(":", "-")
            write_store(path, logits, labels, name)
            with open_store(path) as written:
                info = describe(written)["fields"]["logits"]
                seconds = min(_decode_seconds(written) for _ in range(3))
            results.append(
                {"encoding": name, "bytes_per_row": info["bytes_per_row"], **(info["fidelity"] or {}),
                 "rows_per_second": len(labels) * len(logits) / seconds}
            )  # fmt: skip
    return results


def encodings_for(classes: int) -> list[str]:
    """Every encoding that can hold logits over so many classes."""
    sparse = [f"topk:{k}" for k in KEPT if k < classes]
    return [name for kind in ENCODINGS for name in (sparse if kind == "topk" else [kind])]


def _logits_of(path: str, samples: int, views: int) -> tuple[list[Floats], NDArray[np.int64]]:
    with open_store(path) as store:
        rows = slice(0, min(samples, len(store)))
        return [store.read(v, rows) for v in range(min(views, store.n_views))], store.labels[rows]


def _decode_seconds(store: Store) -> float:
    begun = time.perf_counter()
    for view in range(store.n_views):
        store.read(view)
    return time.perf_counter() - begun


def bench_memory(
    samples: int = 20_000, views: int = 4, factors: tuple[int, ...] = (1, 4, 16)
) -> list[dict[str, Any]]:
    """Peak memory of streaming a store through `Store.views`, as the store grows by its views.

    Each size is written and read by two processes of its own.

    Returns:
        Per factor: `factor`, `store_bytes`, and the growth of the peak resident size over the process as
        it stood before: `write_bytes`, `read_bytes`.
    """
    context, results = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        for factor in factors:
            path = Path(folder) / f"{factor}.zarr"
            with context.Pool(1) as pool:
                written = pool.apply(_write_peak, (str(path), samples, views * factor))
            with context.Pool(1) as pool:
                size, read = pool.apply(_read_peak, (str(path),))
            results.append(
                {"factor": factor, "store_bytes": size, "write_bytes": written, "read_bytes": read}
            )
    return results


def _write_peak(path: str, samples: int, views: int) -> int:
    [logits], labels = synthetic_logits(samples, 1)
    write_store(Path(path + ".warm"), [logits], labels, "float16")  # imports and allocators settle
    before = _peak_bytes()
    write_store(Path(path), [logits] * views, labels, "float16")
    return _peak_bytes() - before


def _read_peak(path: str) -> tuple[int, int]:
    before = _peak_bytes()
    with open_store(path) as store:
        for _view, logits in store.views(range(store.n_views)):
            del logits
        return store.nbytes, _peak_bytes() - before


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

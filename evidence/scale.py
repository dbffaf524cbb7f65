"""What a dataset of ImageNet's size costs: time and memory of each step, on synthetic keys and logits.

    python evidence/scale.py --keys 320291 1281167 --classes 1000 --out evidence/scale.json

Each step runs in a process of its own, whose peak memory is that of the step and of what it needs. The
images are two small JPEG files in tar archives of 50,000 members; the logits of a view are noise, the
same for every shard, so they compress as badly as any. With a fourth of the keys too, what is
linear takes a fourth as long.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from study import about

from kdcache.augment.specs import make_augmentation
from kdcache.data.loading import load_dataset
from kdcache.views.cached import CachedViews
from kdcache.views.plan import ViewPlan
from kdcache.views.replay import measure as measure_probes
from kdcache.views.replay import probe_rows
from kdcache_stores import FieldSpec, Plan, StoredTeacher, StoreWriter, open_store, verify
from kdcache_stores.share.pull import pull_store

MEMBERS = 50_000
SHARD = 16_384


def archives(folder: Path, keys: int, classes: int) -> None:
    """Tar archives with a folder per class, in no order of classes, and one image for all."""
    images = []
    for side in (32, 40):
        data = io.BytesIO()
        Image.new("RGB", (side, side), (9, 99, 199)).save(data, "JPEG")
        images.append(data.getvalue())
    for start in range(0, keys, MEMBERS):
        with open(folder / f"photos-train-{start // MEMBERS:04d}.tar", "wb") as file:
            for i in range(start, min(start + MEMBERS, keys)):
                member = tarfile.TarInfo(f"n{i * 7919 % classes:08d}/photograph_{i:08d}.JPEG")
                image = images[i % 2]
                member.size = len(image)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + image)
                file.write(bytes(-len(image) % tarfile.BLOCKSIZE))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    first = folder / "photos-val-0000.tar"
    with tarfile.open(first, "w") as archive:
        for label in range(classes):
            member = tarfile.TarInfo(f"n{label:08d}/0.JPEG")
            member.size = len(images[0])
            archive.addfile(member, io.BytesIO(images[0]))


class Steps:
    """The steps, each a method that yields between what is prepared and what is timed."""

    def __init__(self, folder: str, keys: int, classes: int) -> None:
        self.folder, self.keys, self.classes = Path(folder), keys, classes
        self.store = self.folder / "store"

    def _data(self) -> Any:
        return load_dataset(f"tar:{self.folder}/photos-*.tar", "train", self.folder / "root")

    def scan(self) -> Iterator[None]:
        """Read the archives through and index them."""
        yield
        self._data()

    def load(self) -> Iterator[None]:
        """The same dataset from its index."""
        yield
        self._data()

    def fingerprint(self) -> Iterator[None]:
        """SHA-256 over keys and labels."""
        data = self._data()
        yield
        print(data.fingerprint)

    def join(self) -> Iterator[None]:
        """The samples of a plan in a dataset of another order, by key."""
        data = self._data()
        other = data.subset(np.random.default_rng(0).permutation(len(data)))
        augmentation = make_augmentation("resized-crop-flip:size=32", data)
        yield
        ViewPlan(other, augmentation, 0, data.samples)

    def dump(self) -> Iterator[None]:
        """A first view of float16 logits."""
        yield from self._write(1)

    def growth(self) -> Iterator[None]:
        """A second view."""
        yield from self._write(2)

    def _write(self, views: int) -> Iterator[None]:
        data = self._data()
        plan = ViewPlan(data, make_augmentation("resized-crop-flip:size=32", data), 0)
        shape = (SHARD, self.classes)
        noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        teacher = StoredTeacher("noise", "00" * 32, {}, "float32", self.classes)
        fields = {"logits": FieldSpec((self.classes,), "float16")}
        stored: Plan = plan.to_store()
        yield
        with StoreWriter(self.store, plan=stored, teacher=teacher, samples=plan.samples, views=views,
                         fields=fields, shard_rows=SHARD if views == 1 else None) as writer:  # fmt: skip
            for shard in writer.pending():
                rows = probe_rows(plan, shard.view)
                rows = rows[(rows >= shard.start) & (rows < shard.stop)]
                images = plan.images(rows, shard.view) if len(rows) else None
                probes = [] if images is None else measure_probes(rows, shard.view, images)
                writer.write(shard, {"logits": noise[: shard.stop - shard.start]}, probes=probes)
            writer.seal()

    def first_batch(self) -> Iterator[None]:
        """From the dataset and the store to the first batch of 256 with its logits."""
        data = self._data()
        yield
        with CachedViews(data, [self.store], 256) as views:
            next(views.epoch(0))

    def second_batch(self) -> Iterator[None]:
        """One more batch of the same epoch."""
        data = self._data()
        with CachedViews(data, [self.store], 256) as views:
            batches = views.epoch(0)
            next(batches)
            yield
            next(batches)

    def verify(self) -> Iterator[None]:
        """Every byte of both views."""
        yield
        with open_store(self.store) as store:
            assert verify(store).ok

    def pull(self) -> Iterator[None]:
        """One of the two views, from a folder."""
        yield
        pull_store(self.store, self.folder / "pulled", (1, 2))
        shutil.rmtree(self.folder / "pulled")


STEPS = ("scan", "load", "fingerprint", "join", "dump", "growth", "first_batch", "second_batch",
         "verify", "pull")  # fmt: skip


def measure(steps: Steps, name: str, results: Any) -> None:
    """Seconds and peak megabytes of a step, and those before it; in a new process."""
    run = getattr(steps, name)()
    next(run)
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    next(run, None)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    results.put({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
                 "peak_mb_before": before.ru_maxrss // 1024, "peak_mb": after.ru_maxrss // 1024})  # fmt: skip


@contextmanager
def scratch(where: Path | None) -> Iterator[str]:
    """A folder for archives and store."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield folder


def all_steps(keys: int, classes: int, where: Path | None) -> dict[str, Any]:
    """Every step at one size."""
    result: dict[str, Any] = {"keys": keys, "classes": classes}
    with scratch(where) as folder:
        archives(Path(folder), keys, classes)
        steps = Steps(folder, keys, classes)
        context = multiprocessing.get_context("spawn")
        for name in STEPS:
            results = context.Queue()
            target: Callable[..., None] = measure
            process = context.Process(target=target, args=(steps, name, results))
            process.start()
            result[name] = results.get(timeout=3600)
            process.join()
            print(keys, name, result[name], flush=True)
    return result


def main() -> None:
    """Run every step at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[320_291, 1_281_167])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--scratch", type=Path, help="folder for about 10 GB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    done = [all_steps(n, args.classes, args.scratch) for n in args.keys]
    report = about() | {"results": done}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Stage 1: run teachers once over the views of a dataset and write what they say to stores.

Images are decoded and augmented once for all teachers. While the device forwards one shard, a thread
encodes, hashes and writes the one before; what a store already holds is skipped before an image is
decoded.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache import replay
from kdcache._version import __version__
from kdcache.teachers import Teacher
from kdcache.views import ViewPlan
from kdcache_stores import DataError, FieldSpec, MismatchError, Probe, Shard, StoreWriter

Target = tuple[Teacher, str | os.PathLike[str]]


class Observer(Protocol):
    """What a caller may watch of a dump."""

    def start(self, done: int, total: int) -> None:
        """``done`` of ``total`` rows are there already."""

    def batch(self, rows: int, top1: float | None) -> None:
        """``rows`` more rows were forwarded; running top-1 of the first teacher, if it is known."""


@dataclass(frozen=True)
class Dumped:
    """What one call of `dump` did: rows forwarded, rows found finished, seconds."""

    rows: int
    skipped: int
    seconds: float


@dataclass
class _Job:
    """One teacher and the store that it fills."""

    teacher: Teacher
    writer: StoreWriter
    pending: set[Shard]
    outputs: list[Tensor] = field(default_factory=list)


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Where and with what a store was made: versions, device and command, never a path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"kdcache": __version__, "python": platform.python_version()} | replay.versions()
    return {"versions": versions, "device": f"{device.type} ({name})", "command": command}


def dump(
    plan: ViewPlan,
    targets: Sequence[Target],
    views: int,
    *,
    encoding: str = "float16",
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
    seal: bool = True,
    command: str = "",
    watch: Observer | None = None,
) -> Dumped:
    """Write the logits of every teacher for ``views`` views of every sample, a store per teacher.

    Batches never cross a shard, so a row is forwarded in the same batch however often the dump was
    interrupted and however many parts share it.

    Args:
        plan: dataset, augmentation and seed of the views.
        targets: each teacher with the path of its store.
        views: number of views to store; a finished store with fewer grows.
        encoding: of the logits, a name of `kdcache_stores.ENCODINGS`.
        batch_size: images per forward pass.
        device: where the teachers are.
        workers: processes that decode image files.
        part: (i, n) takes the i-th (from 0) of n disjoint parts of the shards.
        seal: seal the stores at the end; False where other parts are still at work.
        command: the command line to record in the store's provenance.

    Raises:
        MismatchError: a store at one of the paths was made with another plan, teacher, encoding,
            batch size or precision; or a teacher of another class count.
        DataError: a logit that is not finite; sample and view are named.
    """
    begun, where = time.perf_counter(), torch.device(device)
    with ExitStack() as opened:
        jobs = []
        for teacher, path in targets:
            writer = StoreWriter(
                path,
                plan=plan.to_store(),
                teacher=teacher.to_store(),
                samples=plan.samples,
                views=views,
                fields={"logits": FieldSpec(shape=(plan.dataset.classes,), encoding=encoding)},
                config={"batch_size": batch_size},
                provenance=provenance(where, command),
            )
            opened.enter_context(writer)
            jobs.append(_Job(teacher, writer, set(writer.pending(part))))
            _prepare(plan, jobs[-1], batch_size, where, workers)
        todo = sorted(set().union(*(job.pending for job in jobs)))
        rows = sum(shard.rows for shard in todo)
        total = views * len(plan) if part == (0, 1) else rows
        if watch:
            watch.start(total - rows, total)
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as pool:
            _forward(plan, jobs, todo, batch_size, where, workers, pool, watch)
        if seal:
            for job in jobs:
                if not job.writer.sealed:
                    job.writer.seal()
    return Dumped(rows, total - rows, time.perf_counter() - begun)


def _prepare(
    plan: ViewPlan, job: _Job, batch_size: int, device: torch.device, workers: int
) -> None:
    """Let an encoding that learns do so: from two views of samples spread over the dataset."""
    if (rows := job.writer.lesson) is None:
        return
    views = range(min(2, plan.views or 2))
    cuts = [
        (view, rows[i : i + batch_size]) for view in views for i in range(0, len(rows), batch_size)
    ]
    said: list[list[NDArray[np.float32]]] = [[] for _ in views]
    stream = plan.stream([(part, view) for view, part in cuts], device=device, workers=workers)
    for (view, _), batch in zip(cuts, stream, strict=True):
        logits = job.teacher(batch.images)
        _require_classes(job.teacher, logits, plan)
        said[view].append(logits.float().cpu().numpy())
    job.writer.prepare({"logits": np.stack([np.concatenate(parts) for parts in said])})


def _cuts(shard: Shard, batch_size: int) -> Iterator[tuple[int, int]]:
    for start in range(shard.start, shard.stop, batch_size):
        yield start, min(start + batch_size, shard.stop)


def _forward(
    plan: ViewPlan,
    jobs: Sequence[_Job],
    todo: Sequence[Shard],
    batch_size: int,
    device: torch.device,
    workers: int,
    pool: ThreadPoolExecutor,
    watch: Observer | None,
) -> None:
    """Forward every shard; the pool finishes them one behind."""
    batches = [
        (np.arange(start, stop), shard.view)
        for shard in todo
        for start, stop in _cuts(shard, batch_size)
    ]
    stream = iter(plan.stream(batches, device=device, workers=workers))
    writing: list[Future[None]] = []
    hits, labelled = torch.zeros((), dtype=torch.int64, device=device), 0
    for shard in todo:
        wanted = [job for job in jobs if shard in job.pending]
        probe_rows = replay.probe_rows(plan, shard.view)
        probes: list[Probe] = []
        for _, stop in _cuts(shard, batch_size):
            batch = next(stream)
            probed = np.flatnonzero(np.isin(batch.rows, probe_rows))
            if len(probed):
                images = batch.images[torch.from_numpy(probed).to(device)]
                probes += replay.measure(plan, batch.rows[probed], shard.view, images)
            for job in wanted:
                said = job.teacher(batch.images)
                _require_classes(job.teacher, said, plan)
                job.outputs.append(said)
            hits += (said.argmax(1) == batch.labels).sum()
            labelled += int((plan.samples.labels[batch.rows] >= 0).sum())
            if watch:
                # Reading the count waits for the device, so on a GPU it is done once a shard.
                known = labelled and (device.type == "cpu" or stop == shard.stop)
                watch.batch(len(batch.rows), hits.item() / labelled if known else None)
        for job in wanted:
            logits, job.outputs = torch.cat(job.outputs), []
            writing.append(pool.submit(_finish, job.writer, shard, logits, probes, plan))
        while len(writing) > len(jobs):
            writing.pop(0).result()
    for future in writing:
        future.result()


def _finish(
    writer: StoreWriter, shard: Shard, logits: Tensor, probes: list[Probe], plan: ViewPlan
) -> None:
    values = logits.float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        row = shard.start + int(bad[0])
        raise DataError(
            f"the teacher gave a logit that is not finite for sample {plan.samples.keys[row]!r} (row "
            f"{row}), view {shard.view}, and for {len(bad) - 1} more rows of that shard. Nothing of the "
            "shard was stored. Try --precision float32, and check the teacher's weights."
        )
    writer.write(shard, {"logits": values}, probes=probes)


def _require_classes(teacher: Teacher, logits: Tensor, plan: ViewPlan) -> None:
    if logits.ndim != 2 or logits.shape[1] != plan.dataset.classes:
        raise MismatchError(
            f"the teacher {teacher.architecture} gives outputs of shape {tuple(logits.shape)}; "
            f"{plan.dataset.name} has {plan.dataset.classes} classes, so (batch, "
            f"{plan.dataset.classes}) was expected. Use a teacher trained for {plan.dataset.name}, or "
            "--class-map where its classes are ordered otherwise."
        )

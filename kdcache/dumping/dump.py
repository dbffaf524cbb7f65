"""Stage 1: run teachers once over the views of a dataset and write their outputs to stores.

Images are decoded and augmented once for all teachers, in a thread of its own; this one runs the
teachers; a third encodes, hashes and writes. What a store already holds is skipped before an image
is decoded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.data.dataset import Rows
from kdcache.distributed import Ranks
from kdcache.dumping.calibration import fit_writer
from kdcache.dumping.first_rows import FirstRows
from kdcache.dumping.opening import Target, Targets, store_settings, target_encodings
from kdcache.stages import stage
from kdcache.teachers.teacher import Teacher
from kdcache.views import replay
from kdcache.views.batches import ImageBatch, together
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, Shard, StoreWriter, UsageError
from kdcache_stores.read.prefetch import prefetched

AHEAD = 4
"""Batches that wait augmented for the teachers."""

Group = tuple[Shard, ...]
"""Shards of several views of the same rows, whose images are decoded once; in order of their views."""


class DumpObserver(Protocol):
    """What a caller may watch of a dump."""

    def start(self, done: int, total: int) -> None:
        """``done`` of ``total`` rows are there already."""

    def batch(self, rows: int, top1: float | None) -> None:
        """``rows`` more rows were forwarded; running top-1 of the first teacher, if it is known."""

    def written(self, nbytes: int) -> None:
        """A shard of ``nbytes`` was committed."""


@dataclass(frozen=True)
class Dumped:
    """What one call of `dump` did.

    Attributes:
        rows: rows forwarded, by all ranks together; each by every teacher that lacked it.
        skipped: rows that every store held already.
        seconds: wall-clock time.
        sealed: whether the stores are finished.
    """

    rows: int
    skipped: int
    seconds: float
    sealed: bool


@dataclass
class _Job:
    """One teacher, the store that it fills, and how often it was right."""

    teacher: Teacher
    writer: StoreWriter
    pending: set[Shard] = field(default_factory=set)
    right: int = 0
    labelled: int = 0

    @property
    def top1(self) -> float | None:
        return self.right / self.labelled if self.labelled else None


class _Probed(NamedTuple):
    """Views whose pixels are to be proven: rows (P,), images uint8 (P, C, H, W) on the device."""

    rows: np.ndarray
    images: Tensor


def dump(
    plan: ViewPlan,
    targets: Targets,
    views: int,
    *,
    encoding: str | Mapping[str, str] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    views_per_decode: int = 1,
    part: tuple[int, int] = (0, 1),
    ranks: Ranks | None = None,
    hash_keys: bool = False,
    shard_rows: int | None = None,
    repair: bool = False,
    command: str = "",
    known: FirstRows | None = None,
    watch: DumpObserver | None = None,
) -> Dumped:
    """Write the fields of every teacher for ``views`` views of every sample, a store per teacher.

    Batches never cross a shard and are of one view, so a row is forwarded in the same batch however
    often the dump was interrupted, however many ranks and parts share it, and however many views are
    made of an image at a time.

    Args:
        plan: dataset, augmentation and seed of the views.
        targets: each teacher, which gives the fields to be stored, with the path of its store.
        views: number of views to store; a finished store with fewer grows.
        encoding: of the logits, a name of `kdcache_stores.ENCODINGS`, or by field; see
            `choose_encodings`.
        batch_size: images per forward pass.
        device: where the teachers are.
        workers: processes that decode image files.
        views_per_decode: views that are made of an image each time it is decoded; the bytes are the
            same. So many times `batch_size` images wait augmented in each place of the queue.
        part: (i, n) takes the i-th (from 0) of n disjoint parts of the shards. The stores are
            sealed if n is 1; otherwise `kdcache_stores.write.reopen` seals them when all are done.
        ranks: the processes that share this part; rank 0 seals.
        hash_keys: publish the SHA-256 of each key instead of the key.
        shard_rows: rows per shard at most, see `StoreWriter`.
        repair: check finished stores first and write damaged shards anew.
        command: the command line to record in the stores' provenance.
        known: what the teachers gave before, of which encodings are fitted where it is of their
            calibration rows.

    Raises:
        MismatchError: a store at one of the paths was made with another plan, teacher, fields,
            encoding, batch size or precision; or a teacher of another class count; or a field whose
            rows change their shape from batch to batch.
        DataError: a value that is not finite; field, sample and view are named.
    """
    begun, where, ranks = time.perf_counter(), torch.device(device), ranks or Ranks()
    wanted = [Target(*target) for target in targets]
    _require_distinct(wanted)
    encodings = target_encodings(wanted, views, views * len(plan.dataset), encoding)
    with ExitStack() as opened:
        jobs: list[_Job] = []

        def open_all(repair: bool) -> None:
            for target in wanted:
                settings = store_settings(plan, target, views, encodings=encodings, device=where,
                                          batch_size=batch_size, hash_keys=hash_keys,
                                          shard_rows=shard_rows, command=command)  # fmt: skip
                writer = StoreWriter(target.path, repair=repair, **settings)
                jobs.append(_Job(target.teacher, opened.enter_context(writer)))

        with stage("looking at what is stored"):
            ranks.on_first(partial(open_all, repair))
        if ranks.rank > 0:
            open_all(False)

        def fit() -> None:
            for number, job in enumerate(jobs):
                given = None if known is None else (known, number)
                fit_writer(plan, job.teacher, job.writer, batch_size, where, workers, given)

        ranks.on_first(fit)
        # Rank 0's list holds for all: theirs may already lack what a quicker rank has committed.
        pending = ranks.on_first(lambda: [job.writer.pending(part) for job in jobs])
        todo = sorted(set().union(*pending))
        # An encoding with a base needs view 0 of a sample, whoever wrote it, before any other view.
        ordered = any(job.writer.needs_view_0 for job in jobs)
        groups = _groups(todo, views_per_decode)
        bases = sum(ordered and group[0].view == 0 for group in groups)  # the first, if any
        rounds = [groups[:bases], groups[bases:]] if bases else [groups]
        rounds = [groups[ranks.rank :: ranks.world] for groups in rounds]
        mine = [shard for groups in rounds for group in groups for shard in group]
        for job, missing in zip(jobs, pending, strict=True):
            job.pending = set(missing) & set(mine)
        shards = sorted(set(jobs[0].writer.shards[part[0] :: part[1]]) | set(todo))
        skipped = sum(shard.rows for shard in shards) - sum(shard.rows for shard in todo)
        if watch:
            done = skipped if ranks.world == 1 else 0
            watch.start(done, done + sum(shard.rows for shard in mine))
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as pool:
            for groups in rounds:
                _forward(plan, jobs, groups, batch_size, where, workers, pool, watch)
                ranks.wait()
        whole = part[1] == 1

        def seal_all() -> None:
            for job in jobs:
                job.writer.seal()

        if whole:
            ranks.on_first(seal_all)
    return Dumped(sum(s.rows for s in todo), skipped, time.perf_counter() - begun, whole)


def _require_distinct(targets: Sequence[Target]) -> None:
    if not targets:
        raise UsageError("a dump needs at least one teacher and the path of its store")
    paths = [os.path.abspath(target.path) for target in targets]
    if len(set(paths)) < len(paths):
        raise UsageError(f"every teacher needs a store of its own, found the paths {paths}")


def _groups(shards: Sequence[Shard], views_per_decode: int) -> list[Group]:
    """The shards, each with those of some later views of its rows; in order of view and rows."""
    by_rows: dict[int, list[Shard]] = {}
    for shard in sorted(shards):
        by_rows.setdefault(shard.index, []).append(shard)
    return sorted(
        tuple(same[i : i + views_per_decode])
        for same in by_rows.values()
        for i in range(0, len(same), views_per_decode)
    )


def _cuts(group: Group, batch_size: int) -> Iterator[Rows]:
    shard = group[0]
    for start in range(shard.start, shard.stop, batch_size):
        yield np.arange(start, min(start + batch_size, shard.stop))


def _forward(
    plan: ViewPlan,
    jobs: Sequence[_Job],
    groups: Sequence[Group],
    batch_size: int,
    device: torch.device,
    workers: int,
    pool: ThreadPoolExecutor,
    watch: DumpObserver | None,
) -> None:
    """Run the teachers over every shard; the pool finishes shards while the next is under way."""
    asked = (
        together(rows, [shard.view for shard in group])
        for group in groups
        for rows in _cuts(group, batch_size)
    )
    views = plan.stream(asked, device=device, workers=workers)
    writing: list[Future[None]] = []
    ahead = max(1, AHEAD // max(map(len, groups), default=1))
    with closing(prefetched(lambda batch: batch, views, ahead)) as stream:
        for group in groups:
            parts = [_Part(shard, jobs, replay.probe_rows(plan, shard.view)) for shard in group]
            for _ in _cuts(group, batch_size):
                for part, batch in zip(parts, next(stream).by_view(len(group)), strict=True):
                    part.forward(batch)
                    if watch:
                        watch.batch(len(batch), jobs[0].top1)
                while writing and writing[0].done():
                    writing.pop(0).result()
            for part in parts:
                writing += [
                    pool.submit(_finish, job, part.shard, outputs, part.probed, plan, watch)
                    for job, outputs in part.outputs
                ]
            while len(writing) > len(jobs) * len(group):
                writing.pop(0).result()
    for future in writing:
        future.result()


class _Part:
    """A shard on its way through the teachers that lack it."""

    def __init__(self, shard: Shard, jobs: Sequence[_Job], probe_rows: Rows) -> None:
        self.shard, self.probe_rows = shard, probe_rows
        self.probed: list[_Probed] = []
        self.outputs: list[tuple[_Job, list[dict[str, Tensor]]]] = [
            (job, []) for job in jobs if shard in job.pending
        ]

    def forward(self, batch: ImageBatch) -> None:
        chosen = np.flatnonzero(np.isin(batch.rows, self.probe_rows))
        if len(chosen):
            # Copied on the device; the writing thread brings them to the host.
            index = torch.from_numpy(chosen).to(batch.images.device)
            images = batch.images.index_select(0, index)
            self.probed.append(_Probed(batch.rows[chosen], images))
        for job, outputs in self.outputs:
            outputs.append(job.teacher(batch.images))


def _finish(
    job: _Job,
    shard: Shard,
    outputs: list[dict[str, Tensor]],
    probed: list[_Probed],
    plan: ViewPlan,
    watch: DumpObserver | None,
) -> None:
    """Bring a shard's fields to the host, check them and commit them."""
    values = {
        name: torch.cat([part[name] for part in outputs]).cpu().numpy()
        for name in job.teacher.fields
    }
    outputs.clear()
    for name, rows in values.items():
        bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(1))
        if len(bad):
            row = shard.start + int(bad[0])
            raise DataError(
                f"the teacher {job.teacher.architecture} gave {name} that are not finite for sample "
                f"{plan.samples.keys[row]!r} (row {row}), view {shard.view}, and for {len(bad) - 1} "
                "more rows of that shard. Nothing of the shard was stored. Try --precision float32, "
                "and check the teacher's weights."
            )
    probes = [p for rows, images in probed for p in replay.measure(rows, shard.view, images)]
    nbytes = job.writer.write(shard, values, probes=probes)
    if "logits" in values:
        labels = plan.samples.labels[shard.start : shard.stop]
        job.right += int((values["logits"].argmax(1) == labels).sum())
        job.labelled += int((labels >= 0).sum())
    if watch:
        watch.written(nbytes)

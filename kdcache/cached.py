"""Stage 2's loader: batches of views together with what the teachers said about them.

`CachedViews` is what `kdcache train-student` trains from, and what anyone's own loop can use::

    with CachedViews(load_dataset("digits"), ["teacher.zarr"], batch_size=64) as views:
        for epoch in range(30):
            for images, labels, logits, rows in views.epoch(epoch):
                loss = kd(student(normalise(images)), logits[0], temperature=4.0)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache import replay
from kdcache.datasets import Dataset
from kdcache.philox import key_words
from kdcache.resident import ResidentLogits, Rows
from kdcache.views import ViewPlan
from kdcache_stores import LogitStore, MismatchError, Samples, UnknownName, UsageError, open_store

SCHEDULES = ("epoch", "random")


@dataclass(frozen=True)
class Batch:
    """One training batch; unpacks as ``images, labels, logits, rows``.

    With pairs, images and logits have one more axis: (B, 2, C, H, W) and (B, 2, K), weak then strong.

    Attributes:
        images: uint8 (B, C, H, W), the augmented views, not normalised.
        labels: int64 (B,), -1 where unlabelled.
        logits: one float32 (B, K) tensor per store.
        rows: int64 (B,), rows of the dataset.
        keys: int64 (B,) on the device, 64 bits of the SHA-256 of each sample's key.
        views: int64 (B,), the view of each sample (the first of its pair).
        mix: None, or (partner labels int64 (B,), own share lambda float32 (B,)) for mixup and cutmix.
    """

    images: Tensor
    labels: Tensor
    logits: tuple[Tensor, ...]
    rows: Rows
    keys: Tensor
    views: Rows
    mix: tuple[Tensor, Tensor] | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.labels, self.logits, self.rows))


class CachedViews:
    """Batches of a dataset's views with the cached logits of one or more teachers.

    Schedule "epoch": epoch ``e`` takes view ``e mod V`` of every sample. Schedule "random": every sample
    takes one of the views in memory, drawn by (seed, e). The order depends on (seed, e) alone.

    Args:
        dataset: the samples to train on.
        stores: stores of one view plan (paths, or open stores); may be empty when ``plan`` is given.
        batch_size: samples per batch; the last batch of an epoch may be smaller.
        plan: the views when there is no store.
        views: how many views to cycle through: at most the store's, by default all of them; without a
            store unlimited, so every epoch sees new views.
        rows: the dataset's rows to use (default: all).
        schedule: "epoch" or "random".
        resident_views: with "random", how many views are kept in memory (default: all).
        seed: of the order of the samples and of the random schedule.
        device: where the batches are wanted.
        workers: processes that decode image files; resident datasets need none.
        subset: allow samples of the dataset that the store does not have; they are left out.
        read_logits: False takes only the views of the stores, for training without their teachers.
        pairs: views 2i and 2i + 1 of a sample come together, as the augmentation weak+strong stores
            them; epoch ``e`` takes pair ``e mod V/2``.

    Raises:
        MismatchError: stores of different plans, a store of another dataset, changed labels, or views
            that do not replay.
        UsageError: neither a store nor a plan, or more views than stored.
    """

    def __init__(
        self,
        dataset: Dataset,
        stores: Sequence[str | os.PathLike[str] | LogitStore],
        batch_size: int,
        *,
        plan: ViewPlan | None = None,
        views: int | None = None,
        rows: Rows | None = None,
        schedule: str = "epoch",
        resident_views: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
        subset: bool = False,
        read_logits: bool = True,
        pairs: bool = False,
    ) -> None:
        if schedule not in SCHEDULES:
            raise UnknownName("schedule of views", schedule, SCHEDULES)
        self.dataset, self.batch_size, self.seed, self.workers = dataset, batch_size, seed, workers
        self.schedule, self.device = schedule, torch.device(device)
        self.group = 2 if pairs else 1
        rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
        self.stores = [s if isinstance(s, LogitStore) else open_store(s) for s in stores]
        self.replay: replay.Replayed | None = None
        self.logits: ResidentLogits | None = None
        self.views, self.first = views, 0
        if self.stores:
            self.plan = self._plan_of_stores()
            self.rows = self._join(rows, subset)
            self.replay = replay.check(self.plan, self.stores[0], self.device)
            if read_logits:
                self.logits = self._resident(resident_views)
        elif plan is not None:
            self.plan, self.rows = plan, rows
            if schedule == "random" and views is None:
                raise UsageError("the random schedule without a store needs a number of views.")
        else:
            raise UsageError("CachedViews needs stores, or a plan when there are none.")
        words = key_words(self.plan.samples.key_hashes)
        self._keys = torch.from_numpy(words[:, 0] | words[:, 1] << 32).to(self.device)

    def _plan_of_stores(self) -> ViewPlan:
        first = self.stores[0]
        for store in self.stores[1:]:
            if store.plan.digest != first.plan.digest:
                raise MismatchError(
                    f"{store.where} is of view plan {store.plan.digest[:12]}, {first.where} of "
                    f"{first.plan.digest[:12]}: an ensemble needs stores of one plan. Dump the second "
                    f"teacher with --plan-from {first.where}."
                )
        self.first = max(store.first_view for store in self.stores)
        stored = min(store.view_range.stop for store in self.stores) - self.first
        if stored < 1:
            held = ", ".join(
                f"{s.where} {s.view_range.start}:{s.view_range.stop}" for s in self.stores
            )
            raise MismatchError(f"the stores have no view in common: {held}")
        if self.views is not None and not 1 <= self.views <= stored:
            raise UsageError(f"--views {self.views}: the store holds {stored} views.")
        self.views = stored if self.views is None else self.views
        if self.views % self.group or self.first % self.group:
            raise UsageError(
                f"pairs need an even number of views that begins with an even one, not "
                f"{self.views} from view {self.first} on."
            )
        samples = Samples(first.keys, first.labels, first.keys_hashed)
        return ViewPlan.from_store(first.plan, self.dataset, samples, partial=True)

    def _join(self, rows: Rows, subset: bool) -> Rows:
        """The plan's rows of some rows of the dataset."""
        there = np.flatnonzero(self.plan.dataset_rows >= 0)
        plan_rows = np.full(len(self.dataset), -1, np.int64)
        plan_rows[self.plan.dataset_rows[there]] = there
        found = plan_rows[rows]
        missing = rows[found < 0]
        if len(missing) == len(rows) or (len(missing) and not subset):
            keys = [self.dataset.keys[row] for row in missing[:3]]
            raise MismatchError(
                f"{len(missing)} of {len(rows)} samples of {self.dataset.name} are not in "
                f"{self.stores[0].where}, the first: {keys}. Give the store of this dataset, or "
                "--subset to train on the samples that it has."
            )
        return found[found >= 0]

    def _resident(self, resident_views: int | None) -> ResidentLogits:
        assert self.views is not None
        groups = self.views // self.group
        wanted = groups if resident_views is None else max(1, resident_views // self.group)
        window = 1 if self.schedule == "epoch" else min(wanted, groups)
        return ResidentLogits(
            self.stores,
            self.rows,
            self.views,
            window,
            self.device,
            group=self.group,
            first=self.first,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (counted from 0), the same at every call."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = rng.permutation(len(self.rows))
        views = self._views_of(epoch, rng)
        if self.logits is not None:
            self.logits.prepare(epoch)
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        stream = self.plan.stream(
            [self._request(part, views[part]) for part in parts],
            device=self.device,
            workers=self.workers,
        )
        for part, batch in zip(parts, stream, strict=True):
            images = batch.images
            logits: tuple[Tensor, ...] = ()
            if self.logits is not None:
                place = torch.from_numpy(self._paired(part)).to(self.device)
                logits = self.logits.take(batch.views, place)
            if self.group == 2:
                images = images.view(-1, 2, *images.shape[1:])
                logits = tuple(one.view(-1, 2, one.shape[1]) for one in logits)
            first = slice(None, None, self.group)
            rows = batch.rows[first]
            yield Batch(
                images=images,
                labels=batch.labels[first],
                logits=logits,
                rows=self.plan.dataset_rows[rows],
                keys=self._keys[torch.from_numpy(rows).to(self.device)],
                views=batch.views[first],
                mix=batch.mix,
            )

    def _request(self, part: Rows, views: Rows) -> tuple[Rows, Rows]:
        rows, views = self._paired(self.rows[part]), self._paired(views)
        return rows, views + np.arange(len(views)) % self.group

    def _paired(self, values: Rows) -> Rows:
        return values if self.group == 1 else np.repeat(values, 2)

    def _views_of(self, epoch: int, rng: np.random.Generator) -> Rows:
        """The view of every row in this epoch, the first of its pair; (N,)."""
        groups = None if self.views is None else self.views // self.group
        if self.schedule == "random":
            window = np.arange(groups or 0)
            if self.logits is not None:
                window = self.logits.window_of(epoch)
            return rng.choice(window, len(self.rows)) * self.group + self.first
        chosen = epoch if groups is None else epoch % groups
        return np.full(len(self.rows), chosen * self.group + self.first, np.int64)

    def close(self) -> None:
        """Stop the reading thread and close the stores."""
        if self.logits is not None:
            self.logits.close()
        for store in self.stores:
            store.close()

    def __enter__(self) -> CachedViews:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

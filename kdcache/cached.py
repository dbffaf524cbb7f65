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
from kdcache.resident import ResidentLogits, Rows
from kdcache.views import ViewPlan
from kdcache_stores import LogitStore, MismatchError, UnknownName, UsageError, open_store

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
        views: int64 (B,), the view of each sample (the first of its pair).
        mix: None, or (partner labels int64 (B,), own share lambda float32 (B,)) for mixup and cutmix.
    """

    images: Tensor
    labels: Tensor
    logits: tuple[Tensor, ...]
    rows: Rows
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
        self.rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
        self.stores = [s if isinstance(s, LogitStore) else open_store(s) for s in stores]
        self.replay: replay.Result | None = None
        self.logits: ResidentLogits | None = None
        if self.stores:
            store_rows = self._use_stores(views, subset)
            if read_logits:
                self.logits = self._resident(store_rows, resident_views)
        elif plan is not None:
            self.plan, self.views = plan, views
            if schedule == "random" and views is None:
                raise UsageError("the random schedule without a store needs a number of views.")
        else:
            raise UsageError("CachedViews needs stores, or a plan when there are none.")
        if not len(self.rows):
            raise UsageError("there is no sample left to train on.")

    def _resident(self, store_rows: Rows, resident_views: int | None) -> ResidentLogits:
        assert self.views is not None
        groups = self.views // self.group
        wanted = groups if resident_views is None else max(1, resident_views // self.group)
        window = 1 if self.schedule == "epoch" else min(wanted, groups)
        return ResidentLogits(
            self.stores, store_rows, self.views, window, self.device, group=self.group
        )

    def _use_stores(self, views: int | None, subset: bool) -> Rows:
        """Check the stores against each other and the dataset; the stores' rows of ``self.rows``."""
        first = self.stores[0]
        for store in self.stores[1:]:
            if store.plan.digest != first.plan.digest:
                raise MismatchError(
                    f"{store.where} is of view plan {store.plan.digest[:12]}, {first.where} of "
                    f"{first.plan.digest[:12]}: an ensemble needs stores of one plan. Dump the second "
                    f"teacher with --plan-from {first.where}."
                )
        stored = min(store.n_views for store in self.stores)
        if views is not None and not 1 <= views <= stored:
            raise UsageError(f"--views {views}: the store holds {stored} views.")
        self.plan = ViewPlan.from_store(first.plan, self.dataset)
        self.views: int | None = stored if views is None else views
        if self.views % self.group:
            raise UsageError(f"pairs of views need an even number of them, not {self.views}.")
        keys = [self.dataset.keys[row] for row in self.rows]
        joined = first.join(keys, self.dataset.labels[self.rows], subset=subset)
        self.rows = self.rows[joined.found]
        self.replay = replay.check(self.plan, first, device=self.device)
        return joined.rows

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
            images, logits = batch.images, ()
            if self.logits is not None:
                place = torch.from_numpy(self._paired(part)).to(self.device)
                logits = self.logits.take(batch.views, place)
            if self.group == 2:
                images = images.unflatten(0, (len(part), 2))
                logits = tuple(one.unflatten(0, (len(part), 2)) for one in logits)
            first = slice(None, None, self.group)
            yield Batch(
                images, batch.labels[first], logits, batch.rows[first], batch.views[first], batch.mix
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
            return rng.choice(window, len(self.rows)) * self.group
        chosen = epoch if groups is None else epoch % groups
        return np.full(len(self.rows), chosen * self.group, np.int64)

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

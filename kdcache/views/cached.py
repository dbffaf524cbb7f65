"""Stage 2's loader: batches of views together with the teachers' outputs for them.

`CachedViews` is what `kdcache train-student` trains from, and what anyone's own loop can use::

    with CachedViews(load_dataset("digits"), ["teacher.zarr"], batch_size=64) as views:
        for epoch in range(30):
            for images, labels, teachers, rows in views.epoch(epoch):
                loss = kd(student(normalise(images)), teachers[0]["logits"], temperature=4.0)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.augment.augmentation import Augmentation
from kdcache.augment.mix import Mix
from kdcache.data.dataset import Dataset, Rows
from kdcache.philox import key_words
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache.views.window import ResidentFields, Targets, batches_at_once, views_that_fit
from kdcache_stores import (
    MismatchError,
    Samples,
    Store,
    UnknownName,
    UsageError,
    join_fields,
    open_store,
)
from kdcache_stores.errors import about

SCHEDULES = ("epoch", "random")

#: A store, or several: paths, or open ones.
Stores = str | os.PathLike[str] | Store | Sequence[str | os.PathLike[str] | Store]


@dataclass(frozen=True)
class Batch:
    """One training batch; unpacks as ``images, labels, teachers, rows``.

    With pairs, images and fields have one more axis: (B, 2, C, H, W) and (B, 2, *shape), weak then
    strong.

    Attributes:
        images: uint8 (B, C, H, W), the augmented views, not normalised.
        labels: int64 (B,), -1 where unlabelled.
        teachers: per teacher, its fields by name, float32 (B, *shape): (B, K) for `logits`.
        rows: int64 (B,) array, rows of the dataset.
        keys: int64 (B,) on the device, 64 bits of the SHA-256 of each sample's key.
        views: int64 (B,) on the device, the view of each sample (the first of its pair).
        mix: None, or (partner labels int64 (B,), own share lambda float32 (B,)) for mixup and cutmix.
        total: samples in the batch over all parts, see `CachedViews`; B where there is one part.
    """

    images: Tensor
    labels: Tensor
    teachers: tuple[Mapping[str, Tensor], ...]
    rows: Rows
    keys: Tensor
    views: Tensor
    mix: tuple[Tensor, Tensor] | None
    total: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.labels, self.teachers, self.rows))


class CachedViews:
    """Batches of a dataset's views with the cached fields of one or more teachers.

    Schedule "epoch": epoch ``e`` takes view ``e mod V`` of every sample. Schedule "random": every sample
    takes one of the views in memory, drawn by (seed, e). The order depends on (seed, e) alone.

    With ``views_per_decode`` M, an epoch here is a pass that shows M views of every sample and counts as M
    epochs of a training: pass ``p`` takes the views pM, ..., pM + M - 1 (mod V), those of a sample side by
    side in one batch, from an image that is decoded once (Shen & Xing, A Fast Knowledge Distillation
    Framework for Visual Recognition, ECCV 2022).

    Args:
        dataset: the samples to train on.
        stores: a store, or several of one view plan (paths, or open stores); may be empty when
            ``plan`` is given.
            Those of one teacher join their fields, those of different teachers are an ensemble.
        batch_size: samples per batch, with ``views_per_decode`` views of them; the last batch of an epoch
            may be smaller.
        fields: those to read, of every teacher; no other is touched. None of them takes only the
            views of the stores, for training without their teachers.
        plan: the views when there is no store. With ``rows``, images are mixed (mixup, cutmix) with
            others of these rows alone.
        augmentation: that of the stores, needed where it is a user's own.
        views: how many views to cycle through: at most the store's, by default all of them; without a
            store unlimited, so every epoch sees new views.
        rows: the dataset's rows to use (default: all).
        schedule: "epoch" or "random".
        resident_views: with "random", how many views are kept in memory and drawn from; the window moves
            on by one view each epoch (default: all that fit into half of the free memory).
        seed: of the order of the samples and of the random schedule.
        device: where the batches are wanted.
        workers: processes that decode image files; resident datasets need none.
        subset: allow samples of the dataset that the store does not have; they are left out.
        pairs: views 2i and 2i + 1 of a sample come together, as the augmentation weak+strong stores
            them; epoch ``e`` takes pair ``e mod V/2``.
        views_per_decode: views of a sample that come together in a batch, whose image is decoded once.
        part: (i, n) gives the i-th of n nearly equal parts of every batch, for n ranks.

    Attributes:
        teachers: per teacher, which of the stores holds each field that is read.
        window: with "random", how many views an epoch draws from (pairs of them count as one).
        left_out: samples asked for that the stores do not have.

    Raises:
        MismatchError: stores of different plans, a store of another dataset, changed labels, views
            that do not replay, or views that are mixed with samples outside of ``rows``.
        UsageError: neither a store nor a plan, more views than stored, or ``views_per_decode`` beside the
            random schedule or pairs, or that does not divide the batch, or of more views than there are.
        KDCacheError: see `kdcache_stores.join_fields`, for a field that is missing or held twice.
    """

    def __init__(
        self,
        dataset: Dataset,
        stores: Stores,
        batch_size: int,
        fields: Sequence[str] = ("logits",),
        *,
        plan: ViewPlan | None = None,
        augmentation: Augmentation | None = None,
        views: int | None = None,
        rows: Rows | None = None,
        schedule: str = "epoch",
        resident_views: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
        subset: bool = False,
        pairs: bool = False,
        views_per_decode: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if schedule not in SCHEDULES:
            raise UnknownName("schedule of views", schedule, SCHEDULES)
        _require_together(views_per_decode, batch_size, schedule, pairs)
        self.views_per_decode = views_per_decode
        self.dataset, self.batch_size, self.seed, self.workers = dataset, batch_size, seed, workers
        self.schedule, self.device = schedule, torch.device(device)
        self.group, self.part = 2 if pairs else 1, part
        rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
        self.left_out = 0
        self._at = 0, 0
        stores = [stores] if isinstance(stores, str | os.PathLike | Store) else stores
        self.stores = [s if isinstance(s, Store) else open_store(s) for s in stores]
        self._opened = [s for s, given in zip(self.stores, stores, strict=True) if s is not given]
        self.replay: replay.Replayed | None = None
        self.teachers: list[dict[str, Store]] = []
        self.resident: ResidentFields | None = None
        self.views, self.first = views, 0
        if self.stores:
            self.plan = self._plan_of_stores(augmentation)
            self.teachers = join_fields(self.stores, fields) if fields else []
            self.rows = self._join(rows, subset)
            self._require_partners()
            self.replay = replay.check(self.plan, self.stores[0], self.device)
        elif plan is not None:
            self.plan, self.rows = plan, rows
            chosen = np.unique(rows)
            if isinstance(plan.augmentation, Mix) and len(chosen) < len(plan):
                self.plan, self.rows = plan.over(chosen), np.searchsorted(chosen, rows)
            if schedule == "random" and views is None:
                raise UsageError("the random schedule without a store needs a number of views.")
        else:
            raise UsageError("CachedViews needs stores, or a plan when there are none.")
        if pairs and isinstance(self.plan.augmentation, Mix):
            raise UsageError("mixed images come one by one, not as a weak and a strong view.")
        if views_per_decode > (self.views or views_per_decode):
            raise UsageError(
                f"--views-per-decode {views_per_decode}: {self.views} views are trained on, and a pass over "
                "the samples shows none of them twice. Dump more --views, or decode for fewer."
            )
        self.window = self._window(resident_views)
        self._at_once = 1
        if self.teachers:
            assert self.views is not None
            self._at_once = batches_at_once(self.teachers, batch_size * self.group)
            self.resident = ResidentFields(
                self.teachers,
                self.rows,
                self.views,
                max(self.window, views_per_decode),
                self.device,
                self.group,
                self.first,
                views_per_decode,
            )
        words = key_words(self.plan.samples.key_hashes)[self.rows]
        self._keys = torch.from_numpy(words[:, 0] | words[:, 1] << 32).to(self.device)

    @property
    def keys(self) -> Tensor:
        """int64 (N,) on the device, 64 bits of the SHA-256 of the key of each sample that is used."""
        return self._keys

    @property
    def labels(self) -> Rows:
        """int64 (N,), the labels of the samples that are used; -1 where unlabelled."""
        return self.plan.samples.labels[self.rows]

    def holding(self, field: str) -> list[Store]:
        """Of each teacher that is read, the store that holds a field; none where it is not read."""
        return [stores[field] for stores in self.teachers if field in stores]

    @property
    def digests(self) -> list[str]:
        """Of each store, the digest of the views that are trained on; its growth does not change it."""
        used = range(self.first, self.first + (self.views or 0))
        return [store.digest_of(used) for store in self.stores]

    def _plan_of_stores(self, augmentation: Augmentation | None) -> ViewPlan:
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
        with about(first.where):
            return ViewPlan.from_store(
                first.plan, self.dataset, samples, augmentation, partial=True
            )

    def _join(self, rows: Rows, subset: bool) -> Rows:
        """The plan's rows of some rows of the dataset."""
        present = np.flatnonzero(self.plan.dataset_rows >= 0)
        plan_rows = np.full(len(self.dataset), -1, np.int64)
        plan_rows[self.plan.dataset_rows[present]] = present
        wanted = plan_rows[rows]
        missing = rows[wanted < 0]
        self.left_out = len(missing)
        if len(missing) == len(rows) or (len(missing) and not subset):
            keys = [self.dataset.keys[row] for row in missing]
            bad = self.stores[0].plan.notes.get("skipped")
            bad = bad if isinstance(bad, dict) else {}  # notes are for people: whatever they hold
            known = all(key in bad for key in keys)
            why = (
                "The dump left out what it could not decode: --skip-bad does so here. "
                if known
                else ""
            )
            raise MismatchError(
                f"{len(missing)} of {len(rows)} samples of {self.dataset.name} are not in "
                f"{self.stores[0].where}, the first: {keys[:3]}. {why}Give the store of this dataset, or "
                "--subset to train on the samples that it has."
            )
        return wanted[wanted >= 0]

    def _require_partners(self) -> None:
        """Refuse stored mixes that bring in images and labels of samples that are not used."""
        assert self.views is not None
        used = np.zeros(len(self.plan), bool)
        used[self.rows] = True
        if used.all():
            return
        for view in range(self.first, self.first + self.views):
            partners = self.plan.partners(self.rows, view)
            if partners is None:
                return
            outside = partners[~used[partners]]
            if not len(outside):
                continue
            what = self.plan.augmentation.name
            where = self.stores[0].where
            absent = int((self.plan.dataset_rows[outside] < 0).sum())
            raise MismatchError(
                f"{len(outside)} of the {len(partners)} images that {what} mixes into view {view} "
                f"come from samples that are held out or left out here (the first: "
                f"{self.plan.samples.keys[outside[0]]!r}"
                f"{f'; {absent} are not in {self.dataset.name}' if absent else ''}): the partners in "
                f"{where} were drawn from all its {len(used)} samples, of which {used.sum()} are "
                "used. Train on all of them, without --train-samples and --val-split; or dump a "
                "store of the chosen samples alone (ViewPlan over Dataset.subset); or train without "
                "a store (--online TEACHER, with the same --augment): partners then come from the "
                "chosen samples."
            )

    def _window(self, wanted: int | None) -> int:
        """Views (or pairs) that one epoch draws from."""
        if self.schedule == "epoch" or self.views is None:
            return 1
        if wanted is None:
            wanted = self.views
            if self.teachers:
                fit = views_that_fit(self.teachers, len(self.rows), self.device)
                # Beside a window that does not hold all views, the next one is being read.
                wanted = self.views if fit >= self.views else fit - self.group
        return min(max(1, wanted // self.group), self.views // self.group)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) * self.views_per_decode // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch that comes next, from the one that comes next in it.

        A pass that ends goes on to the next epoch; one that is broken off is continued by the next
        pass, unless `set_epoch` says otherwise.
        """
        epoch, start = self._at
        for done, batch in enumerate(self.epoch(epoch, start), start + 1):
            self._at = (epoch, done) if done < len(self) else (epoch + 1, 0)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be of ``epoch``; where that has begun, it goes on."""
        if epoch != self._at[0]:
            self._at = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the passes are, plain JSON: for `load_state_dict` of views made alike."""
        epoch, batch = self._at
        return {"epoch": epoch, "batch": batch, "of": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next pass go on where these passes were, with the very batches that came next.

        Raises:
            MismatchError: the state is of other stores, rows, order or batches; says what differs.
        """
        here = self._identity()
        for name in {**here, **state["of"]}:
            if here.get(name) != (stated := state["of"].get(name)):
                raise MismatchError(
                    f"the state is of views with {name} {stated!r:.80}, here it is "
                    f"{here.get(name)!r:.80}: make CachedViews with the arguments of the run that "
                    "goes on, or begin anew without its state."
                )
        self._at = int(state["epoch"]), int(state["batch"])

    def _identity(self) -> dict[str, Any]:
        """Everything that the batches of an epoch depend on, plain JSON."""
        return {
            "plan": self.plan.to_store().digest,
            "stores": self.digests,
            "rows": hashlib.sha256(self.rows.tobytes()).hexdigest(),
            "batch_size": self.batch_size,
            "views": self.views,
            "group": self.group,
            "schedule": self.schedule,
            "window": self.window,
            "seed": self.seed,
            "part": list(self.part),
        } | ({"views_per_decode": self.views_per_decode} if self.views_per_decode > 1 else {})

    def epoch(self, epoch: int, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (counted from 0), the same at every call.

        Args:
            epoch: its number.
            start: how many of its first batches to leave out, fewer than there are.
            seed: of the order; None is that of these views.

        Each iterator keeps the rows that it reads: several may be live at once, in any order and
        in several threads. One alone takes the memory of the window and of the view that comes
        next; each further one takes as much again where its views do not fit beside.
        """
        key = [self.seed if seed is None else seed, epoch]
        rng = np.random.Generator(np.random.Philox(key=key))
        order = rng.permutation(len(self.rows))
        views_of = self._views_of(epoch, rng)
        # A sample with each of its views, side by side.
        shown = np.stack([np.repeat(order, self.views_per_decode), views_of[order].ravel()])
        first = start - start % self._at_once  # the batch that decoding begins with
        size, (index, parts) = self.batch_size, self.part
        cuts = [shown[:, i : i + size] for i in range(first * size, shown.shape[1], size)]
        totals = [cut.shape[1] for cut in cuts]
        cuts = [
            cut[:, index * total // parts : (index + 1) * total // parts]
            for cut, total in zip(cuts, totals, strict=True)
        ]
        teachers = islice(self._targets(epoch, cuts), start - first, None)
        cuts, totals = cuts[start - first :], totals[start - first :]
        # What the steps look up goes to the device once, not once per step.
        mine, views = np.concatenate(cuts, axis=1)
        on_device = torch.from_numpy(mine).to(self.device)
        keys, view_of = self._keys[on_device], torch.from_numpy(views).to(self.device)
        stream = self.plan.stream(
            [self._request(*cut) for cut in cuts], device=self.device, workers=self.workers
        )
        position = 0
        for cut, total, batch, fields in zip(cuts, totals, stream, teachers, strict=True):
            here = slice(position, position := position + cut.shape[1])
            images, labels = batch.images, batch.labels
            if self.group == 2:
                images, labels = images.view(-1, 2, *images.shape[1:]), labels[::2]
            yield Batch(
                images=images,
                labels=labels,
                teachers=fields,
                rows=self.plan.dataset_rows[self.rows[cut[0]]],
                keys=keys[here],
                views=view_of[here],
                mix=batch.mix,
                total=total,
            )

    def _targets(self, epoch: int, cuts: Sequence[Rows]) -> Iterator[Targets]:
        """The teachers' fields of each batch, from views that stay in memory as long as this lives.

        Args:
            cuts: per batch, int64 (2, B): which of the samples, and their views.
        """
        if self.resident is None:
            return repeat((), len(cuts))
        window, (positions, views) = self.resident.window(epoch), np.concatenate(cuts, axis=1)
        places = window.places(*self._grouped(views, positions))
        return window.batches(places, [cut.shape[1] for cut in cuts], self._at_once)

    def _grouped(self, views: Rows, positions: Rows) -> tuple[Rows, Rows]:
        """Views and positions of single views (B,), or of both views of pairs (B, 2)."""
        if self.group == 1:
            return views, positions
        return np.stack([views, views + 1], 1), np.stack([positions, positions], 1)

    def _request(self, part: Rows, views: Rows) -> tuple[Rows, Rows]:
        views, positions = self._grouped(views, part)
        return self.rows[positions].ravel(), views.ravel()

    def _views_of(self, epoch: int, rng: np.random.Generator) -> Rows:
        """The views of every row in this epoch, the first of a pair; int64 (N, views_per_decode)."""
        groups = None if self.views is None else self.views // self.group
        if self.schedule == "random" and groups is not None:
            window = (epoch + np.arange(self.window)) % groups
            return rng.choice(window, (len(self.rows), 1)) * self.group + self.first
        chosen = epoch * self.views_per_decode + np.arange(self.views_per_decode)
        chosen = chosen if groups is None else chosen % groups
        return np.broadcast_to(chosen * self.group + self.first, (len(self.rows), len(chosen)))

    def close(self) -> None:
        """Stop the reading thread and close the stores that were given by their paths."""
        if self.resident is not None:
            self.resident.close()
        for store in self._opened:
            store.close()

    def __enter__(self) -> CachedViews:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _require_together(views_per_decode: int, batch_size: int, schedule: str, pairs: bool) -> None:
    """Refuse several views of a decoded image where they could not come together in a batch."""
    if views_per_decode == 1:
        return
    asked = f"--views-per-decode {views_per_decode}"
    if views_per_decode < 1:
        raise UsageError(f"{asked}: expected at least 1.")
    if schedule == "random":
        raise UsageError(
            f"{asked}: the random schedule draws one view of each sample; use --schedule epoch."
        )
    if pairs:
        raise UsageError(
            f"{asked}: weak and strong views come in pairs, which share one decoded image already; leave "
            "it out."
        )
    if batch_size % views_per_decode:
        least = -(-batch_size // views_per_decode) * views_per_decode
        raise UsageError(
            f"{asked}: a batch holds all of a sample's views, and {batch_size} is no multiple of "
            f"{views_per_decode}; use --batch-size {least}."
        )

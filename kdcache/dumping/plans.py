"""The views that a dump is asked for: a plan of its own, or that of a store that is there."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch

from kdcache.augment.custom import Custom
from kdcache.augment.pairs import WeakStrong
from kdcache.augment.specs import default_augmentation, make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.views.plan import ViewPlan
from kdcache.views.sizes import view_size
from kdcache_stores import MismatchError, Samples, UsageError, open_store
from kdcache_stores.errors import about
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.write.begin import require_place


def choose_plan(
    source: DatasetSource,
    split: str | None = None,
    augment: str | None = None,
    seed: int | None = None,
    views: int | None = None,
    store: str | os.PathLike[str] | None = None,
    size: int | None = None,
) -> tuple[ViewPlan, int]:
    """A plan, and its number of views: as asked for, or those of a store.

    Args:
        split: of the dataset; None: "train". With a store, it must be the store's.
        augment: as `make_augmentation` takes it. None: `usual_views`. With a
            store, needed for a user's own alone; a built-in one must be the store's.
        seed: of the views; None: 0. With a store, it must be the store's.
        views: None: as many as the augmentation fixes, where it does, or as the store has.
        store: whose plan to use.
        size: side that the teachers were trained at, where that is known.

    Raises:
        UsageError: the augmentation leaves the number of views open, and none is given; or a user's own
            gives another image each time.
        MismatchError: dataset, split, augmentation or seed are not those of the store.
    """
    if store is not None:
        plan, stored = stored_plan(source, store, augment, seed, split)
        return plan, views or stored
    data = source.load(split or "train")
    plan = ViewPlan(data, make_augmentation(augment or usual_views(data, size), data), seed or 0)
    count = views or (1 if plan.augmentation.fixed else plan.views)
    _require_seeded(plan)
    if count is None:
        raise UsageError(
            f"say how many views of every sample {plan.augmentation.name} shall give: --views N"
        )
    return plan, count


def usual_views(data: Dataset, size: int | None = None) -> str:
    """The augmentation of a dump where none is asked for: the dataset's, or crops of the teachers' size."""
    usual = default_augmentation(data)
    if size is None or data.item is not None:
        return usual
    views = ViewPlan(data, make_augmentation(usual, data), seed=0)
    return usual if view_size(views) == (size, size) else f"resized-crop-flip:size={size}"


def _require_seeded(plan: ViewPlan) -> None:
    """Refuse a user's pipeline that gives another image each time, whatever it is seeded with."""
    if not isinstance(plan.augmentation, Custom):
        return
    rows = np.arange(min(len(plan), 4))
    if not torch.equal(plan.images(rows, 0), plan.images(rows, 0)):
        raise UsageError(
            f"{plan.augmentation.path} gives another image for the same sample and view each time. A "
            "view must be reproducible: draw from the generators of torch, NumPy or random, which "
            "are seeded before each call, and from none of your own"
        )


def stored_plan(
    source: DatasetSource,
    store: str | os.PathLike[str],
    augment: str | None = None,
    seed: int | None = None,
    split: str | None = None,
) -> tuple[ViewPlan, int]:
    """The plan of a store over a dataset that is here, and the store's number of views; see `choose_plan`."""
    with open_store(store) as opened:
        stored, views = opened.plan, opened.view_range.stop
        samples = Samples(opened.keys, opened.labels, opened.keys_hashed)
    if seed is not None and seed != stored.seed:
        raise MismatchError(f"the plan of {store} has the seed {stored.seed}, asked for {seed}")
    if split is not None and split != stored.split:
        raise MismatchError(
            f"the views of {store} are of the split {stored.split}, asked for {split}: leave out --split, "
            "or do without the store"
        )
    data = source.load(stored.split)
    augmentation = make_augmentation(augment, data) if augment else None
    with about(os.fspath(store)):
        return ViewPlan.from_store(stored, data, samples, augmentation), views


def require_views(plan: ViewPlan, views: int, stores: Iterable[str | os.PathLike[str]]) -> None:
    """What can be refused of a dump before its teachers are loaded.

    Raises:
        UsageError: several views of an augmentation that gives the same image in each, an odd number of
            weak and strong views, or a store that is a URL.
        StoreInUse: a folder that holds something else.
    """
    if plan.augmentation.fixed and views > 1:
        raise UsageError(
            f"{plan.augmentation.name} gives the same image in every view, and {views} views would be "
            "stored: --views 1"
        )
    if isinstance(plan.augmentation, WeakStrong) and views % 2:
        raise UsageError(
            f"{views} views of {plan.augmentation.name} leave a weak one without its strong one: "
            f"--views {views + 1} or another even number"
        )
    for store in stores:
        require_place(LocalFiles(store))

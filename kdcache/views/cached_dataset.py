"""Cached views as a map-style dataset: the part that someone else's trainer takes.

A `CachedDataset` has a length and items, so it works with any DataLoader, sampler and trainer::

    data = CachedDataset(load_dataset("digits"), "teacher.zarr")
    loader = DataLoader(data, 64, sampler=ViewSampler(data), num_workers=4, persistent_workers=True)
    for epoch in range(30):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = kd(student(normalise(batch["image"])), batch["logits"], temperature=4.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from kdcache.augment.augmentation import Augmentation
from kdcache.data.dataset import Dataset, Rows
from kdcache.views.cached import CachedViews, Stores
from kdcache.views.plan import ViewPlan
from kdcache_stores import UsageError, join_fields
from kdcache_stores.read.random_rows import DecodedFolder, RandomRows

#: The number of an item, alone or after the epoch whose view is wanted.
Index = int | tuple[int, int]


class CachedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The views of a dataset with the cached fields of one or more teachers, item by item.

    Item ``i`` in epoch ``e`` is view ``e mod V`` of sample ``rows[i]``, as a dict:

    - "image": uint8 (C, H, W), or what ``transform`` makes of it; where a dataset has no images, its
      "item" takes that place;
    - "label": int, -1 where unlabelled; "row": int, of the dataset; "view": int;
    - every field by its name, float32 (*shape); of several teachers "0.logits", "1.logits", ...;
    - of a store that mixes images "partner_label": int and "lambda": float, the own label's share.

    Which epoch it is comes with the number, where a `ViewSampler` gives numbers, or from
    `set_epoch`, which workers that run already learn of too. Memory is shared: images and epoch lie
    in shared tensors, teachers' rows in mapped files. It can be pickled, forked and spawned.

    Args:
        dataset: the samples.
        stores, fields, plan, augmentation, views, rows, subset: see `CachedViews`.
        transform: applied to the view's image: normalisation, or what else does not move or change
            what the teacher saw.
        decoded: where decoded rows of encodings other than float16 and float32 are kept; by default
            a folder that is made for them, and goes with this object.

    Raises: as `CachedViews`, and `UsageError` for a dataset that is none of kdcache's; an item raises
    `DataError` for an image that cannot be decoded and
    `CorruptStore` for rows that are not what was written.
    """

    def __init__(
        self,
        dataset: Dataset,
        stores: Stores = (),
        fields: Sequence[str] = ("logits",),
        *,
        transform: Callable[[Tensor], Any] | None = None,
        plan: ViewPlan | None = None,
        augmentation: Augmentation | None = None,
        views: int | None = None,
        rows: Rows | None = None,
        subset: bool = False,
        decoded: DecodedFolder | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise UsageError(
                f"CachedDataset takes a dataset of kdcache, found {type(dataset).__name__}: give "
                "load_dataset(NAME), or one made of your own images (kdcache.data)"
            )
        cached = CachedViews(
            dataset, stores, 1, (), plan=plan, augmentation=augmentation, views=views, rows=rows,
            subset=subset,
        )  # fmt: skip
        self.plan, self.transform = cached.plan, transform
        self._input = "image" if dataset.item is None else "item"
        self.views, self._first = cached.views, cached.first
        self._rows = torch.from_numpy(cached.rows)
        teachers = join_fields(cached.stores, fields) if fields and cached.stores else []
        if decoded is None and teachers:
            decoded = DecodedFolder()
        self._decoded = decoded
        self._fields = {
            name if len(teachers) == 1 else f"{number}.{name}": RandomRows(store, name, decoded)
            for number, held in enumerate(teachers)
            for name, store in held.items()
        }
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # after a pickle of its own; a worker's is shared already

    @property
    def rows(self) -> Rows:
        """Rows of the dataset that the items are, int64 (N,)."""
        rows: Rows = self._rows.numpy()
        return self.plan.dataset_rows[rows]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of decoded rows kept on the disk, at most, for all processes together.

        0 where all fields are float16 or float32 in a store on this machine: its own files are mapped.
        """
        return sum(rows.decoded_bytes for rows in self._fields.values())

    @property
    def epoch(self) -> int:
        """The epoch that plain numbers are of."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Have plain numbers be of ``epoch``, in running workers too."""
        self._epoch[0] = epoch

    def view_of(self, epoch: int) -> int:
        """The view that is shown in an epoch: their cycle, or the epoch's own without a store."""
        return self._first + (epoch if self.views is None else epoch % self.views)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> _Items:
        """The items of a batch; what a DataLoader asks for where a dataset has it."""
        pairs = [i if isinstance(i, tuple) else (self.epoch, i) for i in indices]
        numbers = np.array([number for _, number in pairs], np.int64)
        if numbers.min() < -len(self) or numbers.max() >= len(self):
            raise IndexError(
                f"items are numbered 0 to {len(self) - 1}, asked for {numbers.min()} to {numbers.max()}"
            )
        rows = self._rows.numpy()[numbers]
        views = np.array([self.view_of(epoch) for epoch, _ in pairs], np.int64)
        columns = self._images(rows, views)
        columns["row"] = torch.from_numpy(self.plan.dataset_rows[rows])
        columns["view"] = torch.from_numpy(views)
        for name, stored in self._fields.items():
            columns[name] = _rows_of(stored, views, rows)
        return _Items(columns)

    def _images(self, rows: Rows, views: Rows) -> dict[str, Any]:
        """Images and labels; in one go where the images are of one size in memory."""
        whole = self.plan.dataset.images is not None
        cuts = [slice(None)] if whole else [slice(i, i + 1) for i in range(len(rows))]
        batches = [self.plan.render(rows[cut], views[cut]) for cut in cuts]
        images: Any = batches[0].images if whole else [batch.images[0] for batch in batches]
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        columns = {self._input: images, "label": torch.cat([batch.labels for batch in batches])}
        if mixes := [batch.mix for batch in batches if batch.mix is not None]:
            columns["partner_label"] = torch.cat([labels for labels, _ in mixes])
            columns["lambda"] = torch.cat([share for _, share in mixes]).double()
        return columns


def _rows_of(stored: RandomRows, views: Rows, rows: Rows) -> Tensor:
    """Rows of a field, each of its view: float32 (B, *shape)."""
    if (views == views[0]).all():
        return torch.from_numpy(stored.read(int(views[0]), rows)).float()
    order = np.argsort(views, kind="stable")
    cuts = np.split(order, np.flatnonzero(np.diff(views[order])) + 1)
    read = [torch.from_numpy(stored.read(int(views[cut[0]]), rows[cut])).float() for cut in cuts]
    return torch.cat(read)[torch.from_numpy(np.argsort(order))]


class _Item(dict[str, Any]):
    """An item of a `CachedDataset`."""


class _Items(Sequence[_Item]):
    """The items of a batch, each cut from the batch's tensors when it is looked at.

    PyTorch's `default_collate` is given the tensors themselves, unless items were looked at before it.

    Args:
        columns: by name a tensor (B, ...), which gives Python's numbers where it is (B,); or a list of
            what a transform has made of the images.
    """

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = columns
        self._made: dict[int, _Item] = {}

    def __len__(self) -> int:
        return len(self._columns["label"])

    @overload
    def __getitem__(self, place: int) -> _Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[_Item]: ...
    def __getitem__(self, place: int | slice) -> _Item | list[_Item]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self._made:
            item = _Item((name, values[place]) for name, values in self._columns.items())
            for name, value in item.items():
                if isinstance(value, Tensor) and not value.ndim:
                    item[name] = value.item()
            self._made[place] = item
            self._first = dict(item)
        return self._made[place]

    def collated(self) -> dict[str, Any] | None:
        """The batch; None where items are out of which some may have been changed."""
        if self._made.keys() != {0}:
            return None
        item, as_made = self._made[0], self._first
        if item.keys() != as_made.keys() or any(item[name] is not as_made[name] for name in item):
            return None
        return {
            name: values if isinstance(values, Tensor) else default_collate(values)
            for name, values in self._columns.items()
        }


def _collate(items: Sequence[_Item], *, collate_fn_map: Any = None) -> dict[str, Any]:
    """The batch of some items, as `default_collate` makes it."""
    batch = items.collated() if isinstance(items, _Items) else None
    return default_collate([dict(item) for item in items]) if batch is None else batch


default_collate_fn_map[_Item] = _collate  # how PyTorch is told of a type


class ViewSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Numbers of a `CachedDataset` with their epoch: it reaches every worker with each item.

    The order depends on (seed, epoch) alone. A pass that ends goes on to the next epoch, unless
    `set_epoch` says otherwise. It keeps its state in the middle of an epoch, for torchdata's
    `StatefulDataLoader`.

    Args:
        dataset: what is sampled.
        shuffle: draw an order per epoch; otherwise that of the dataset.
        seed: of the order.
        part: (i, n): of every order the i-th of n parts of one length, for n ranks; the last
            ones, fewer than n, are left out.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        shuffle: bool = True,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if not isinstance(dataset, CachedDataset):
            raise UsageError(
                f"ViewSampler takes a CachedDataset, found {type(dataset).__name__}: for some of its items "
                "give rows= to the CachedDataset instead of a Subset"
            )
        index, parts = part
        if not 0 <= index < parts <= len(dataset):
            raise UsageError(f"part {part}: expected (i, n) with 0 <= i < n <= {len(dataset)}")
        self.dataset, self.shuffle, self.seed, self.part = dataset, shuffle, seed, part
        self.epoch, self._done, self._skip = 0, 0, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.part[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip = self.epoch, self._skip
        self._skip = 0
        for done, number in enumerate(self._order(epoch)[skip:], skip + 1):
            self._done = done
            yield epoch, number
        self.epoch, self._done = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(order)
        index, parts = self.part
        chosen: list[int] = order[index : len(self) * parts : parts].tolist()
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be of ``epoch``; where a loaded state is in it, it goes on there."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """How far the last pass is, plain JSON."""
        return {"epoch": self.epoch, "done": self._done, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Have the next pass go on where that one was; raises `UsageError` for another seed."""
        if state["seed"] != self.seed:
            raise UsageError(
                f"the state is of the seed {state['seed']}, this sampler has {self.seed}: its order "
                "would be another one"
            )
        self.epoch, self._skip = state["epoch"], state["done"]

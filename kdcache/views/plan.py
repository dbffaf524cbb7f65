"""View plans: which pixels are view v of sample k. The same ones for every reader, anywhere.

A view is a pure function of (dataset, augmentation, seed, key, view). Batch size, order, workers,
ranks and resumption have no part in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.augment.augmentation import Augmentation, Identity, Parameters, Sizes
from kdcache.augment.mix import Mix
from kdcache.augment.specs import from_description, no_augmentation
from kdcache.data.align import find_rows
from kdcache.data.dataset import Dataset, Rows, start_method
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache.philox import Draws, key_words, split_seed
from kdcache.views.batches import ImageBatch, grouped
from kdcache.views.loader import Loaders
from kdcache.views.sources import Decoded, Resident, Source, header_sizes
from kdcache_stores import Plan, Samples
from kdcache_stores.errors import MismatchError, UsageError

#: Parameters are drawn for this many views at a time: small batches share the cost of a draw.
_DRAW = 8192


class _Drawn(NamedTuple):
    """Everything random about some views."""

    image: Parameters
    mix: Parameters
    partners: Parameters

    def part(self, chosen: slice) -> _Drawn:
        image, mix, partners = (
            {name: values[chosen] for name, values in group.items()} for group in self
        )
        return _Drawn(image, mix, partners)


def _items_text(item: dict[str, Any] | None) -> str:
    return "images" if item is None else f"{item['dtype']} items of shape {item['shape']}"


class ViewPlan:
    """A dataset, an augmentation and a seed: defines every view, holds no random state.

    Args:
        dataset: the images.
        augmentation: see `make_augmentation`.
        seed: in [0, 2^63).
        samples: what the plan is over, if not simply the dataset as it is: the samples of a store.
            They are found in the dataset by key; rows of the plan are rows of `samples`.
        partial: allow a dataset that lacks some of the samples; asking for their views is refused.

    Raises:
        MismatchError: the dataset lacks samples, or labels differ.
        UsageError: a seed out of range, images that are no files for an augmentation that has
            `decode_side`, or an augmentation of items that are no images.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        seed: int,
        samples: Samples | None = None,
        partial: bool = False,
    ) -> None:
        split_seed(seed)
        if seed >= 1 << 63:
            raise UsageError(f"a plan's seed must be below 2^63, found {seed}")
        if augmentation.decode_side is not None and not isinstance(dataset, EncodedDataset):
            raise UsageError(
                f"{augmentation.name} has decode_side={augmentation.decode_side}, but the images of "
                f"{dataset.name} are no files that kdcache decodes: leave it out"
            )
        if dataset.item is not None and not isinstance(augmentation, Identity):
            raise UsageError(no_augmentation(augmentation.name, dataset.item))
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self.samples = samples if samples is not None else dataset.samples
        self._where = find_rows(dataset, self.samples, partial) if samples is not None else None
        self._words = key_words(self.samples.key_hashes)
        self._resident: dict[torch.device, torch.Tensor] = {}
        self._loaders: Loaders | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_resident": {}, "_loaders": None}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def views(self) -> int | None:
        """The number of views where the augmentation fixes it, e.g. `exhaustive`; else None."""
        return self.augmentation.views

    @cached_property
    def dataset_rows(self) -> Rows:
        """int64 (N,): the dataset's row of each row of the plan, -1 where it is absent."""
        return np.arange(len(self)) if self._where is None else self._where

    def has(self, row: int) -> bool:
        """Whether the dataset holds the image of a row of the plan."""
        return self._where is None or bool(self._where[row] >= 0)

    def over(self, rows: Rows) -> ViewPlan:
        """The plan over some of its rows alone: the same views, but mixed with each other only.

        Args:
            rows: int64 (N,), distinct; row i of the new plan is row ``rows[i]`` of this one.
        """
        keys = [self.samples.keys[row] for row in rows]
        samples = Samples(keys, self.samples.labels[rows], self.samples.hashed)
        return ViewPlan(self.dataset, self.augmentation, self.seed, samples)

    def partners(self, rows: Any, views: Any) -> Rows | None:
        """The rows whose images are mixed into some views, int64 (B,); None where none are."""
        if not isinstance(self.augmentation, Mix):
            return None
        rows, views = self._pairs(rows, views)
        return self.augmentation.partners(self._draws(rows, views), len(self))

    def to_store(self) -> Plan:
        """The plan as a store keeps it."""
        return Plan(
            dataset=self.dataset.name,
            split=self.dataset.split,
            classes=self.dataset.classes,
            fingerprint=self.samples.fingerprint,
            augmentation=self.augmentation.describe(),
            seed=self.seed,
            class_names=self.dataset.class_names,
            item=None if self.dataset.item is None else self.dataset.item.to_dict(),
            notes={
                name: value
                for name, value in (
                    ("skipped", dict(self.dataset.skipped)),
                    ("decoder", self.dataset.decoder),
                )
                if value
            },
        )

    @classmethod
    def from_store(
        cls,
        plan: Plan,
        dataset: Dataset,
        samples: Samples | None = None,
        augmentation: Augmentation | None = None,
        partial: bool = False,
    ) -> ViewPlan:
        """The plan of a store over a dataset that is here.

        Args:
            plan: the store's.
            dataset: where the images are.
            samples: the store's samples; without them, the dataset must match row by row.
            augmentation: must be what the plan describes. Needed for a user's own alone: a store
                never makes kdcache import anything.
            partial: see `ViewPlan`.

        Raises:
            MismatchError: dataset or augmentation differ from the plan.
        """
        if augmentation is None:
            augmentation = from_description(plan.augmentation)
        elif augmentation.describe() != plan.augmentation:
            raise MismatchError(
                f"the store was made with the augmentation {plan.augmentation}, "
                f"asked for {augmentation.describe()}"
            )
        fingerprint = (samples or dataset.samples).fingerprint
        if fingerprint != plan.fingerprint:
            raise MismatchError(
                f"the plan is over {plan.dataset} ({plan.split}) with fingerprint "
                f"{plan.fingerprint[:16]}, but {dataset.name} ({dataset.split}) has "
                f"{fingerprint[:16]}: other samples, another order or other labels"
            )
        here = dataset.item.to_dict() if dataset.item is not None else None
        if here != plan.item:
            raise MismatchError(
                f"the plan is over {_items_text(plan.item)}, {dataset.name} ({dataset.split}) holds "
                f"{_items_text(here)}: give the data that the teacher saw"
            )
        return cls(dataset, augmentation, plan.seed, samples, partial)

    def stream(
        self,
        batches: Iterable[tuple[Rows, NDArray[np.int64] | int]],
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> Iterator[ImageBatch]:
        """The views of each batch, in order.

        Images in memory are gathered and augmented in batches on the device, without workers.
        Files, and a user's own augmentation, go through a DataLoader, whose processes stay until
        the plan goes; a row that is several times in a batch is decoded once. The pixels do not
        depend on the way, see the augmentation for interpolation.

        Args:
            batches: (rows int64 (B,), views int64 (B,) or one view for all) each; a row or a view
                may occur any number of times. Taken one by one, a few ahead.
            device: where the images go.
            workers: processes that decode; 0: this one.

        Raises:
            DataError: an image cannot be decoded, or sizes differ within a batch; names the key.
            MismatchError: a sample or a mix partner is not in a partial dataset.
        """
        device = torch.device(device)
        if self.dataset.images is not None and (self.augmentation.batched or workers == 0):
            yield from self._stream_resident(batches, device)
        else:
            pairs = (self._pairs(*batch) for batch in batches)
            if self._loaders is None:
                # They render a copy: without a cycle, the processes end with the plan.
                self._loaders = Loaders(copy.copy(self)._render, start_method(self.dataset))
            yield from self._loaders.stream(pairs, device, workers)

    def images(self, rows: Any, views: Any, device: str | torch.device = "cpu") -> torch.Tensor:
        """The views of some pairs: uint8 (B, C, H, W)."""
        return next(self.stream([(rows, views)], device)).images

    def render(self, rows: Any, views: Any) -> ImageBatch:
        """The views of some pairs on the CPU, in this process, with no worker: see `stream`."""
        rows, views = self._pairs(rows, views)
        images = self.dataset.images
        if images is None or not self.augmentation.batched:
            return self._render(rows, views)
        source = Resident(images)
        return self._batch(rows, views, self._draw(rows, views, source.sizes), source)

    def parameters(self, rows: Any, views: Any) -> tuple[Parameters, dict[str, NDArray[np.bool_]]]:
        """Everything that is drawn for some pairs, and which of it has no effect on which view.

        Returns:
            named arrays (B,), those of a mix included; masks (B,) for names that are in part
            unused.
        """
        rows, views = self._pairs(rows, views)
        side = self.augmentation.decode_side
        drawn = self._draw(rows, views, lambda rows: header_sizes(self.dataset, rows, side))
        return drawn.image | drawn.mix, self.augmentation.unused(drawn.image)

    def _pairs(self, rows: Any, views: Any) -> tuple[Rows, NDArray[np.int64]]:
        rows = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        views = np.broadcast_to(np.asarray(views, dtype=np.int64), rows.shape).copy()
        if len(rows) == 0:
            raise UsageError("a batch must have at least one row")
        if rows.min() < 0 or rows.max() >= len(self):
            raise UsageError(f"rows must be in [0, {len(self)}), found {rows.min()}..{rows.max()}")
        if views.min() < 0 or views.max() >= 1 << 32:
            raise UsageError(f"views must be in [0, 2^32), found {views.min()}..{views.max()}")
        return rows, views

    def _locate(self, rows: Rows) -> Rows:
        """Rows of the dataset for rows of the plan."""
        if self._where is None:
            return rows
        located = self._where[rows]
        if (located < 0).any():
            absent = [self.samples.keys[row] for row in rows[located < 0][:3]]
            raise MismatchError(
                f"{int((located < 0).sum())} of the samples or mix partners asked for are not in "
                "this part of "
                f"{self.dataset.name}, the first: {absent}"
            )
        return located

    def _draws(self, rows: Rows, views: NDArray[np.int64]) -> Draws:
        return Draws(self._words[rows], views, self.seed)

    def _draw(
        self, rows: Rows, views: NDArray[np.int64], sizes_of: Callable[[Rows], Sizes]
    ) -> _Drawn:
        sizes = sizes_of(self._locate(rows))
        draws = self._draws(rows, views)
        image = self.augmentation.draw(draws, sizes)
        if not isinstance(self.augmentation, Mix):
            return _Drawn(image, {}, {})
        after = self.augmentation.output_sizes(sizes)
        mix = self.augmentation.draw_mix(draws, after, len(self))
        partner = mix["partner"]
        theirs = sizes_of(self._locate(partner))
        return _Drawn(image, mix, self.augmentation.draw(self._draws(partner, views), theirs))

    def _batch(
        self, rows: Rows, views: NDArray[np.int64], drawn: _Drawn, source: Source
    ) -> ImageBatch:
        images = source.apply(self.augmentation, self._locate(rows), drawn.image)
        labels = torch.from_numpy(self.samples.labels[rows])
        if not isinstance(self.augmentation, Mix):
            return ImageBatch(rows, views, images, labels)
        partner = drawn.mix["partner"]
        theirs = source.apply(self.augmentation, self._locate(partner), drawn.partners)
        lam = torch.from_numpy(drawn.mix["lambda"])
        return ImageBatch(
            rows,
            views,
            self.augmentation.mix(images, theirs, drawn.mix),
            labels,
            (torch.from_numpy(self.samples.labels[partner]), lam),
        )

    def _stream_resident(
        self, batches: Iterable[tuple[Rows, NDArray[np.int64] | int]], device: torch.device
    ) -> Iterator[ImageBatch]:
        assert self.dataset.images is not None
        images = self._resident.get(device)
        if images is None:
            images = self.dataset.images.to(device)
            self._resident = {device: images}
        source = Resident(images)
        for group in grouped((self._pairs(*batch) for batch in batches), _DRAW):
            rows = np.concatenate([rows for rows, _ in group])
            drawn = self._draw(rows, np.concatenate([views for _, views in group]), source.sizes)
            start = 0
            for rows, views in group:
                stop = start + len(rows)
                yield self._batch(rows, views, drawn.part(slice(start, stop)), source).to(device)
                start = stop

    def _render(self, rows: Rows, views: NDArray[np.int64]) -> ImageBatch:
        """One batch from decoded images, on the CPU."""
        source = Decoded(self.dataset, self.augmentation.decode_side)
        return self._batch(rows, views, self._draw(rows, views, source.sizes), source)

"""View plans: which pixels are view v of sample k. The same ones for every reader, anywhere.

A view is a pure function of (dataset, augmentation, seed, key, view). Batch size, order, workers,
ranks and resumption have no part in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.augment import Augmentation, Mix, Parameters, from_description, make_augmentation
from kdcache.datasets.align import find_rows
from kdcache.datasets.base import Dataset, Rows
from kdcache.philox import Draws, key_words, split_seed
from kdcache_stores import Plan, Samples
from kdcache_stores.errors import DataError, MismatchError, UsageError

__all__ = ["Batch", "ViewPlan", "make_augmentation", "make_batches"]

#: Parameters are drawn for this many views at a time: small batches share the cost of a draw.
_DRAW = 8192


@dataclass(frozen=True)
class Batch:
    """B views.

    Attributes:
        rows: int64 (B,), rows of the plan.
        views: int64 (B,).
        images: uint8 (B, C, H, W) on the device asked for.
        labels: int64 (B,) on the device, -1 where unlabelled.
        mix: None, or for mixup and cutmix (labels of the partners, lambda) with shapes (B,) and
            dtypes int64 and float32: the target is lambda * label + (1 - lambda) * partner label.
    """

    rows: Rows
    views: NDArray[np.int64]
    images: torch.Tensor
    labels: torch.Tensor
    mix: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)


class _Drawn(NamedTuple):
    """Everything random about some views."""

    own: Parameters
    mix: Parameters
    partners: Parameters

    def part(self, chosen: slice) -> _Drawn:
        own, mix, partners = (
            {name: values[chosen] for name, values in group.items()} for group in self
        )
        return _Drawn(own, mix, partners)


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
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self.samples = samples if samples is not None else dataset.samples
        self._where = find_rows(dataset, self.samples, partial) if samples is not None else None
        self._words = key_words(self.samples.key_hashes)
        self._labels = torch.from_numpy(self.samples.labels)
        self._resident: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def views(self) -> int | None:
        """The number of views where the augmentation fixes it, e.g. `exhaustive`; else None."""
        return self.augmentation.views

    @property
    def reordered(self) -> bool:
        """Whether samples had to be looked up by key: another order, or more files than planned."""
        return self._where is not None

    @property
    def dataset_rows(self) -> Rows:
        """int64 (N,): the dataset's row of each row of the plan, -1 where it is absent."""
        return np.arange(len(self)) if self._where is None else self._where

    def has(self, row: int) -> bool:
        """Whether the dataset holds the image of a row of the plan."""
        return self._where is None or bool(self._where[row] >= 0)

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
        return cls(dataset, augmentation, plan.seed, samples, partial)

    def stream(
        self,
        batches: Sequence[tuple[Rows, NDArray[np.int64] | int]],
        device: str | torch.device = "cpu",
        workers: int = 0,
        start_method: str | None = None,
    ) -> Iterator[Batch]:
        """The views of each batch, in order.

        Images in memory are gathered and augmented in batches on the device, without workers.
        Files, and a user's own augmentation, go through a DataLoader; a row that is several times
        in a batch is decoded once. The pixels do not depend on the way, see the augmentation for
        interpolation.

        Args:
            batches: (rows int64 (B,), views int64 (B,) or one view for all) each; a row or a view
                may occur any number of times.
            device: where the images go.
            workers: processes that decode; 0: this one.
            start_method: how workers start, "fork", "spawn" or "forkserver"; None: the platform's
                way.

        Raises:
            DataError: an image cannot be decoded, or sizes differ within a batch; names the key.
            MismatchError: a sample or a mix partner is not in a partial dataset.
        """
        device = torch.device(device)
        if self.dataset.images is not None and (self.augmentation.batched or workers == 0):
            yield from self._stream_resident(batches, device)
        else:
            yield from self._stream_files(batches, device, workers, start_method)

    def images(self, rows: Any, views: Any, device: str | torch.device = "cpu") -> torch.Tensor:
        """The views of some pairs: uint8 (B, C, H, W)."""
        return next(self.stream([(rows, views)], device)).images

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
        found = self._where[rows]
        if (found < 0).any():
            absent = [self.samples.keys[row] for row in rows[found < 0][:3]]
            raise MismatchError(
                f"{int((found < 0).sum())} of the samples or mix partners asked for are not in "
                "this part of "
                f"{self.dataset.name}, the first: {absent}"
            )
        return found

    def _draws(self, rows: Rows, views: NDArray[np.int64]) -> Draws:
        return Draws(self._words[rows], views, self.seed)

    def _draw(self, rows: Rows, views: NDArray[np.int64], source: _Source) -> _Drawn:
        sizes = source.sizes(self._locate(rows))
        draws = self._draws(rows, views)
        own = self.augmentation.draw(draws, sizes)
        if not isinstance(self.augmentation, Mix):
            return _Drawn(own, {}, {})
        after = self.augmentation.output_sizes(sizes)
        mix = self.augmentation.draw_mix(draws, after, len(self))
        partner = mix["partner"]
        theirs = source.sizes(self._locate(partner))
        return _Drawn(own, mix, self.augmentation.draw(self._draws(partner, views), theirs))

    def _batch(self, rows: Rows, views: NDArray[np.int64], drawn: _Drawn, source: _Source) -> Batch:
        images = source.apply(self.augmentation, self._locate(rows), drawn.own)
        labels = self._labels[torch.from_numpy(rows)]
        if not isinstance(self.augmentation, Mix):
            return Batch(rows, views, images, labels)
        partner = drawn.mix["partner"]
        theirs = source.apply(self.augmentation, self._locate(partner), drawn.partners)
        lam = torch.from_numpy(drawn.mix["lambda"])
        return Batch(
            rows,
            views,
            self.augmentation.mix(images, theirs, drawn.mix),
            labels,
            (self._labels[torch.from_numpy(partner)], lam),
        )

    def _stream_resident(
        self, batches: Iterable[tuple[Rows, NDArray[np.int64] | int]], device: torch.device
    ) -> Iterator[Batch]:
        assert self.dataset.images is not None
        if device not in self._resident:
            self._resident = {device: self.dataset.images.to(device)}
        source = _Resident(self._resident[device])
        for group in _groups(self._pairs(*batch) for batch in batches):
            rows = np.concatenate([rows for rows, _ in group])
            drawn = self._draw(rows, np.concatenate([views for _, views in group]), source)
            start = 0
            for rows, views in group:
                stop = start + len(rows)
                yield _to(self._batch(rows, views, drawn.part(slice(start, stop)), source), device)
                start = stop

    def _stream_files(
        self,
        batches: Sequence[tuple[Rows, NDArray[np.int64] | int]],
        device: torch.device,
        workers: int,
        start_method: str | None,
    ) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            _Replay(self, [self._pairs(*batch) for batch in batches]),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=start_method if workers else None,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            rows, views, images, labels, mix = batch
            result = Batch(np.asarray(rows), np.asarray(views), images, labels, mix and tuple(mix))
            yield _to(result, device)


class _Source:
    """Where the pixels of a batch come from."""

    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        raise NotImplementedError

    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        raise NotImplementedError


class _Resident(_Source):
    """One tensor on the device."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        return np.broadcast_to(np.array(self.images.shape[2:], dtype=np.int64), (len(rows), 2))

    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        index = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
        return augmentation.apply(self.images.index_select(0, index), parameters)


class _Decoded(_Source):
    """Images decoded as they are asked for, each once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.cache: dict[int, torch.Tensor] = {}

    def image(self, row: int) -> torch.Tensor:
        if row not in self.cache:
            self.cache[row] = self.dataset.decode(row)
        return self.cache[row]

    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        return np.array([self.image(int(row)).shape[1:] for row in rows], dtype=np.int64)

    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        images = [
            augmentation.apply_one(
                self.image(int(row)), {name: values[i] for name, values in parameters.items()}
            )
            for i, row in enumerate(rows)
        ]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"the images of a batch differ in shape after {augmentation.name!r}: "
                f"{sorted(shapes)[:3]} (channels, height, width). Use resized-crop-flip or, for "
                "evaluation, center-crop, which give one size"
            )
        return torch.stack(images)


class _Failure(NamedTuple):
    """An error of a worker, without the worker's traceback."""

    kind: type[DataError] | type[MismatchError] | type[UsageError]
    message: str


class _Replay(torch.utils.data.Dataset[Any]):
    """Batches for a DataLoader: item i is the whole batch i."""

    def __init__(self, plan: ViewPlan, batches: list[tuple[Rows, NDArray[np.int64]]]) -> None:
        self.plan, self.batches = plan, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        rows, views = self.batches[index]
        source = _Decoded(self.plan.dataset)
        try:
            drawn = self.plan._draw(rows, views, source)
            batch = self.plan._batch(rows, views, drawn, source)
        except (DataError, MismatchError, UsageError) as error:
            kind = next(k for k in (DataError, MismatchError, UsageError) if isinstance(error, k))
            return _Failure(kind, str(error))
        return torch.from_numpy(rows), torch.from_numpy(views.copy()), *_tensors(batch)


def _tensors(batch: Batch) -> tuple[Any, ...]:
    return batch.images, batch.labels, batch.mix


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    mix = batch.mix and (
        batch.mix[0].to(device, non_blocking=True),
        batch.mix[1].to(device, non_blocking=True),
    )
    images = batch.images.to(device, non_blocking=True)
    return Batch(batch.rows, batch.views, images, batch.labels.to(device, non_blocking=True), mix)


def _groups(pairs: Iterable[tuple[Any, Any]]) -> Iterator[list[tuple[Any, Any]]]:
    """Consecutive batches, together about `_DRAW` views."""
    group: list[tuple[Any, Any]] = []
    total = 0
    for rows, views in pairs:
        group.append((rows, views))
        total += len(rows)
        if total >= _DRAW:
            yield group
            group, total = [], 0
    if group:
        yield group


def make_batches(
    order: Rows, views: NDArray[np.int64] | int, batch_size: int, views_per_decode: int = 1
) -> list[tuple[Rows, NDArray[np.int64]]]:
    """Cut an order of rows into batches for `ViewPlan.stream`.

    Args:
        order: int64 (N,), rows in the order wanted.
        views: the view of each, (N,) or one for all; with `views_per_decode` m, the first of m
            consecutive ones.
        batch_size: views per batch; the last one may be smaller.
        views_per_decode: m: every row comes with m views in the same batch, decoded once.
    """
    if batch_size < 1 or views_per_decode < 1 or batch_size % views_per_decode:
        raise UsageError(
            "batch_size must be a positive multiple of views_per_decode, "
            f"found {batch_size} and {views_per_decode}"
        )
    order = np.asarray(order, dtype=np.int64)
    first = np.broadcast_to(np.asarray(views, dtype=np.int64), order.shape)
    rows = np.repeat(order, views_per_decode)
    views = np.repeat(first, views_per_decode) + np.tile(np.arange(views_per_decode), len(order))
    return [
        (rows[i : i + batch_size], views[i : i + batch_size])
        for i in range(0, len(rows), batch_size)
    ]

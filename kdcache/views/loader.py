"""Batches made by worker processes, in order, with errors that read like those of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.views.batches import ImageBatch, Pairs
from kdcache_stores.errors import DataError, MismatchError, UsageError

Render = Callable[..., ImageBatch]
_ERRORS = (DataError, MismatchError, UsageError)


class _Failure(NamedTuple):
    """An error of a worker, without the worker's traceback."""

    kind: int
    message: str


class _Batches(torch.utils.data.Dataset[Any]):
    """Item i is the whole batch i."""

    def __init__(self, render: Render, batches: Sequence[Pairs]) -> None:
        self.render, self.batches = render, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        rows, views = self.batches[index]
        try:
            batch = self.render(rows, views)
        except _ERRORS as error:
            kind = next(i for i, known in enumerate(_ERRORS) if isinstance(error, known))
            return _Failure(kind, str(error))
        return batch.images, batch.labels, batch.mix


def load(
    render: Render,
    batches: Sequence[Pairs],
    device: torch.device,
    workers: int,
) -> Iterator[ImageBatch]:
    """Render batches in `workers` processes (0: this one) and move them to a device.

    Args:
        render: from rows and views to a `ImageBatch`; pickled where workers do not fork.
        batches: rows and views of each.
        device: where they go.
        workers: number of processes.

    Raises:
        DataError, MismatchError, UsageError: what `render` raised.
    """
    loader = torch.utils.data.DataLoader(
        _Batches(render, batches),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: views draw nothing from torch's, and networks do
    )
    for (rows, views), item in zip(batches, loader, strict=True):
        if isinstance(item, _Failure):
            raise _ERRORS[int(item.kind)](item.message)
        images, labels, mix = item
        yield ImageBatch(rows, np.asarray(views), images, labels, mix and tuple(mix)).to(device)

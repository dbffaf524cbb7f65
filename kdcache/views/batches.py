"""Batches of views: what is asked of a plan, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.data.dataset import Rows
from kdcache_stores.errors import UsageError

#: Rows and views of one batch: int64 (B,) each.
Pairs = tuple[Rows, NDArray[np.int64]]


@dataclass(frozen=True)
class ImageBatch:
    """The images and labels of B views, as a plan makes them.

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

    def by_view(self, views: int) -> Iterator[ImageBatch]:
        """The batches of single views of a batch of `together`: (V * B) to V times (B,)."""
        each = len(self) // views
        for start in range(0, len(self), each):
            here = slice(start, start + each)
            mix = self.mix and (self.mix[0][here], self.mix[1][here])
            yield ImageBatch(
                self.rows[here], self.views[here], self.images[here], self.labels[here], mix
            )

    def to(self, device: torch.device) -> ImageBatch:
        """The batch with its tensors on a device; copies do not wait where they need not."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        mix = self.mix and (move(self.mix[0]), move(self.mix[1]))
        return ImageBatch(self.rows, self.views, move(self.images), move(self.labels), mix)


def together(rows: Rows, views: Sequence[int]) -> Pairs:
    """The pairs of several views of the same rows, view by view: their images are decoded once.

    Args:
        rows: int64 (B,).
        views: V of them.

    Returns rows and views int64 (V * B,), for `ImageBatch.by_view`.
    """
    return np.tile(rows, len(views)), np.repeat(np.asarray(views, dtype=np.int64), len(rows))


def make_batches(
    order: Rows, views: NDArray[np.int64] | int, batch_size: int
) -> list[tuple[Rows, NDArray[np.int64]]]:
    """Cut an order of rows into batches for `ViewPlan.stream`.

    Args:
        order: int64 (N,), rows in the order wanted.
        views: the view of each, (N,) or one for all.
        batch_size: views per batch; the last one may be smaller.

    Raises:
        UsageError: a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, found {batch_size}")
    rows = np.asarray(order, dtype=np.int64)
    views = np.broadcast_to(np.asarray(views, dtype=np.int64), rows.shape)
    return [
        (rows[i : i + batch_size], views[i : i + batch_size])
        for i in range(0, len(rows), batch_size)
    ]


def grouped(pairs: Iterable[Pairs], count: int) -> Iterator[list[Pairs]]:
    """Consecutive batches, together at least `count` views (but for the last ones)."""
    group: list[Pairs] = []
    total = 0
    for rows, views in pairs:
        group.append((rows, views))
        total += len(rows)
        if total >= count:
            yield group
            group, total = [], 0
    if group:
        yield group

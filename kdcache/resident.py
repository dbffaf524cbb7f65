"""Decoded logits in memory: the views that an epoch needs, and the next ones on their way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache_stores import LogitStore

Rows = NDArray[np.int64]


class ResidentLogits:
    """A window of views of aligned stores, for some of their rows, on a device.

    Views come in groups: of one, or of two where a weak and a strong view belong together. Epoch ``e``
    uses the groups e, e+1, ..., e+window-1 (mod their number). While it trains, a background thread reads
    and decodes what the next epoch adds, so memory holds at most ``window`` + 1 groups, however many
    views the stores have.

    Args:
        stores: stores of one plan.
        rows: (N,) rows of the stores that will be asked for.
        views: V, how many of the stored views to cycle through, a multiple of ``group``.
        window: groups in memory that one epoch can draw from, 1 to V / group.
        group: views that belong together.
        first: number of the first of these views, where the stores are parts.
        device: where the logits are wanted.
    """

    def __init__(
        self,
        stores: Sequence[LogitStore],
        rows: Rows,
        views: int,
        window: int,
        device: torch.device,
        group: int = 1,
        first: int = 0,
    ) -> None:
        self.stores, self.rows, self.groups, self.window = stores, rows, views // group, window
        self.group, self.device, self.first = group, device, first
        slots = min(window + 1, self.groups) * group
        self._slot_of = np.full(views, -1, np.int64)
        self._buffers = [
            torch.empty((slots, len(rows), store.classes), dtype=_dtype(store), device=device)
            for store in stores
        ]
        self._loading: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kdcache-read")

    @staticmethod
    def bytes_per_view(stores: Sequence[LogitStore], rows: int) -> int:
        """Memory that one view takes."""
        return sum(rows * store.classes * _dtype(store).itemsize for store in stores)

    def window_of(self, epoch: int) -> Rows:
        """The groups that epoch ``epoch`` can use, in order; group i holds views i·group and on."""
        return (epoch + np.arange(self.window)) % self.groups

    def _views_of(self, epoch: int) -> list[int]:
        firsts = self.window_of(epoch) * self.group
        return [int(first) + i for first in firsts for i in range(self.group)]

    def prepare(self, epoch: int) -> None:
        """Wait for the views of ``epoch`` and start to read those of the next.

        Raises:
            CorruptStore: what was read is not what was written.
        """
        now = self._views_of(epoch)
        needed = list(dict.fromkeys([*now, *self._views_of(epoch + 1)]))
        for view in set(np.flatnonzero(self._slot_of >= 0).tolist()) - set(needed):
            self._loading.pop(view).result()
            self._slot_of[view] = -1
        free = sorted(set(range(len(self._buffers[0]))) - set(self._slot_of.tolist()))
        for view in needed:
            if self._slot_of[view] < 0:
                self._slot_of[view] = free.pop(0)
                self._loading[view] = self._reader.submit(self._load, view)
        for view in now:
            self._loading[view].result()

    def _load(self, view: int) -> None:
        for store, buffer in zip(self.stores, self._buffers, strict=True):
            buffer[self._slot_of[view]] = torch.from_numpy(store.read(self.first + view, self.rows))

    def take(self, views: Rows, positions: Tensor) -> tuple[Tensor, ...]:
        """The logits of some samples, each from a view of the epoch that was prepared.

        Args:
            views: int64 (...,).
            positions: int64 (...,) on the device, indices into ``rows``.

        Returns:
            float32 (..., K) per store.
        """
        slots = torch.from_numpy(self._slot_of[views - self.first]).to(self.device)
        return tuple(buffer[slots, positions].float() for buffer in self._buffers)

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def _dtype(store: LogitStore) -> torch.dtype:
    """What keeps decoded values exactly: half the memory where the store is float16 itself."""
    return torch.float16 if store.encoding.name == "float16" else torch.float32

"""Decoded logits in memory: the views that an epoch needs, and the next ones on their way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache_stores import Store

Rows = NDArray[np.int64]

#: The share of the free memory that the default window of views may take.
SHARE_OF_FREE = 0.5


def views_that_fit(
    stores: Sequence[Store], rows: int, device: torch.device, sharers: int = 1
) -> int:
    """How many views of ``rows`` samples fit into half of the device's free memory; at least 1.

    Args:
        sharers: processes that share the memory of a CPU.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // sharers
    per_view = max(1, sum(rows * store.classes * _dtype(store).itemsize for store in stores))
    return max(1, int(SHARE_OF_FREE * free) // per_view)


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
        stores: Sequence[Store],
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
        with torch.inference_mode(False):  # the reading thread writes into them
            self._buffers = [
                torch.empty((slots, len(rows), store.classes), dtype=_dtype(store), device=device)
                for store in stores
            ]
        self._loading: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kdcache-read")

    def _views_of(self, epoch: int) -> list[int]:
        firsts = (epoch + np.arange(self.window)) % self.groups * self.group
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

    def places(self, views: Rows, positions: Rows) -> Tensor:
        """Where the logits of samples lie, each in a view of the epoch that was prepared.

        Args:
            views: int64 (B,), or (B, 2) for pairs.
            positions: int64 of the same shape, indices into ``rows``.

        Returns:
            int64 of the same shape on the device, for `take`.
        """
        return torch.from_numpy(self._slot_of[views - self.first] * len(self.rows) + positions).to(
            self.device
        )

    def take(self, places: Tensor) -> tuple[Tensor, ...]:
        """The logits at some of the `places`: float32 (..., K) per store."""
        flat = places.reshape(-1)
        return tuple(
            buffer.flatten(0, 1).index_select(0, flat).float().view(*places.shape, -1)
            for buffer in self._buffers
        )

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def _dtype(store: Store) -> torch.dtype:
    """What keeps decoded values exactly: half the memory where the store is float16 itself."""
    return torch.float16 if store.fields["logits"].encoding.name == "float16" else torch.float32

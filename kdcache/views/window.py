"""Fields in memory, packed: the views that an epoch needs, and the next ones on their way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from weakref import WeakSet

import numpy as np
import psutil
import torch
from torch import Tensor

from kdcache.data.dataset import Rows
from kdcache.views.packed import Arrays, PackedField, Packing
from kdcache.views.packed_codes import Positions
from kdcache_stores import Store

#: Per teacher, which store holds each field that is read.
Teachers = Sequence[Mapping[str, Store]]

#: The share of the free memory that the default window of views may take.
SHARE_OF_FREE = 0.5

#: How much of a view is read at once, as float32, on its way into memory.
DECODED_BYTES = 2**27

#: How much is decoded at once, as float32, of the batches to come. It costs an eighth of decoding batches
#: of 64 rows of 100 classes one by one, and is little enough to stay in a processor's cache.
TAKEN_BYTES = 2**20


def views_that_fit(teachers: Teachers, rows: int, device: torch.device, sharers: int = 1) -> int:
    """How many views of ``rows`` samples, packed, fit into half of the device's free memory; at least 1.

    Args:
        teachers: what is read.
        sharers: processes that share the memory of a CPU.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // sharers
    view, shared = packed_bytes(teachers, rows)
    return max(1, (int(SHARE_OF_FREE * free) - shared) // max(1, view))


def packed_bytes(teachers: Teachers, rows: int) -> tuple[int, int]:
    """Bytes in memory of what is read of one view of ``rows`` samples, and of what its views share.

    They are those that the encodings' codes take in few bits each (`Packing`), as a sample of the rows
    shows them.
    """
    packed = [
        Packing.of(store, name).memory(1, rows, torch.device("meta"))
        for fields in teachers
        for name, store in fields.items()
    ]
    return sum(field.nbytes for field in packed), sum(field.shared_nbytes for field in packed)


def batches_at_once(teachers: Teachers, samples: int) -> int:
    """How many batches of so many samples `Window.batches` decodes at once; at least 1."""
    values = sum(math.prod(store.fields[name].shape) for f in teachers for name, store in f.items())
    return max(1, TAKEN_BYTES // (4 * values * samples))


def pieces(rows: Rows, shard_rows: int, most: int) -> Iterator[slice | Rows]:
    """Cut rows into pieces of whole shards, so that each shard is read once.

    Args:
        rows: int64 (N,), rows of a store in any order.
        shard_rows: of the store.
        most: rows in a piece at most, but no fewer than those of one shard.

    Yields, per piece, which of the rows they are: a slice where they lie side by side, else int64.
    """
    order = np.argsort(rows, kind="stable")
    group = rows[order] // shard_rows // max(1, most // shard_rows)
    for piece in np.split(order, np.flatnonzero(np.diff(group)) + 1):
        side_by_side = len(piece) and (np.diff(piece) == 1).all()
        yield slice(int(piece[0]), int(piece[-1]) + 1) if side_by_side else piece


#: Per teacher and field, memory for some views.
Buffers = list[dict[str, PackedField]]


#: Of one batch: per teacher its fields, float32 (B, *shape).
Targets = tuple[dict[str, Tensor], ...]


#: Starts to read a view into a slot of the buffers.
Load = Callable[[int, Buffers, int], Future[None]]


class Window:
    """The views that one epoch draws from: they stay in memory for as long as this object lives."""

    def __init__(self, room: _Room, views: Sequence[int], first: int, rows: int) -> None:
        self.views, self._buffers, self._first, self._rows = views, room.buffers, first, rows
        self._room = room  # lives as long as its windows
        self._device = room.device
        self._slot_of = np.full(max(views) + 1, -1, np.int64)
        self._slot_of[list(views)] = [room.slot_of[view] for view in views]

    def places(self, views: Rows, positions: Rows) -> Tensor:
        """Where the rows of samples lie.

        Args:
            views: int64 (B,), or (B, 2) for pairs; each of the window.
            positions: int64 of the same shape, indices into the rows.

        Returns:
            int64 of the same shape on the device, for `take`.
        """
        slots = self._slot_of[views - self._first]
        return torch.from_numpy(slots * self._rows + positions).to(self._device)

    def batches(self, places: Tensor, sizes: Sequence[int], at_once: int) -> Iterator[Targets]:
        """The rows at all `places`, batch by batch, of which some are decoded at once.

        Args:
            sizes: of the batches, which are as many as the places together.
            at_once: batches. Decoded with others or not, a row is the same, but for `compact` in the
                last bits: so who begins in the middle of an epoch begins with a multiple of these.
        """
        ends = np.cumsum(sizes)
        for first in range(0, len(sizes), at_once):
            last = min(first + at_once, len(sizes)) - 1
            begin = int(ends[first]) - sizes[first]
            rows = self.take(places[begin : ends[last]])
            for number in range(first, last + 1):
                end = int(ends[number]) - begin
                here = slice(end - sizes[number], end)
                yield tuple({name: all_[here] for name, all_ in fields.items()} for fields in rows)

    def take(self, places: Tensor) -> Targets:
        """The rows at some of the `places`: float32 (..., *shape) per teacher and field."""
        flat = places.reshape(-1)
        return tuple(
            {
                name: (rows := packed.take(flat)).view(*places.shape, *rows.shape[1:])
                for name, packed in fields.items()
            }
            for fields in self._buffers
        )


class _Room:
    """Memory for some views; a view that a living window reads is never replaced.

    Args:
        buffers: of as many slots each.
        slots: how many views there is memory for.
        device: of the buffers.
    """

    def __init__(self, buffers: Buffers, slots: int, device: torch.device) -> None:
        self.buffers, self.slots, self.device = buffers, slots, device
        self.slot_of: dict[int, int] = {}
        self.loads: dict[int, Future[None]] = {}
        self.windows: WeakSet[Window] = WeakSet()

    def _read_beside(self, views: Iterable[int]) -> list[int]:
        """The views that are being read, then these, each once."""
        read = [view for window in self.windows for view in window.views]
        return list(dict.fromkeys([*read, *views]))

    def fits(self, views: Iterable[int]) -> bool:
        """Whether there is room for these views beside those that are being read."""
        return len(self._read_beside(views)) <= self.slots

    def bring(self, now: list[int], then: list[int], load: Load) -> None:
        """Have what is not here of the views ``now`` loaded, and of ``then`` as far as they fit."""
        slots = range(self.slots)
        stay = self._read_beside([*now, *then])[: len(slots)]
        self.slot_of = {view: slot for view, slot in self.slot_of.items() if view in stay}
        self.loads = {view: self.loads[view] for view in self.slot_of}
        free = sorted(set(slots) - set(self.slot_of.values()))
        for view in stay:
            if view not in self.slot_of:
                self.slot_of[view] = slot = free.pop(0)
                self.loads[view] = load(view, self.buffers, slot)


class ResidentFields:
    """Windows of views of aligned stores, for some of their rows, on a device.

    Views come in groups: of one, or of two where a weak and a strong view belong together. Epoch ``e``
    uses the ``window`` groups from e * ``stride`` on (mod their number). While it trains, a background
    thread reads and packs what the next epoch adds, so memory holds at most ``window`` + ``stride``
    groups, however many views the stores have. Several windows may live at once, in several threads too:
    one whose views do not fit beside those being read takes as much memory again, for as long as it lives.

    Args:
        teachers: per teacher, which store holds each field; all of one plan.
        rows: (N,) rows of the stores that will be asked for.
        views: V, how many of the stored views to cycle through, a multiple of ``group``.
        window: groups in memory that one epoch can draw from, 1 to V / group.
        group: views that belong together.
        first: number of the first of these views, where the stores are parts.
        stride: groups by which the window moves on from epoch to epoch, at most ``window``.
        device: where the rows are wanted.
    """

    def __init__(
        self,
        teachers: Teachers,
        rows: Rows,
        views: int,
        window: int,
        device: torch.device,
        group: int = 1,
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self.teachers, self.rows, self.groups, self.size = teachers, rows, views // group, window
        self.group, self.device, self.first, self.stride = group, device, first, stride
        self._lock = Lock()
        # One thread: a slot's next view is read after the last one, however that ended.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kdcache-read")
        self._packings = [
            {name: Packing.of(store, name) for name, store in fields.items()} for fields in teachers
        ]
        self._room = self._make_room()
        self._further: WeakSet[_Room] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory for rows."""
        rooms = (self._room, *self._further)
        return sum(
            packed.nbytes + packed.shared_nbytes
            for room in rooms
            for fields in room.buffers
            for packed in fields.values()
        )

    def _make_room(self) -> _Room:
        slots = min(self.size + self.stride, self.groups) * self.group
        with torch.inference_mode(False):  # the reading thread writes into them
            buffers = [
                {
                    name: packing.memory(slots, len(self.rows), self.device)
                    for name, packing in fields.items()
                }
                for fields in self._packings
            ]
        return _Room(buffers, slots, self.device)

    def _load(self, view: int, buffers: Buffers, slot: int) -> Future[None]:
        return self._reader.submit(self._read, view, buffers, slot)

    def _read(self, view: int, buffers: Buffers, slot: int) -> None:
        for stores, memory in zip(self.teachers, buffers, strict=True):
            for name, store in stores.items():
                memory[name].load(slot, self._pieces_of(store, name, self.first + view))

    def _pieces_of(self, store: Store, name: str, view: int) -> Iterator[tuple[Positions, Arrays]]:
        """A view of a field as it is stored, piece by piece, and which of the rows these are."""
        most = max(1, DECODED_BYTES // (4 * math.prod(store.fields[name].shape)))
        for piece in pieces(self.rows, store.shard_rows, most):
            yield piece, store.read_encoded(view, self.rows[piece], name)

    def _views_of(self, epoch: int) -> list[int]:
        firsts = (epoch * self.stride + np.arange(self.size)) % self.groups * self.group
        return [int(first) + i for first in firsts for i in range(self.group)]

    def window(self, epoch: int) -> Window:
        """The views of ``epoch``, read; those of the next are then on their way.

        Raises:
            CorruptStore: what was read is not what was written.
        """
        now, then = self._views_of(epoch), self._views_of(epoch + 1)
        with self._lock:
            room = next((r for r in (self._room, *self._further) if r.fits(now)), None)
            if room is None:
                room = self._make_room()
                self._further.add(room)
            room.bring(now, then, self._load)
            window = Window(room, now, self.first, len(self.rows))
            room.windows.add(window)
            loads = [room.loads[view] for view in now]
        for load in loads:
            load.result()
        return window

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

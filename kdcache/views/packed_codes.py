"""Integer codes in few bits: what an encoding's codes weigh in memory, once they are decompressed.

A column (a component, a class, a value of a map) has as many bits as pay: 0, 1, 2, 4, 8 or 16, for codes
from its lowest on. A code beyond them is an exception, kept beside the row's bits with its column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.dataset import Rows

#: Which rows of a view: a slice where they lie side by side, else int64.
Positions = slice | Rows

#: int16 (n, D).
Codes = NDArray[np.int16]

_WIDTHS = (0, 1, 2, 4, 8)
"""Bits of a column's codes; 16 hold any code."""

_LOWEST = (0.0, 0.02, 0.1, 0.25, 0.5)
"""Quantiles of a column's codes that are tried as the lowest code of its bits."""

_AT_ONCE = 2**20
"""Codes that are packed at once."""

_SPARE = 1.1
"""Memory for exceptions, as a multiple of those that are needed at the time."""


@dataclass(frozen=True)
class Columns:
    """How the columns of codes are laid out in a row's bytes.

    Attributes:
        groups: per width, its columns; int64.
        lowest: int32 (D,), the code that a column's zero stands for; 0 of 16 bits.
    """

    groups: dict[int, Rows]
    lowest: NDArray[np.int32]

    @classmethod
    def choose(cls, sample: Codes) -> Columns:
        """The layout that takes the least memory for codes as these, at least one row of them."""
        count, width = sample.shape
        ordered = np.sort(sample, axis=0).astype(np.int32)
        chosen = np.full(width, 16)
        least, lowest = np.full(width, 2.0), np.zeros(width, np.int32)
        weight = _exception(width).itemsize / count
        for bits in _WIDTHS:
            for quantile in _LOWEST if bits else (0.5,):
                low = ordered[int(quantile * (count - 1))]
                beyond = ((ordered < low) | (ordered >= low + 2**bits)).sum(axis=0)
                size = bits / 8 + weight * beyond
                better = size < least
                chosen[better], least[better], lowest[better] = bits, size[better], low[better]
        lowest[chosen == 16] = 0
        return cls(
            {bits: np.flatnonzero(chosen == bits) for bits in (*_WIDTHS, 16)},
            lowest,
        )

    def spans(self) -> Iterator[tuple[int, Rows, slice]]:
        """Per width that takes bytes: its bits, its columns, and where its bytes lie in a row."""
        start = 0
        for bits in (16, 8, 4, 2, 1):
            if len(columns := self.groups[bits]):
                stop = start + -(-len(columns) * bits // 8)
                yield bits, columns, slice(start, stop)
                start = stop

    @property
    def nbytes(self) -> int:
        """Of a row, without its exceptions."""
        return max((span.stop for _, _, span in self.spans()), default=0)

    def gathered(self) -> Rows:
        """int64 (D + 1,): of each column its place among all that `PackedCodes.take` unpacks.

        The last place, which those without bits share with one column more, holds zeros.
        """
        places, start = np.empty(len(self.lowest) + 1, np.int64), 0
        for bits, columns, span in self.spans():
            places[columns] = start + np.arange(len(columns))
            start += (span.stop - span.start) * 8 // bits
        places[self.groups[0]] = places[-1] = start
        return places

    def pack(self, codes: Codes) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The bytes (n, nbytes) of codes (n, D), and which of these are exceptions."""
        packed = np.empty((len(codes), self.nbytes), np.uint8)
        beyond = np.zeros(codes.shape, bool)
        constant = self.groups[0]
        beyond[:, constant] = codes[:, constant] != self.lowest[constant]
        for bits, columns, span in self.spans():
            if bits == 16:
                packed[:, span] = np.ascontiguousarray(codes[:, columns], "<i2").view(np.uint8)
                continue
            shifted = codes[:, columns] - self.lowest[columns]
            outside = (shifted < 0) | (shifted >= 2**bits)
            shifted[outside] = 0
            beyond[:, columns] = outside
            each, low = 8 // bits, shifted.astype(np.uint8)
            target = packed[:, span]
            target[...] = 0
            for place in range(each):
                part = low[:, place::each]
                target[:, : part.shape[1]] |= part << np.uint8(place * bits)
        return packed, beyond


class PackedCodes:
    """Codes of several views on a device.

    Args:
        sample: int16 (n, D), codes as those to come, at least one row of them: the layout is the
            best for these, and holds any others.
        slots: views that there is memory for.
        rows: N, of each.
        device: where the codes lie and are decoded.
    """

    def __init__(self, sample: Codes, slots: int, rows: int, device: torch.device) -> None:
        self._columns, self._rows = Columns.choose(sample), rows
        self._bytes = torch.empty(
            (slots, rows, self._columns.nbytes), dtype=torch.uint8, device=device
        )
        self._gathered = torch.from_numpy(self._columns.gathered()).to(device)
        lowest = torch.from_numpy(np.append(self._columns.lowest, 0))
        self._lowest = lowest.to(device, torch.float32)
        self._shifts = {
            bits: torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
            for bits, _, _ in self._columns.spans()
            if bits < 8
        }
        # Of each row its exceptions: where they begin among those of its slot, and how many.
        self._starts = torch.zeros((slots, rows), dtype=torch.int32, device=device)
        number = torch.int16 if sample.shape[1] < 2**15 else torch.int32
        self._counts = torch.zeros((slots, rows), dtype=number, device=device)
        self._used = [0] * slots
        self._most = 0
        share = self._columns.pack(sample)[1].sum() / len(sample)
        kind = torch.from_numpy(np.empty(0, _exception(sample.shape[1]))).dtype
        self._exceptions = torch.zeros(
            (slots, int(_SPARE * share * rows)), dtype=kind, device=device
        )

    @property
    def nbytes(self) -> int:
        """Of the memory for all slots."""
        kept = (self._bytes, self._starts, self._counts, self._exceptions)
        return sum(tensor.nbytes for tensor in kept)

    def clear(self, slot: int) -> None:
        """Begin a slot anew."""
        self._used[slot] = 0

    def put(self, slot: int, positions: Positions, codes: Codes) -> None:
        """Keep the codes (n, D) of some rows of a slot, each of which is put once after `clear`."""
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        step = max(1, _AT_ONCE // max(1, codes.shape[1]))
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            self._put(slot, torch.from_numpy(positions[part]), codes[part])

    def _put(self, slot: int, positions: Tensor, codes: Codes) -> None:
        device = self._bytes.device
        positions = positions.to(device)
        packed, beyond = self._columns.pack(codes)
        self._bytes[slot, positions] = torch.from_numpy(packed).to(device)
        rows, columns = np.nonzero(beyond)
        counts = np.bincount(rows, minlength=len(codes))
        begin = self._used[slot]
        starts = begin + np.cumsum(counts) - counts
        self._starts[slot, positions] = torch.from_numpy(starts).to(self._starts)
        self._counts[slot, positions] = torch.from_numpy(counts).to(self._counts)
        if not len(rows):
            return
        kind = _exception(codes.shape[1])
        kept = columns.astype(kind) << 16 | codes[rows, columns].astype(kind) & 0xFFFF
        self._used[slot] = end = begin + len(kept)
        if end > self._exceptions.shape[1]:
            old = self._exceptions
            grown = torch.zeros((len(old), int(_SPARE * end)), dtype=old.dtype, device=device)
            grown[:, : old.shape[1]] = old
            self._exceptions = grown
        self._exceptions[slot, begin:end] = torch.from_numpy(kept).to(device)
        self._most = max(self._most, int(counts.max()))

    def take(self, places: Tensor) -> Tensor:
        """The codes of some rows, whole numbers in float32 (B, D).

        Args:
            places: int64 (B,), slot * N + row.
        """
        packed = self._bytes.flatten(0, 1).index_select(0, places)
        parts = [self._unpacked(packed[:, span], bits) for bits, _, span in self._columns.spans()]
        parts.append(self._lowest.new_zeros((len(places), 1)))
        codes = torch.cat(parts, 1).index_select(1, self._gathered).add_(self._lowest)
        if self._most:
            self._put_exceptions(codes, places)
        return codes[:, :-1]

    def _unpacked(self, packed: Tensor, bits: int) -> Tensor:
        """Codes from the lowest of their columns on, float32 (B, columns) of bytes (B, ...)."""
        if bits == 16:
            # A copy even of a single row, whose stride need not be even.
            return packed.clone(memory_format=torch.contiguous_format).view(torch.int16).float()
        if bits == 8:
            return packed.float()
        fields: Tensor = (packed.unsqueeze(2) >> self._shifts[bits]) & (2**bits - 1)
        return fields.flatten(1).float()

    def _put_exceptions(self, codes: Tensor, places: Tensor) -> None:
        """Put the exceptions of rows where they belong in their codes (B, D + 1).

        Every row is given as many as the row with the most has: what is not its own goes to column D.
        """
        exceptions = self._exceptions  # a further view may make room for more at any time
        slots = places.div(self._rows, rounding_mode="floor")
        first = slots * exceptions.shape[1] + self._starts.view(-1).index_select(0, places)
        count = self._counts.view(-1).index_select(0, places)
        number = torch.arange(self._most, device=places.device)
        own = number < count.unsqueeze(1)
        kept = exceptions.view(-1)[(first.unsqueeze(1) + number).where(own, 0)]
        columns = (kept >> 16).where(own, codes.shape[1] - 1).long()
        signed = ((kept & 0xFFFF) ^ 0x8000) - 0x8000
        codes.scatter_(1, columns, signed.float())


def _exception(columns: int) -> np.dtype[Any]:
    """What holds a column and a code of 16 bits."""
    return np.dtype(np.int32 if columns < 2**15 else np.int64)

"""Rows of a field as they lie in memory, packed, and how a batch of them is decoded on the device.

One class per kind of encoding, in the table `PACKED`. The arrays come from `Store.read_encoded`, which has
checked them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.views.packed_codes import Codes, PackedCodes, Positions
from kdcache_stores import Store
from kdcache_stores.encodings.channels import Channels
from kdcache_stores.encodings.compact import FINE, GAP, signed, used_vectors
from kdcache_stores.encodings.protocol import Array
from kdcache_stores.encodings.quantized import Quantized
from kdcache_stores.encodings.topk import tail
from kdcache_stores.format.header import Field

#: The arrays of some rows, by name.
Arrays = Mapping[str, Array]

_SPOTS = 8
"""Places in a store that a sample of its rows comes from: neighbours may be of one class."""

_SAMPLE = (256, 2**21)
"""Rows of a sample at each spot, and codes in all, at most."""


@dataclass(frozen=True)
class Memory:
    """What there is memory for.

    Args:
        slots: views.
        rows: N, of each.
        device: where it is.
    """

    slots: int
    rows: int
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for a tensor of this shape per row: (slots, N, *shape)."""
        return torch.empty((self.slots, self.rows, *shape), dtype=dtype, device=self.device)

    def codes(self, sample: Codes) -> PackedCodes:
        """Room for codes such as those of a sample."""
        return PackedCodes(sample, self.slots, self.rows, self.device)


@dataclass(frozen=True)
class Packing:
    """How the rows of a field are packed: by its encoding, for codes such as those of a sample of rows.

    Args:
        field: name, shape and encoding.
        shared: its arrays per store.
        sample: the others, of at least one row.
    """

    field: Field
    shared: Arrays
    sample: Arrays

    @classmethod
    def of(cls, store: Store, name: str) -> Packing:
        """That of a field of a store; of one that is stored as floats no row is read.

        Raises `CorruptStore`.
        """
        field = store.fields[name]
        sample = {} if field.encoding.plain else _sample(store, field)
        return cls(field, store.shared_arrays(name), sample)

    def memory(self, slots: int, rows: int, device: torch.device) -> PackedField:
        """Memory for some views of so many rows of the field."""
        return PACKED[self.field.encoding.name](self, Memory(slots, rows, device))


class PackedField(ABC):
    """The rows of one field in several views.

    Args:
        packing: of the field.
        memory: how much there is.
    """

    def __init__(self, packing: Packing, memory: Memory) -> None:
        self.shape, self.memory = packing.field.shape, memory

    @abstractmethod
    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """Keep a view in a slot: pieces of it, each with the positions of its rows."""

    @abstractmethod
    def take(self, places: Tensor) -> Tensor:
        """Decoded rows, float32 (B, *shape).

        Args:
            places: int64 (B,) on the device, slot * N + position.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory of all slots."""

    @property
    def shared_nbytes(self) -> int:
        """Bytes beside them, of what all views share."""
        return 0

    def _put(self, target: Tensor, slot: int, positions: Positions, values: Array) -> None:
        target[slot][positions] = torch.from_numpy(np.ascontiguousarray(values)).to(target)


class PackedFloats(PackedField):
    """Rows of float32 or float16, as they are stored."""

    def __init__(self, packing: Packing, memory: Memory) -> None:
        super().__init__(packing, memory)
        dtype = getattr(torch, packing.field.encoding.name)
        self._values = memory.empty(*self.shape, dtype=dtype)

    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """Copy."""
        for positions, arrays in pieces:
            self._put(self._values, slot, positions, arrays["values"])

    def take(self, places: Tensor) -> Tensor:
        """A cast."""
        return self._values.flatten(0, 1).index_select(0, places).float()

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return self._values.nbytes


class PackedQuantized(PackedField):
    """Codes with the size of their steps and the mean of each row."""

    def __init__(self, packing: Packing, memory: Memory) -> None:
        super().__init__(packing, memory)
        assert isinstance(packing.field.encoding, Quantized)
        self._encoding = packing.field.encoding
        self._codes = memory.codes(_flat(packing.sample["values"]))
        self._scale, self._mean = memory.empty(1), memory.empty(1)

    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """The size of a step is that of the reader, to the last bit."""
        self._codes.clear(slot)
        for positions, arrays in pieces:
            self._codes.put(slot, positions, _flat(arrays["values"]))
            scale = arrays["std"] * np.float32(self._encoding.step)
            self._put(self._scale, slot, positions, scale[:, None])
            self._put(self._mean, slot, positions, arrays["mean"][:, None])

    def take(self, places: Tensor) -> Tensor:
        """Scale and shift."""
        rows = self._codes.take(places).sub(self._encoding.offset)
        rows.mul_(self._scale.flatten(0, 1).index_select(0, places))
        rows.add_(self._mean.flatten(0, 1).index_select(0, places))
        return rows.reshape(len(places), *self.shape)

    @property
    def nbytes(self) -> int:
        """Of the codes, scales and means."""
        return self._codes.nbytes + self._scale.nbytes + self._mean.nbytes


class PackedChannels(PackedField):
    """Codes, each in units of its channel."""

    def __init__(self, packing: Packing, memory: Memory) -> None:
        super().__init__(packing, memory)
        assert isinstance(packing.field.encoding, Channels)
        unit = packing.field.encoding.unit(packing.shared["spread"], self.shape)
        self._unit = torch.from_numpy(unit).to(memory.device)
        self._codes = memory.codes(_flat(packing.sample["values"]))

    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """Pack the codes."""
        self._codes.clear(slot)
        for positions, arrays in pieces:
            self._codes.put(slot, positions, _flat(arrays["values"]))

    def take(self, places: Tensor) -> Tensor:
        """Scale."""
        return self._codes.take(places).reshape(len(places), *self.shape) * self._unit

    @property
    def nbytes(self) -> int:
        """Of the codes."""
        return self._codes.nbytes


class PackedTopK(PackedField):
    """Entries with their classes, and what the tail is given, which the reader works out in float64."""

    def __init__(self, packing: Packing, memory: Memory) -> None:
        super().__init__(packing, memory)
        ids = packing.sample["ids"]
        entries, size = ids.shape[1], ids.dtype.itemsize
        (self._classes,) = self.shape
        self._has_tail = self._classes > entries
        # Not every device can index unsigned integers: their bits lie in signed ones.
        self._kind, self._mask = np.dtype(f"i{size}"), 2 ** (8 * size) - 1
        kind = torch.from_numpy(np.empty(0, self._kind)).dtype
        self._values = memory.empty(entries, dtype=torch.float16)
        self._ids = memory.empty(entries + self._has_tail, dtype=kind)
        self._tail = memory.empty(2 * self._has_tail)

    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """The lower class of the tail is one entry more, after the others."""
        for positions, arrays in pieces:
            ids = arrays["ids"]
            if self._has_tail:
                upper, lower, where = tail(
                    arrays["values"], ids, arrays["mean"], arrays["std"], self._classes
                )
                self._put(self._tail, slot, positions, np.stack([upper, lower], 1))
                ids = np.concatenate([ids, where[:, None].astype(ids.dtype)], 1)
            self._put(self._ids, slot, positions, ids.view(self._kind))
            self._put(self._values, slot, positions, arrays["values"])

    def take(self, places: Tensor) -> Tensor:
        """The tail's upper value everywhere, then the entries and the lower one."""
        entries, ids, tail = (
            tensor.flatten(0, 1).index_select(0, places)
            for tensor in (self._values, self._ids, self._tail)
        )
        values, rows = entries.float(), tail.new_empty((len(places), self._classes))
        if self._has_tail:
            rows[...] = tail[:, :1]
            values = torch.cat([values, tail[:, 1:]], 1)
        return rows.scatter_(1, ids.long() & self._mask, values)

    @property
    def nbytes(self) -> int:
        """Of the entries, their classes and the tails."""
        return self._values.nbytes + self._ids.nbytes + self._tail.nbytes


class PackedCompact(PackedField):
    """Residual codes and moments of each row, codes of each sample's base, and the basis.

    The class that a row's argmax was changed to is one code more, which is zero of most rows.
    """

    def __init__(self, packing: Packing, memory: Memory) -> None:
        super().__init__(packing, memory)
        vectors, sample = used_vectors(packing.shared["basis"]), packing.sample
        self._used = len(vectors)
        self._basis = torch.from_numpy(vectors).to(memory.device)
        self._values = memory.codes(self._codes(sample))
        self._base = replace(memory, slots=1).codes(self._base_codes(sample))
        self._has_base = False
        self._moments = memory.empty(2)

    def _codes(self, arrays: Arrays) -> Codes:
        top = arrays["top"].astype(np.uint16).view(np.int16)
        return np.concatenate([signed(arrays["values"][:, : self._used]), top[:, None]], 1)

    def _base_codes(self, arrays: Arrays) -> Codes:
        return signed(arrays["base"][:, : self._used])

    def load(self, slot: int, pieces: Iterable[tuple[Positions, Arrays]]) -> None:
        """The first view brings the base, which is of all of them."""
        self._values.clear(slot)
        if not self._has_base:
            self._base.clear(0)
        for positions, arrays in pieces:
            self._values.put(slot, positions, self._codes(arrays))
            moments = np.stack([arrays["std"], arrays["mean"]], 1)
            self._put(self._moments, slot, positions, moments)
            if not self._has_base:
                self._base.put(0, positions, self._base_codes(arrays))
        self._has_base = True

    def take(self, places: Tensor) -> Tensor:
        """A gather, an integer addition, a product with the basis, the row's moments, the argmax.

        As the reader decodes a row, but for the last bits of the product, and for which of two other
        classes, equal but for these bits, is the one that gives way to a restored argmax.
        """
        codes = self._values.take(places)
        components = self._base.take(places % self.memory.rows)
        components.add_(codes[:, : self._used], alpha=FINE)
        rows = components @ self._basis
        std, mean = self._moments.flatten(0, 1).index_select(0, places).split(1, dim=1)
        norm = rows.square().mean(1, keepdim=True).sqrt_()
        rows.mul_((std / norm).where(norm > 0, 0)).add_(mean)
        return self._restored(rows, codes[:, self._used :].long() & 0xFFFF, std * (GAP / 2))

    def _restored(self, rows: Tensor, top: Tensor, half: Tensor) -> Tensor:
        """Rows (B, K) with their argmax where `top` (B, 1) names it, by one more than its class."""
        true = (top - 1).clamp_(min=0)
        own = rows.gather(1, true)
        largest, other = rows.scatter(1, true, -math.inf).max(1, keepdim=True)
        named = top > 0
        upper = (torch.maximum(own, largest) + half).where(named, own)
        lower = (torch.minimum(own, largest) - half).where(named, largest)
        return rows.scatter_(1, other, lower).scatter_(1, true, upper)

    @property
    def nbytes(self) -> int:
        """Of the codes and moments."""
        return self._values.nbytes + self._moments.nbytes

    @property
    def shared_nbytes(self) -> int:
        """Of the base and the basis."""
        return self._base.nbytes + self._basis.nbytes


#: How the rows of each encoding lie in memory.
PACKED: dict[str, type[PackedField]] = {
    "float32": PackedFloats,
    "float16": PackedFloats,
    "quantized": PackedQuantized,
    "topk": PackedTopK,
    "compact": PackedCompact,
    "channels": PackedChannels,
}


def _sample(store: Store, field: Field) -> Arrays:
    """Some rows of a field, of the second view, as the first may be unlike the others (`Compact`)."""
    each = max(1, min(_SAMPLE[0], _SAMPLE[1] // (_SPOTS * math.prod(field.shape))))
    firsts = np.linspace(0, max(0, len(store) - each), _SPOTS).astype(np.int64)
    rows = np.unique(firsts[:, None] + np.arange(each))
    views = store.view_range
    return store.read_encoded(views[min(1, len(views) - 1)], rows[rows < len(store)], field.name)


def _flat(codes: Array) -> Codes:
    result: Codes = codes.reshape(len(codes), math.prod(codes.shape[1:]))
    return result

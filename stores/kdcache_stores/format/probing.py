"""Probes: what proves that an item here is the one that the teacher was given."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import DataError
from kdcache_stores.types import Probe

LATTICE = 8
"""Points of an image that are kept along each side."""
VALUES = 64
"""Values of any other item that are kept."""


def make_probe(row: int, view: int, item: NDArray[Any]) -> Probe:
    """The probe of one item, an array of numbers of any shape; images are uint8 (C, H, W)."""
    return Probe(row, view, item_digest(item), _coarse(item))


def item_digest(item: NDArray[Any]) -> str:
    """SHA-256 (hex) of the item's dtype and shape and of its values, little-endian in C order.

    Raises `DataError` for an array that does not hold numbers.
    """
    if item.dtype.kind not in "biuf":
        raise DataError(f"an item that is probed must hold numbers, found {item.dtype}")
    shape = ",".join(map(str, item.shape))
    values = np.ascontiguousarray(item, item.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{item.dtype.name} {shape}\n".encode() + values.tobytes()).hexdigest()


def _coarse(item: NDArray[Any]) -> bytes:
    """A few values: what may differ a little where another decoder or device rounded differently."""
    if item.dtype == np.uint8 and item.ndim == 3:
        _, height, width = item.shape
        y = (2 * np.arange(LATTICE) + 1) * height // (2 * LATTICE)
        x = (2 * np.arange(LATTICE) + 1) * width // (2 * LATTICE)
        return np.ascontiguousarray(item[:, y[:, None], x]).tobytes()
    flat = item.reshape(-1)
    count = min(VALUES, len(flat))
    chosen = (2 * np.arange(count) + 1) * len(flat) // max(2 * count, 1)
    return flat[chosen].astype("<f8").tobytes()

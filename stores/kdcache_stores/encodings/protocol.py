"""What an encoding is: the arrays that it writes, `encode` and `decode`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import DataError

Array = NDArray[Any]
Floats = NDArray[np.float32]
NOTHING: Mapping[str, Array] = MappingProxyType({})
MOST_KL = 1e-2
"""Z-scored KL at tau = 2, nats, that an encoding may lose where nobody chose to lose more."""
DENSE_BYTES = 256 * 2**20
"""No row, and no shard's rows, are larger than this as float32, however small they are encoded."""
NEAR_TIE = 0.05
"""Row standard deviations by which a logit may fall short of the largest and count as that too: a
step of the default `quantized`. Rounding may decide between such classes; none of them is wrong."""


@dataclass(frozen=True)
class ArraySpec:
    """One array that an encoding writes.

    Args:
        name: its name inside the field's group.
        dtype: NumPy name of its data type.
        shape: shape per row.
        fill: what an unwritten region reads as: NaN, or a code that is never valid.
        compressed: by Blosc with zstd, after a byte shuffle.
        columns: a chunk lies column by column (shape (n,)), compressed after a bit shuffle.
        per: "row": of each view; "sample": shared by all views; "store": shared by all rows, a single
            `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | int
    compressed: bool = False
    columns: bool = False
    per: Literal["row", "sample", "store"] = "row"

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes per row."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)


class Encoding(Protocol):
    """Members of an encoding; its dataclass fields are its parameters, kept with the field."""

    name: ClassVar[str]
    since: ClassVar[int]
    """Minor version of the format that brought it."""
    plain: ClassVar[bool]
    """Whether its `values` are the rows themselves, as floats."""

    @property
    def most_kl(self) -> float:
        """Mean Z-scored KL at tau = 2 that logits may lose; a dump that would lose more is refused."""

    @property
    def near_tie(self) -> float:
        """How far, in row standard deviations, the largest logit may lead and still be overtaken."""

    @classmethod
    def parse(cls, parameter: str | None) -> Encoding:
        """From what follows the colon in "name:parameter"; None if there is none."""

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """The arrays written for rows of this shape; raises `UsageError` if it cannot hold them."""

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Arrays per row by name, for finite rows float32 (n, *shape) and labels int64 (n,).

        `shared` holds those per sample, of the same samples, and those per store.
        """

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Fill `out`, float32 (n, *shape), from all arrays; what was never written becomes NaN."""


@runtime_checkable
class CheckedEncoding(Encoding, Protocol):
    """An encoding that the format says more of than decoding needs."""

    def check(self, arrays: Mapping[str, Array], labels: NDArray[np.int64]) -> None:
        """Raises `CorruptStore` unless arrays that `decode` takes are what the format says of them."""


@runtime_checkable
class FittedEncoding(Encoding, Protocol):
    """An encoding with shared arrays: fitted to calibration rows, or taken from view 0."""

    def calibration_samples(self, samples: int, shape: tuple[int, ...]) -> int:
        """How many of `samples` samples `fit` needs, for rows of this shape."""

    def fit(self, rows: Floats) -> dict[str, Array]:
        """Arrays per store, from the rows (v, n, *shape) of n samples in one or two views."""

    def base(self, rows: Floats, shared: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays per sample, from its row of view 0; `shared` holds those per store."""

    def figures(self, shared: Mapping[str, Array]) -> dict[str, float]:
        """What the arrays per store hold, in figures for people."""


def to_float16(rows: Floats) -> NDArray[np.float16]:
    """Rows in half precision; raises `DataError` where a finite value would become infinite."""
    with np.errstate(over="ignore"):
        values = rows.astype(np.float16)
    if not np.isfinite(values).all():
        raise DataError(
            f"{np.abs(rows).max():g} is beyond float16 (65504): use the encoding float32"
        )
    return values

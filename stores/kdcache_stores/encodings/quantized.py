"""Steps in units of the row's own standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import MOST_KL, NEAR_TIE, NOTHING, Array, ArraySpec, Floats
from kdcache_stores.errors import CorruptStore, DataError, UsageError


@dataclass(frozen=True)
class Quantized:
    """Uniform steps in units of the row's own standard deviation, entropy-coded by the compressor.

    A code c stands for mean + std * step * (c - offset). Mean and (biased) standard deviation are
    those of the row before it was rounded. The offset puts nearly all codes into the low byte, so
    that the high bytes cost next to nothing.

    Args:
        step: size of a step in standard deviations, 0.001 to 1.
    """

    name: ClassVar[str] = "quantized"
    since: ClassVar[int] = 0
    plain: ClassVar[bool] = False
    most_kl: ClassVar[float] = MOST_KL
    step: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.step, float) or not 0.001 <= self.step <= 1:
            raise UsageError(f"the step of quantized must be 0.001 to 1, found {self.step!r}")

    @classmethod
    def parse(cls, parameter: str | None) -> Quantized:
        """Takes the step."""
        try:
            return cls() if parameter is None else cls(float(parameter))
        except ValueError:
            raise UsageError(
                f"the step of quantized must be 0.001 to 1, found {parameter!r}"
            ) from None

    @property
    def near_tie(self) -> float:
        """One step, as far as rounding may move a value, but no less than the usual near tie."""
        return max(NEAR_TIE, self.step)

    @property
    def offset(self) -> int:
        """The code of the row's mean: four standard deviations above zero."""
        return round(4 / self.step)

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`, the codes, and `mean` and `std` of each row."""
        largest = math.sqrt(math.prod(shape)) / self.step  # no value is further from the mean
        if largest + self.offset > 2**15 - 1:
            raise UsageError(f"steps of {self.step} are too small for rows of shape {shape}")
        return (
            ArraySpec("values", "int16", shape, -(2**15), compressed=True),
            ArraySpec("mean", "float32", (), np.nan, compressed=True),
            ArraySpec("std", "float32", (), np.nan, compressed=True),
        )

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Round to the nearest step, ties to even."""
        flat = rows.reshape(len(rows), -1).astype(np.float64)
        mean, std = flat.mean(axis=1), flat.std(axis=1)
        if std.size and not std.max() < np.finfo(np.float32).max:
            raise DataError("the spread of a row is beyond float32: use another encoding")
        flat -= mean[:, None]
        scale = np.where(std > 0, self.step * std, 1.0)
        codes = np.rint(flat / scale[:, None]) + self.offset
        return {
            "values": codes.astype(np.int16).reshape(rows.shape),
            "mean": mean.astype(np.float32),
            "std": std.astype(np.float32),
        }

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Steps from the mean; raises `CorruptStore` for a standard deviation below zero."""
        codes = arrays["values"]
        if arrays["std"].min(initial=0) < 0:
            raise CorruptStore(f"quantized: a standard deviation of {arrays['std'].min():g}")
        ones = (1,) * (codes.ndim - 1)
        np.subtract(codes, self.offset, out=out, dtype=np.float32)
        out *= (arrays["std"] * np.float32(self.step)).reshape(-1, *ones)
        out += arrays["mean"].reshape(-1, *ones)
        if codes.min(initial=0) == -(2**15):
            out[codes == -(2**15)] = np.nan

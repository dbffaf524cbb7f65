"""Features in uniform steps of each channel's spread, which is shared by the whole store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import MOST_KL, NEAR_TIE, NOTHING, Array, ArraySpec, Floats
from kdcache_stores.errors import CorruptStore, DataError, UsageError

_FILL = -(2**15)
_MOST = 2**15 - 1
"""The largest code."""
_SAMPLES = 256
"""Calibration rows at most: a channel's spread needs no more."""
_OF_SIZE = 1 / 64
"""A spread is at least this fraction of the channel's root mean square: one that hardly moves about a
large value stays within the range of codes."""
_RANGE = 64
"""Every channel holds values up to this many typical spreads, also one that hardly moved where the
encoding was fitted."""


@dataclass(frozen=True)
class Channels:
    """Uniform steps in units of each channel's spread, entropy-coded by the compressor.

    A code c stands for spread * step * c, and zero for zero, so that what a ReLU cut off costs next
    to nothing. The channel of a value is its place on the only axis of (D,), the last of (T, D) and
    the first of (C, H, W). Its spread is the standard deviation over the calibration rows, or a little
    more, so that the codes have room (`_OF_SIZE`, `_RANGE`).

    Args:
        step: size of a step in spreads, 0.005 to 1. Of a resnet20 on CIFAR-100 the last map, 8,192 bytes in
            float16, takes 2,103 at 0.05 with a relative squared error of 9e-5, and the pooled features,
            128 bytes, take 59 at 0.02, from which its head gives the logits at a KL of 2.8e-5 (T=1).
    """

    name: ClassVar[str] = "channels"
    since: ClassVar[int] = 1
    plain: ClassVar[bool] = False
    most_kl: ClassVar[float] = MOST_KL
    step: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.step, float) or not 0.005 <= self.step <= 1:
            raise UsageError(f"the step of channels must be 0.005 to 1, found {self.step!r}")

    @classmethod
    def parse(cls, parameter: str | None) -> Channels:
        """Takes the step."""
        try:
            return cls() if parameter is None else cls(float(parameter))
        except ValueError:
            raise UsageError(
                f"the step of channels must be 0.005 to 1, found {parameter!r}"
            ) from None

    @property
    def near_tie(self) -> float:
        """One step, as far as rounding may move a value, but no less than the usual near tie."""
        return max(NEAR_TIE, self.step)

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`, the codes, per row; `spread` of each channel per store."""
        if len(shape) > 3:
            raise UsageError(
                f"channels needs rows of shape (D,), (T, D) or (C, H, W), not {shape}: use float16"
            )
        return (
            ArraySpec("values", "int16", shape, _FILL, compressed=True),
            ArraySpec(
                "spread", "float32", (shape[_axis(shape)],), np.nan, compressed=True, per="store"
            ),
        )

    def calibration_samples(self, samples: int, shape: tuple[int, ...]) -> int:
        """The same few, whatever the shape."""
        return min(samples, _SAMPLES)

    def fit(self, rows: Floats) -> dict[str, Array]:
        """`spread`, from the rows (v, n, *shape) of n samples in one or two views."""
        axis = 2 + _axis(rows.shape[2:])
        others = tuple(a for a in range(rows.ndim) if a != axis)
        exact = rows.astype(np.float64)
        spread = exact.std(axis=others)
        size = np.sqrt(np.square(exact).mean(axis=others))
        typical = np.sqrt(np.square(spread).mean())
        least = _RANGE * typical / (_MOST * self.step)
        spread = np.maximum(np.maximum(spread, _OF_SIZE * size), least)
        spread[spread == 0] = 1.0  # of a field that is zero wherever it was looked at
        bounds = np.finfo(np.float32)
        if not bounds.tiny <= spread.min() <= spread.max() <= bounds.max:
            raise DataError(
                f"channels have spreads from {spread.min():g} to {spread.max():g}, beyond float32: "
                "use float32"
            )
        return {"spread": spread.astype(np.float32)}

    def figures(self, shared: Mapping[str, Array]) -> dict[str, float]:
        """How many `channels`, and their `least`, `median` and `most` spread."""
        spread = shared["spread"]
        least, median, most = (float(np.quantile(spread, q)) for q in (0, 0.5, 1))
        return {"channels": len(spread), "least": least, "median": median, "most": most}

    def base(self, rows: Floats, shared: Mapping[str, Array]) -> dict[str, Array]:
        """Nothing is kept per sample."""
        return {}

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Round to the nearest step, ties to even."""
        unit = self.unit(shared["spread"], rows.shape[1:])
        codes = np.rint(rows / unit.astype(np.float64))
        if not (inside := np.abs(codes) <= _MOST).all():
            place = tuple(int(i) for i in np.argwhere(~inside)[0])
            raise DataError(
                f"{rows[place]:g} at {place[1:]} is {codes[place] * self.step:.3g} times the spread of "
                f"its channel, more than {_MOST} steps of {self.step:g}: use a larger step, or float16"
            )
        return {"values": codes.astype(np.int16)}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Steps from zero; raises `CorruptStore` for a spread that no writer writes."""
        codes, spread = arrays["values"], arrays["spread"]
        if not (np.isfinite(spread) & (spread > 0)).all():
            raise CorruptStore(
                f"channels: spreads from {spread.min():g} to {spread.max():g}, expected positive "
                "and finite ones"
            )
        with np.errstate(over="ignore"):  # the reader looks for what is not finite
            np.multiply(codes, self.unit(spread, out.shape[1:]), out=out)
        if codes.min(initial=0) == _FILL:
            out[codes == _FILL] = np.nan

    def unit(self, spread: Array, shape: tuple[int, ...]) -> Floats:
        """One step of each channel, float32, of a shape that rows broadcast with."""
        lengths = [1] * len(shape)
        lengths[_axis(shape)] = shape[_axis(shape)]
        result: Floats = (spread * np.float32(self.step)).reshape(lengths)
        return result


def _axis(shape: tuple[int, ...]) -> int:
    """The axis of a row that its channels lie along."""
    return 0 if len(shape) == 3 else len(shape) - 1

"""The encodings that there are, by name.

To add one: a frozen dataclass with the members of `Encoding`, its parameters as its fields, and its
name in `ENCODINGS`. Nothing else in the package knows one encoding from another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.canonical import Json
from kdcache_stores.compact import Compact
from kdcache_stores.encoding import (
    MOST_KL,
    NEAR_TIE,
    NOTHING,
    Array,
    ArraySpec,
    Encoding,
    Floats,
    to_float16,
)
from kdcache_stores.errors import DataError, FormatError, UnknownName, UsageError
from kdcache_stores.topk import TopK


@dataclass(frozen=True)
class Float32:
    """The rows as they are."""

    name: ClassVar[str] = "float32"
    most_kl: ClassVar[float] = MOST_KL
    near_tie: ClassVar[float] = NEAR_TIE

    @classmethod
    def parse(cls, parameter: str | None) -> Float32:
        """Takes no parameter."""
        _no_parameter(cls.name, parameter)
        return cls()

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`."""
        return (ArraySpec("values", "float32", shape, np.nan),)

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], once: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """The rows themselves."""
        return {"values": rows}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Copy."""
        np.copyto(out, arrays["values"])


@dataclass(frozen=True)
class Float16:
    """The rows rounded to half precision; values beyond its range are refused."""

    name: ClassVar[str] = "float16"
    most_kl: ClassVar[float] = MOST_KL
    near_tie: ClassVar[float] = NEAR_TIE

    @classmethod
    def parse(cls, parameter: str | None) -> Float16:
        """Takes no parameter."""
        _no_parameter(cls.name, parameter)
        return cls()

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`."""
        return (ArraySpec("values", "float16", shape, np.nan),)

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], once: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Round to nearest even."""
        return {"values": to_float16(rows)}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Widen."""
        np.copyto(out, arrays["values"])


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
        """A step: whoever chooses it has rows rounded by that."""
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
        self, rows: Floats, labels: NDArray[np.int64], once: Mapping[str, Array] = NOTHING
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
        """Steps from the mean."""
        codes = arrays["values"]
        ones = (1,) * (codes.ndim - 1)
        np.subtract(codes, self.offset, out=out, dtype=np.float32)
        out *= (arrays["std"] * np.float32(self.step)).reshape(-1, *ones)
        out += arrays["mean"].reshape(-1, *ones)
        if codes.min(initial=0) == -(2**15):
            out[codes == -(2**15)] = np.nan


ENCODINGS: dict[str, type[Encoding]] = {
    "float32": Float32,
    "float16": Float16,
    "quantized": Quantized,
    "topk": TopK,
    "compact": Compact,
}


def make_encoding(text: str) -> Encoding:
    """The encoding named by "float16", "topk:10", "compact:3e-4"; raises `UnknownName`."""
    name, _, parameter = text.partition(":")
    if name not in ENCODINGS:
        raise UnknownName("encoding", name, ENCODINGS)
    return ENCODINGS[name].parse(parameter if ":" in text else None)


def encoding_to_dict(encoding: Any) -> dict[str, Json]:
    """Name and parameters, plain JSON."""
    return {"name": encoding.name, **asdict(encoding)}


def encoding_from_dict(value: Json, where: str) -> Encoding:
    """The inverse of `encoding_to_dict`; raises `FormatError`, also for an unknown encoding."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise FormatError(f"{where}: expected an encoding with a name, found {value!r:.80}")
    if value["name"] not in ENCODINGS:
        raise FormatError(
            f"{where}: encoding {value['name']!r:.40} is not known to this kdcache "
            f"({', '.join(ENCODINGS)}): a newer version may read it"
        )
    parameters = {key: item for key, item in value.items() if key != "name"}
    try:
        return ENCODINGS[value["name"]](**parameters)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: wrong parameters of {value['name']}: {error}") from None


def _no_parameter(name: str, parameter: str | None) -> None:
    if parameter is not None:
        raise UsageError(f"encoding {name} takes no parameter, found {parameter!r}")

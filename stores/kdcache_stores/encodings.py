"""How rows become arrays and back. An encoding is the arrays it writes, `encode` and `decode`.

To add one: a frozen dataclass with the members of `Encoding`, and its name in `ENCODINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.canonical import Json
from kdcache_stores.errors import DataError, FormatError, UnknownName, UsageError

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ArraySpec:
    """One array that an encoding writes.

    Args:
        name: its name inside the field's group.
        dtype: NumPy name of its data type.
        shape: shape per row.
        fill: what an unwritten region reads as: NaN, or a code that is never valid.
        compressor: None or "zstd" (with byte shuffle, by Blosc).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | int
    compressor: str | None = None

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes per row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class Encoding(Protocol):
    """Members of an encoding; its dataclass fields are its parameters, kept with the field."""

    name: ClassVar[str]

    @classmethod
    def parse(cls, parameter: str | None) -> Encoding:
        """From what follows the colon in "name:parameter"; None if there is none."""

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """The arrays written for rows of this shape; raises `UsageError` if it cannot hold them."""

    def encode(self, rows: Floats, labels: NDArray[np.int64]) -> dict[str, Array]:
        """Arrays by name for finite rows float32 (n, *shape) and labels int64 (n,)."""

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Fill `out`, float32 (n, *shape); unwritten or invalid codes become NaN."""


@dataclass(frozen=True)
class Float32:
    """The rows as they are."""

    name: ClassVar[str] = "float32"

    @classmethod
    def parse(cls, parameter: str | None) -> Float32:
        """Takes no parameter."""
        _no_parameter(cls.name, parameter)
        return cls()

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`."""
        return (ArraySpec("values", "float32", shape, np.nan),)

    def encode(self, rows: Floats, labels: NDArray[np.int64]) -> dict[str, Array]:
        """The rows themselves."""
        return {"values": rows}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Copy."""
        np.copyto(out, arrays["values"])


@dataclass(frozen=True)
class Float16:
    """The rows rounded to half precision; values beyond its range are refused."""

    name: ClassVar[str] = "float16"

    @classmethod
    def parse(cls, parameter: str | None) -> Float16:
        """Takes no parameter."""
        _no_parameter(cls.name, parameter)
        return cls()

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`."""
        return (ArraySpec("values", "float16", shape, np.nan),)

    def encode(self, rows: Floats, labels: NDArray[np.int64]) -> dict[str, Array]:
        """Round to nearest even."""
        return {"values": to_float16(rows)}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Widen."""
        np.copyto(out, arrays["values"])


def to_float16(rows: Floats) -> NDArray[np.float16]:
    """Rows in half precision; raises `DataError` where a finite value would become infinite."""
    with np.errstate(over="ignore"):
        values = rows.astype(np.float16)
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise DataError(
            f"row {row} holds {np.abs(rows[row]).max():g}, beyond float16 (65504): use float32"
        )
    return values


ENCODINGS: dict[str, type[Encoding]] = {
    "float32": Float32,
    "float16": Float16,
}


def make_encoding(text: str) -> Encoding:
    """The encoding named by "float16", "quantized:0.05", "topk:10"; raises `UnknownName`."""
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

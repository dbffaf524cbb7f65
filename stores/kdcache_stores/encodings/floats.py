"""Rows kept as floats: `float32` as they are, `float16` rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import (
    MOST_KL,
    NEAR_TIE,
    NOTHING,
    Array,
    ArraySpec,
    Floats,
    to_float16,
)
from kdcache_stores.errors import UsageError


@dataclass(frozen=True)
class Float32:
    """The rows as they are."""

    name: ClassVar[str] = "float32"
    since: ClassVar[int] = 0
    plain: ClassVar[bool] = True
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
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
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
    since: ClassVar[int] = 0
    plain: ClassVar[bool] = True
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
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Round to nearest even."""
        return {"values": to_float16(rows)}

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Widen."""
        np.copyto(out, arrays["values"])


def _no_parameter(name: str, parameter: str | None) -> None:
    if parameter is not None:
        raise UsageError(f"encoding {name} takes no parameter, found {parameter!r}")

"""Whole rows for the price of a few entries: a basis over classes, a base per sample, residuals.

Logits of one teacher are correlated across classes, and those of one sample hardly change across
its views. So a Z-scored row is written in a basis of principal components, as integers; what the
sample's first view says (its base) is kept once, and every view keeps the small difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encoding import NOTHING, Array, ArraySpec, Floats
from kdcache_stores.errors import CorruptStore, DataError, UsageError
from kdcache_stores.fidelity import kl, standardize

MOST_COMPONENTS = 1024
"""Components kept at most, whatever the number of classes."""
_FINE = 2
"""Steps of the base in one step of a residual: the base is shared by all views, so its rounding is
an error of all of them, and its bits are paid once."""
_ROUND = 0.4
"""A residual is rounded away from zero beyond a fraction of 0.6: zeros are cheap (a dead zone)."""
_GAP = 2.0**-15
"""By how much, in row standard deviations, a restored argmax leads."""
_FILL = 2**16 - 1
_TAU = 2.0


@dataclass(frozen=True)
class Compact:
    """Z-scored rows as integer components: difference to a base per sample, exact moments.

    With z the row's Z-scores and u_j orthonormal components, c_j = (u_j . z) / s. The base b holds
    the rounded c of view 0, `values` the rounded (c - b) / 2, `basis` the vectors s u_j. The size s
    of a step is the largest that meets the target on the rows that `learn` is given. By reverse
    water-filling the same step for every component is the best (Cover & Thomas, Elements of
    Information Theory, ch. 10.3.3); components below it come out as zeros.

    A decoded row has exactly the mean and standard deviation of the live one (in float32), as the
    decoded z is scaled to unit variance, and its argmax: where rounding changed that, `top` keeps
    the class plus one, and decoding swaps it with the largest.

    Args:
        kl: target mean KL(live || decoded) in nats between Z-scored rows at temperature 2.
    """

    name: ClassVar[str] = "compact"
    kl: float = 3e-4

    def __post_init__(self) -> None:
        if not isinstance(self.kl, float) or not 1e-6 <= self.kl <= 0.1:
            raise UsageError(f"the target KL of compact must be 1e-6 to 0.1, found {self.kl!r}")

    @classmethod
    def parse(cls, parameter: str | None) -> Compact:
        """Takes the target KL."""
        try:
            return cls() if parameter is None else cls(float(parameter))
        except ValueError:
            raise UsageError(
                f"the target KL of compact must be 1e-6 to 0.1, found {parameter!r}"
            ) from None

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values`, `mean`, `std`, `top` per row; `base` per sample; `basis` once."""
        if len(shape) != 1 or shape[0] >= 2**16 - 1:
            raise UsageError(f"compact needs rows of at most 65534 logits, not of shape {shape}")
        components = (_components(shape[0]),)
        top = str(np.min_scalar_type(shape[0] + 1))
        return (
            ArraySpec("values", "uint16", components, _FILL, columns=True),
            ArraySpec("mean", "float32", (), np.nan, compressed=True),
            ArraySpec("std", "float32", (), np.nan, compressed=True),
            ArraySpec("top", top, (), int(np.iinfo(top).max), compressed=True),
            ArraySpec("base", "uint16", components, _FILL, columns=True, per="sample"),
            ArraySpec("basis", "float32", (*components, *shape), np.nan, per="store"),
        )

    # ---- once ------------------------------------------------------------------------------------

    def learn(self, rows: Floats) -> dict[str, Array]:
        """`basis`, from the rows (v, n, K) of n samples in one or two views.

        Raises `DataError` if no step meets the target.
        """
        classes = rows.shape[-1]
        views = [standardize(view.astype(np.float64)) for view in rows]
        moved = views[-1] - views[0]
        # What every view pays for decides; the base, paid once, breaks ties.
        spread = moved.T @ moved + 0.01 * views[0].T @ views[0]
        # Directions that these rows do not show come last, but before the mean, which is kept apart.
        spread += (1e-9 * np.trace(spread) + 1e-12) * (np.eye(classes) - 1 / classes)
        vectors = np.linalg.eigh(spread)[1][:, ::-1].T[: _components(classes)]
        largest = np.abs(vectors).argmax(axis=1)
        vectors = vectors * np.sign(vectors[np.arange(len(vectors)), largest])[:, None]
        first, last = (view @ vectors.T for view in (views[0], views[-1]))

        def reached(step: float) -> float:
            base = np.rint(first / step)
            decoded = (base + _FINE * _residual(last / step, base)) * step @ vectors
            return float(kl(views[-1] / _TAU, standardize(decoded) / _TAU).mean())

        step = low = max(1e-3, math.sqrt(classes) / 2**13)
        if (best := reached(low)) > self.kl:
            raise DataError(
                f"compact cannot reach a KL of {self.kl:g} on these logits, just {best:.2g}: ask "
                "for more, or use float16"
            )
        high = 4.0
        while high / low > 1.005:
            step = math.sqrt(low * high)
            low, high = (step, high) if reached(step) <= self.kl else (low, step)
        codes = np.abs(np.stack([first, last])).max(axis=(0, 1)) / low
        # What thousands of rows never use, no row needs; of what few rows say, nothing is certain.
        used = vectors[codes >= 0.5] if rows.shape[1] >= 4 * classes else vectors
        basis = np.zeros((_components(classes), classes), np.float32)
        basis[: len(used)] = low * used
        return {"basis": basis}

    def base(self, rows: Floats, once: Mapping[str, Array]) -> dict[str, Array]:
        """`base` of each sample, from its row (n, K) of view 0."""
        codes = np.zeros((len(rows), len(once["basis"])), np.int64)
        components = _project(standardize(rows.astype(np.float64)), once["basis"])
        codes[:, : components.shape[1]] = np.rint(components)
        return {"base": _zigzag(codes)}

    # ---- rows ------------------------------------------------------------------------------------

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], once: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Statistics from the unrounded row, in float64."""
        exact = rows.astype(np.float64)
        mean, std = exact.mean(axis=1), exact.std(axis=1)
        if std.size and not std.max() < np.finfo(np.float32).max:
            raise DataError("the spread of a row is beyond float32: use another encoding")
        components = _project(standardize(exact), once["basis"])
        codes = np.zeros(once["base"].shape, np.int64)
        used = components.shape[1]
        codes[:, :used] = _residual(components, _signed(once["base"][:, :used]))
        top = self.arrays(rows.shape[1:])[3].dtype
        encoded: dict[str, Array] = {
            "values": _zigzag(codes),
            "mean": _no_finer(mean, std).astype(np.float32),
            "std": std.astype(np.float32),
            "top": np.zeros(len(rows), top),
        }
        # Rows of which rounding changed the argmax, or may change it on another machine.
        decoded = np.empty_like(rows)
        self.decode({**encoded, **once}, decoded)
        numbers, live = np.arange(len(rows)), rows.argmax(axis=1)
        lead = decoded[numbers, live].copy()
        decoded[numbers, live] = -np.inf
        wrong = (lead - decoded.max(axis=1) < std * _GAP / 2) & (rows.shape[1] > 1) & (std > 0)
        encoded["top"][wrong] = (live + 1)[wrong]
        return encoded

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Base plus residual in the basis, scaled to the row's moments; then the argmax."""
        if _FILL in (arrays["values"].max(initial=0), arrays["base"].max(initial=0)):
            raise CorruptStore("compact: codes that were never written")
        basis = arrays["basis"]
        basis = basis[basis.any(axis=1)]
        used = len(basis)
        codes = _signed(arrays["base"][:, :used]) + _FINE * _signed(arrays["values"][:, :used])
        np.matmul(codes.astype(np.float32), basis, out=out)
        norm = np.sqrt(np.einsum("ij,ij->i", out, out) / np.float32(out.shape[1]))
        out *= np.divide(arrays["std"], norm, out=np.zeros_like(norm), where=norm > 0)[:, None]
        out += arrays["mean"][:, None]
        rows = np.flatnonzero(arrays["top"])
        true = arrays["top"][rows].astype(np.int64) - 1
        if true.size and int(true.max()) >= out.shape[1]:
            raise CorruptStore(f"compact: class {true.max()} is not below {out.shape[1]}")
        here = out[rows, true]
        out[rows, true] = -np.inf
        other = out[rows].argmax(axis=1)
        there = out[rows, other]
        half = arrays["std"][rows] * np.float32(_GAP / 2)
        out[rows, true] = np.maximum(here, there) + half
        out[rows, other] = np.minimum(here, there) - half


def _no_finer(mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means rounded to a float32 unit of the standard deviation: a row's values hold no more."""
    unit = np.ldexp(1.0, np.frexp(std)[1] - 24)
    return np.where(std > 0, np.rint(mean / unit) * unit, mean)


def _components(classes: int) -> int:
    return max(1, min(classes - 1, MOST_COMPONENTS))


def _project(standard: NDArray[np.float64], basis: Array) -> NDArray[np.float64]:
    """Components of Z-scored rows (n, K) in steps; (n, C) for the C vectors that are not zero."""
    vectors = basis[basis.any(axis=1)].astype(np.float64)
    result: NDArray[np.float64] = standard @ (vectors / (vectors**2).sum(axis=1, keepdims=True)).T
    return result


def _residual(components: NDArray[np.float64], base: Array) -> NDArray[np.float64]:
    """Steps of `_FINE` from the base, rounded with a dead zone."""
    off = (components - base) / _FINE
    result: NDArray[np.float64] = np.copysign(np.floor(np.abs(off) + _ROUND), off)
    return result


def _zigzag(codes: NDArray[np.int64]) -> NDArray[np.uint16]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: bits of small codes are zero, whatever their sign."""
    if codes.size and not -(2**14) < codes.min() <= codes.max() < 2**14:
        raise DataError("a row is too far from those that the basis was learned from: use float16")
    return ((codes << 1) ^ (codes >> 63)).astype(np.uint16)


def _signed(codes: Array) -> NDArray[np.int32]:
    """The inverse of `_zigzag`."""
    wide = codes.astype(np.int32)
    return (wide >> 1) ^ -(wide & 1)

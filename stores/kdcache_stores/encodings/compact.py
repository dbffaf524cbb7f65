"""Whole rows for the price of a few entries: a basis over classes, a base per sample, residuals.

Logits of one teacher are correlated across classes, and those of one sample hardly change across
its views. So a Z-scored row is written in a basis of principal components, as integers; the integers of
the sample's first view (its base) are shared by all views, and every view keeps the small difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.fidelity import kl, standardize
from kdcache_stores.encodings.protocol import MOST_KL, NEAR_TIE, NOTHING, Array, ArraySpec, Floats
from kdcache_stores.errors import CorruptStore, DataError, UsageError

MOST_COMPONENTS = 1024
"""Components kept at most, whatever the number of classes."""
FINE = 2
"""Steps of the base in one step of a residual: the base is shared by all views, so its rounding is
an error of all of them, and its bits are paid once."""
_ROUND = 0.4
"""A residual is rounded away from zero beyond a fraction of 0.6: zeros are cheap (a dead zone)."""
GAP = 2.0**-15
"""By how much, in row standard deviations, a restored argmax leads."""
_BITS = 16
"""Of a row's std and mean: finer than rows of float16 keep them, thousands of times finer than a
step, and all further bits would be noise that does not compress."""
_FILL = 2**16 - 1
_MOST = 2**13
"""The largest coefficient: base and residual add up within 16 bits. The length of a Z-scored row is
the root of its classes, so a step of that root over this is small enough for every row."""
_STEPS = (1e-3, 4.0)
"""Sizes of a step, at least and at most."""
_TAU = 2.0
_SIDE = 2048
"""Classes up to which the basis comes from a matrix of classes; beyond, from one of calibration rows, of
which two views of half as many as there are components give all components."""
_MEASURED = 2**22
"""Logits that a step is tried on at most: 4,096 samples of 1,024 classes, 64 of 65,534."""
_FOLDS = 4
"""Parts of the calibration rows, each of which is coded in the directions of the others to try a step."""
_CALIBRATION = (256, 1024)
"""Samples at least and at most that the basis is fitted to. At 8 views of 100 classes, 256 cost 2.7% of
the bytes over 4,096, and 1,024 cost 0.4%."""

Reals = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Compact:
    """Z-scored rows as integer components: difference to a base per sample, exact moments.

    With z the row's Z-scores and u_j orthonormal components, c_j = (u_j . z) / s. The base b holds
    the rounded c of view 0, `values` the rounded (c - b) / 2, `basis` the vectors s u_j. The size s
    of a step is the largest that meets the target on the rows that `fit` is given. By reverse
    water-filling the same step for every component is the best (Cover & Thomas, Elements of
    Information Theory, ch. 10.3.3); components below it come out as zeros.

    A decoded row has the mean and standard deviation of the live one, to 2**-16 of the latter, as
    the decoded z is scaled to unit variance; and its argmax: where rounding changed that, `top` keeps
    the class plus one, and decoding swaps it with the largest.

    Args:
        kl: target mean KL(live || decoded) in nats between Z-scored rows at temperature 2.
    """

    name: ClassVar[str] = "compact"
    since: ClassVar[int] = 0
    plain: ClassVar[bool] = False
    near_tie: ClassVar[float] = NEAR_TIE
    kl: float = 3e-4

    @property
    def most_kl(self) -> float:
        """Twice the target, where that is more than other encodings may lose."""
        return max(MOST_KL, 2 * self.kl)

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
        """`values`, `mean`, `std`, `top` per row; `base` per sample; `basis` per store."""
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
            ArraySpec("basis", "float32", (*components, *shape), np.nan, True, per="store"),
        )

    # ---- shared ----------------------------------------------------------------------------------

    def calibration_samples(self, samples: int, shape: tuple[int, ...]) -> int:
        """An eighth of them, so that two more views of these hardly lengthen a dump.

        Where there are many, enough to tell which directions of the classes are never used.
        """
        least, most = _CALIBRATION
        most = max(most, 4 * shape[0]) if shape[0] <= _SIDE else MOST_COMPONENTS // 2
        return min(max(samples // 8, least), most, samples)

    def fit(self, rows: Floats) -> dict[str, Array]:
        """`basis`, from the rows (v, n, K) of n samples in one or two views.

        Raises `DataError` if no step meets the target.
        """
        classes = rows.shape[-1]
        first, last = (standardize(rows[view].astype(np.float64)) for view in (0, -1))
        vectors: Reals
        if classes <= _SIDE:
            vectors = _directions(first, last - first)
        else:
            vectors = _directions_of_rows(first, last - first)
        largest = np.abs(vectors).argmax(axis=1)
        vectors *= np.sign(vectors[np.arange(len(vectors)), largest])[:, None]
        tried = _trials(vectors, first, last)

        def reached(step: float) -> float:
            return float(np.concatenate([trial.losses(step) for trial in tried]).mean())

        low, high = max(_STEPS[0], math.sqrt(classes) / _MOST), _STEPS[1]
        if (best := reached(low)) > self.kl:
            raise DataError(
                f"compact cannot reach a KL of {self.kl:g} on these logits, just {best:.2g}: ask "
                "for more, or use float16"
            )
        while high / low > 1.005:
            step = math.sqrt(low * high)
            low, high = (step, high) if reached(step) <= self.kl else (low, step)
        codes = np.abs(_along(np.concatenate([first, last]), vectors)).max(axis=0) / low
        # Rows that leave a third of what they could span unused do not need it; of fewer rows
        # nothing is certain.
        if 3 * (codes >= 0.5).sum() <= 2 * rows.shape[1]:
            vectors = vectors[codes >= 0.5]
        basis = np.zeros((_components(classes), classes), np.float32)
        basis[: len(vectors)] = low * vectors
        return {"basis": basis}

    def figures(self, shared: Mapping[str, Array]) -> dict[str, float]:
        """`components` kept, of how many `directions`, and the `step` in row standard deviations."""
        vectors = used_vectors(shared["basis"])
        step = float(np.linalg.norm(vectors[0])) if len(vectors) else 0.0
        return {"components": len(vectors), "directions": len(shared["basis"]), "step": step}

    def base(self, rows: Floats, shared: Mapping[str, Array]) -> dict[str, Array]:
        """`base` of each sample, from its row (n, K) of view 0."""
        codes = np.zeros((len(rows), len(shared["basis"])), np.int16)
        components = _project(_moments(rows)[2], shared["basis"])
        codes[:, : components.shape[1]] = _whole(np.rint(components))
        return {"base": _zigzag(codes)}

    # ---- rows ------------------------------------------------------------------------------------

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Statistics from the unrounded row, in float64."""
        mean, std, standard = _moments(rows)
        moments = {"mean": _rounded(mean, std), "std": _rounded(std, std)}
        if not all(np.isfinite(values).all() for values in moments.values()):
            raise DataError("the mean or std of a row is beyond float32: use another encoding")
        components = _project(standard, shared["basis"])
        codes = np.zeros(shared["base"].shape, np.int16)
        used = components.shape[1]
        codes[:, :used] = _whole(_residual(components, signed(shared["base"][:, :used])))
        top = self.arrays(rows.shape[1:])[3].dtype
        encoded: dict[str, Array] = {
            "values": _zigzag(codes),
            **moments,
            "top": np.zeros(len(rows), top),
        }
        # Rows of which rounding changed the argmax, or may change it on another machine.
        decoded = np.empty_like(rows)
        self.decode({**encoded, **shared}, decoded)
        numbers, live = np.arange(len(rows)), rows.argmax(axis=1)
        lead = decoded[numbers, live]
        decoded[numbers, live] = -np.inf
        wrong = (lead - decoded.max(axis=1) < std * GAP / 2) & (rows.shape[1] > 1) & (std > 0)
        encoded["top"][wrong] = (live + 1)[wrong]
        return encoded

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """Base plus residual in the basis, scaled to the row's moments; then the argmax.

        Raises `CorruptStore` for what no writer writes.
        """
        basis, std = used_vectors(arrays["basis"]), arrays["std"]
        if std.min(initial=0) < 0:
            raise CorruptStore(f"compact: a standard deviation of {std.min():g}")
        used = len(basis)
        base, values = arrays["base"][:, :used], arrays["values"][:, :used]
        if (code := max(int(base.max(initial=0)), int(values.max(initial=0)))) > 2 * _MOST:
            raise CorruptStore(f"compact: a code of {code}, beyond {2 * _MOST}, or never written")
        codes = signed(values)
        codes *= FINE
        codes += signed(base)
        np.matmul(codes.astype(np.float32), basis, out=out)
        norm = np.sqrt(np.einsum("ij,ij->i", out, out) / np.float32(out.shape[1]))
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # the reader looks for what is not finite
            out *= np.divide(std, norm, out=np.zeros_like(norm), where=norm > 0)[:, None]
            out += arrays["mean"][:, None]
        rows = np.flatnonzero(arrays["top"])
        true = arrays["top"][rows].astype(np.int64) - 1
        if true.size and int(true.max()) >= out.shape[1]:
            raise CorruptStore(f"compact: class {true.max()} is not below {out.shape[1]}")
        own = out[rows, true]
        out[rows, true] = -np.inf
        other = out[rows].argmax(axis=1)
        largest = out[rows, other]
        half = std[rows] * np.float32(GAP / 2)
        out[rows, true] = np.maximum(own, largest) + half
        out[rows, other] = np.minimum(own, largest) - half

    def check(self, arrays: Mapping[str, Array], labels: NDArray[np.int64]) -> None:
        """Raises `CorruptStore` for a code beyond the largest, also where its vector is zero."""
        for name in ("values", "base"):
            if (code := int(arrays[name].max(initial=0))) > 2 * _MOST:
                raise CorruptStore(
                    f"compact: a code of {code}, beyond {2 * _MOST}, or never written"
                )


Exact = NDArray[np.float64]


class _Trial(NamedTuple):
    """Rows that steps are tried on.

    Attributes:
        rows: Z-scored (n, K), of the view that is decoded.
        vectors: (C, K), the directions to code them in.
        first, last: components (n, C) of view 0 and of that view.
    """

    rows: Exact
    vectors: Reals
    first: Reals
    last: Reals

    @classmethod
    def of(cls, vectors: Reals, first: Exact, last: Exact) -> _Trial:
        """Of Z-scored rows (n, K) of both views."""
        return cls(last, vectors, _along(first, vectors), _along(last, vectors))

    def losses(self, step: float) -> Exact:
        """KL (n,) at tau = 2 that each row loses by codes of that step."""
        base = np.rint(self.first / step)
        decoded = (base + FINE * _residual(self.last / step, base)) * step @ self.vectors
        result: Exact = kl(self.rows / _TAU, standardize(decoded) / _TAU)
        return result


def _along(rows: Exact, vectors: Reals) -> Reals:
    """Components (n, C) of rows (n, K), computed in the precision of the vectors."""
    result: Reals = rows.astype(vectors.dtype, copy=False) @ vectors.T
    return result


def _trials(vectors: Reals, first: Exact, last: Exact) -> list[_Trial]:
    """What a step is tried on: calibration rows, each with directions that other ones gave.

    Their own directions fit them better than any other row: with 256 rows of 1,000 classes a step that
    loses 2.5e-5 on them loses 6.8e-5 on the rest. Where they are all there are, and where there are more
    classes than a matrix of them is made of, they are tried with the directions that are used.
    """
    rows, classes = first.shape
    some = slice(None, None, math.ceil(rows * classes / _MEASURED))
    if rows < _CALIBRATION[0] or classes > _SIDE:
        return [_Trial.of(vectors, first[some], last[some])]
    trials = []
    for fold in range(_FOLDS):
        out = np.arange(rows) % _FOLDS == fold
        own = _directions(first[~out], last[~out] - first[~out])
        trials.append(_Trial.of(own, first[out][some], last[out][some]))
    return trials


def _moments(rows: Floats) -> tuple[Exact, Exact, Floats]:
    """Mean and std (n,) of rows (n, K), from float64, and their Z-scores in float32."""
    exact = rows.astype(np.float64)
    mean = exact.mean(axis=1)
    exact -= mean[:, None]
    std = np.sqrt(np.einsum("ij,ij->i", exact, exact) / rows.shape[1])
    exact *= np.divide(1, std, out=np.zeros_like(std), where=std > 0)[:, None]
    return mean, std, exact.astype(np.float32)


def _rounded(moments: Exact, std: Exact) -> NDArray[np.float32]:
    """To `_BITS` bits below the power of two above the row's std, where there is one."""
    unit = np.ldexp(1.0, np.frexp(std)[1] - _BITS)
    with np.errstate(over="ignore"):
        return np.where(std > 0, np.rint(moments / unit) * unit, moments).astype(np.float32)


def _directions(first: Exact, moved: Exact) -> Exact:
    """Principal components (C, K) of rows (n, K) of a view, and of their way to the other view."""
    classes = first.shape[1]
    # What every view pays for decides; the base, paid once, breaks ties.
    spread = moved.T @ moved + 0.01 * first.T @ first
    # Directions that these rows do not show come last, but before the mean, which is kept apart.
    spread += (1e-9 * np.trace(spread) + 1e-12) * (np.eye(classes) - 1 / classes)
    vectors: Exact = np.linalg.eigh(spread)[1][:, ::-1].T[: _components(classes)]
    return vectors


def _directions_of_rows(first: Exact, moved: Exact) -> Floats:
    """The same from the products of rows, of which there are fewer than classes; only those they show.

    In float32, as they are kept: what is done with them takes half the time.
    """
    rows = np.concatenate([moved, 0.1 * first])
    sizes, mixtures = np.linalg.eigh(rows @ rows.T)
    shown = np.flatnonzero(sizes > 1e-9 * max(sizes.max(), 1e-12))[::-1][
        : _components(rows.shape[1])
    ]
    vectors: Exact = mixtures[:, shown].T @ rows
    vectors /= np.sqrt(sizes[shown])[:, None]
    return vectors.astype(np.float32)


def _components(classes: int) -> int:
    return max(1, min(classes - 1, MOST_COMPONENTS))


def used_vectors(basis: Array) -> Floats:
    """The vectors (C, K) of a basis that are not zero."""
    length = np.sqrt(np.einsum("ij,ij->i", basis, basis, dtype=np.float64))
    least, most = _STEPS
    if not ((length == 0) | ((length > 0.99 * least) & (length < 1.01 * most))).all():
        raise CorruptStore(
            f"compact: the basis has vectors {length.min():g} to {length.max():g} long, expected "
            f"{least:g} to {most:g}, or 0"
        )
    vectors: Floats = basis[length > 0]
    return vectors


def _project(standard: Floats, basis: Array) -> Floats:
    """Components of Z-scored rows (n, K) in steps; (n, C) for the C vectors that are not zero."""
    vectors = used_vectors(basis).astype(np.float64)
    steps = (vectors / (vectors**2).sum(axis=1, keepdims=True)).astype(np.float32)
    result: Floats = standard @ steps.T
    return result


def _residual(components: Reals, base: Array) -> Reals:
    """Steps of `FINE` from the base, rounded with a dead zone."""
    off = components - base
    off /= FINE
    off += np.copysign(off.dtype.type(_ROUND), off)
    result: Reals = np.trunc(off, out=off)
    return result


def _whole(numbers: Floats) -> NDArray[np.int16]:
    """Whole numbers as integers."""
    if numbers.size and not -_MOST <= numbers.min() <= numbers.max() <= _MOST:
        raise DataError("a row is too far from those that the basis was fitted to: use float16")
    return numbers.astype(np.int16)


def _zigzag(codes: NDArray[np.int16]) -> NDArray[np.uint16]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: bits of small codes are zero, whatever their sign."""
    result: NDArray[np.uint16] = ((codes << 1) ^ (codes >> 15)).view(np.uint16)
    return result


def signed(codes: NDArray[np.uint16]) -> NDArray[np.int16]:
    """The inverse of `_zigzag`."""
    result: NDArray[np.int16] = ((codes >> 1) ^ (0 - (codes & 1)).astype(np.uint16)).view(np.int16)
    return result

"""The K largest logits and the label's, with exact statistics of the whole row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import (
    NEAR_TIE,
    NOTHING,
    Array,
    ArraySpec,
    Floats,
    to_float16,
)
from kdcache_stores.errors import CorruptStore, UsageError

_AT_ONCE = 2**20
"""Values decoded at once: what a dense row needs beside itself stays small."""


@dataclass(frozen=True)
class TopK:
    """K + 1 raw logits in float16 with their classes; mean, std and logsumexp over all classes.

    The entries are the K largest, descending, then the label's; where the label is among them, or
    there is none, then the next largest. Ties go to the lower class. Decoding gives the other m
    classes, the tail, two values: one class the lower, m - 1 classes the upper one,

        upper = t + s / sqrt(m - 1)        lower = t - s * sqrt(m - 1)

    where t and s are the tail's mean and standard deviation, which the stored statistics and the
    kept entries determine (t alone counts for m = 1). So the filled row has the stored mean and
    std, the upper value never exceeds one of the K largest (Samuelson's inequality), and the tail's
    spread lies where it harms least: splitting the tail evenly gives 30 to 50% more divergence. The
    lower class is number (sum of the entries' classes) mod m of the tail, ascending from 0: another
    one in each row.

    Args:
        k: K, at least 1.
    """

    name: ClassVar[str] = "topk"
    since: ClassVar[int] = 0
    plain: ClassVar[bool] = False
    most_kl: ClassVar[float] = math.inf  # whoever asks for K entries gives the others up
    near_tie: ClassVar[float] = NEAR_TIE
    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or not 1 <= self.k < 2**16:
            raise UsageError(f"the K of topk must be 1 to 65535, found {self.k!r}")

    @classmethod
    def parse(cls, parameter: str | None) -> TopK:
        """Takes K."""
        if parameter is None or not parameter.isdecimal():
            raise UsageError(f'topk needs its K, such as "topk:10"; found {parameter!r}')
        return cls(int(parameter))

    def arrays(self, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """`values` and `ids` of the entries; `mean`, `std`, `logsumexp` of the row."""
        if len(shape) != 1 or self.k + 1 > shape[0]:
            raise UsageError(
                f"{self.name}:{self.k} needs rows of more than {self.k} logits, not {shape}"
            )
        ids = str(np.min_scalar_type(shape[0]))  # one more than the classes: the fill value
        entries = (self.k + 1,)
        return (
            ArraySpec("values", "float16", entries, np.nan, compressed=True),
            ArraySpec("ids", ids, entries, int(np.iinfo(ids).max), compressed=True),
            ArraySpec("mean", "float32", (), np.nan, compressed=True),
            ArraySpec("std", "float32", (), np.nan, compressed=True),
            ArraySpec("logsumexp", "float32", (), np.nan, compressed=True),
        )

    def encode(
        self, rows: Floats, labels: NDArray[np.int64], shared: Mapping[str, Array] = NOTHING
    ) -> dict[str, Array]:
        """Statistics from the unrounded row, in float64."""
        classes = rows.shape[1]
        order = np.argsort(-rows, axis=1, kind="stable")[:, : self.k + 1]
        top, last = order[:, : self.k], order[:, self.k].copy()
        outside = (labels >= 0) & ~(top == labels[:, None]).any(axis=1)
        last[outside] = labels[outside]
        ids = np.concatenate([top, last[:, None]], axis=1)
        exact = rows.astype(np.float64)
        largest = exact.max(axis=1, keepdims=True)
        logsumexp = largest[:, 0] + np.log(np.exp(exact - largest).sum(axis=1))
        return {
            "values": to_float16(np.take_along_axis(rows, ids, axis=1)),
            "ids": ids.astype(self.arrays((classes,))[1].dtype),
            "mean": exact.mean(axis=1).astype(np.float32),
            "std": exact.std(axis=1).astype(np.float32),
            "logsumexp": logsumexp.astype(np.float32),
        }

    def decode(self, arrays: Mapping[str, Array], out: Floats) -> None:
        """The entries, and the tail filled; raises `CorruptStore` for what no writer writes."""
        if arrays["ids"].size and int(arrays["ids"].max()) >= out.shape[1]:
            raise CorruptStore(
                f"topk: class {arrays['ids'].max()} is not below {out.shape[1]}, or never written"
            )
        if arrays["std"].min(initial=0) < 0:
            raise CorruptStore(f"topk: a standard deviation of {arrays['std'].min():g}")
        for part in _parts(*out.shape):
            rows = {name: arrays[name][part] for name in ("values", "ids", "mean", "std")}
            _fill(**rows, out=out[part])

    def check(self, arrays: Mapping[str, Array], labels: NDArray[np.int64]) -> None:
        """Raises `CorruptStore` for entries in another order, without the label's, or a wrong logsumexp."""
        values, ids = arrays["values"].astype(np.float64), arrays["ids"].astype(np.int64)
        if (values[:, 1 : self.k] > values[:, : self.k - 1]).any():
            raise CorruptStore("topk: entries that do not descend")
        if (values[:, self.k] > values[:, self.k - 1]).any():
            raise CorruptStore("topk: an entry beyond the K largest that is larger than they are")
        if ((labels >= 0) & ~(ids == labels[:, None]).any(axis=1)).any():
            raise CorruptStore("topk: a row without the entry of its label")
        least = np.log(np.exp(values - values[:, :1]).sum(axis=1)) + values[:, 0]
        slack = 1e-2 + 2e-3 * np.abs(values).max(axis=1)
        if not (arrays["logsumexp"] >= least - slack).all():  # NaN, too, is not
            raise CorruptStore("topk: a logsumexp below that of the entries")


def _parts(count: int, classes: int) -> Iterator[slice]:
    step = math.ceil(_AT_ONCE / classes)
    return (slice(start, start + step) for start in range(0, count, step))


def _fill(values: Array, ids: Array, mean: Array, std: Array, out: Floats) -> None:
    """Fill dense rows (n, C) from entries (n, K + 1) and statistics (n,)."""
    ordered = np.sort(ids.astype(np.int64), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise CorruptStore("topk: a class is named twice in one row")
    if out.shape[1] > values.shape[1]:
        upper, lower, where = tail(values, ids, mean, std, out.shape[1])
        out[...] = upper[:, None]
        np.put_along_axis(out, where[:, None], lower[:, None], axis=1)
    np.put_along_axis(out, ids.astype(np.int64), values.astype(np.float32), axis=1)


def tail(
    values: Array, ids: Array, mean: Array, std: Array, classes: int
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """What the classes without an entry are given; there is at least one.

    Args:
        values, ids: of the entries, (n, K + 1).
        mean, std: of the rows, (n,).
        classes: C, more than K + 1.

    Returns the upper and the lower value, float32 (n,), and the class of the lower one, int64 (n,).
    """
    count = classes - values.shape[1]
    centre = mean.astype(np.float64)[:, None]
    entries = values.astype(np.float64) - centre
    mean = -entries.sum(axis=1) / count
    square = classes * std.astype(np.float64) ** 2 - (entries**2).sum(axis=1)
    spread = np.sqrt(np.maximum(square / count - mean**2, 0)) if count > 1 else 0 * mean
    upper = centre[:, 0] + mean + spread / math.sqrt(max(count - 1, 1))
    lower = centre[:, 0] + mean - spread * math.sqrt(count - 1)
    where = _lower_class(np.sort(ids.astype(np.int64), axis=1), count)[:, 0]
    return upper.astype(np.float32), lower.astype(np.float32), where


def _lower_class(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Class (n, 1) that is number (sum of ids) mod `count` of those not in the ascending ids (n, k)."""
    result: NDArray[np.int64] = ids.sum(axis=1, keepdims=True) % count
    for column in ids.T:
        result[:, 0] += column <= result[:, 0]  # each kept class at or below moves it up by one
    return result

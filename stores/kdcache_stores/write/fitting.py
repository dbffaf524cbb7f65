"""Fitting encodings before the first shard: to which rows, and what the fit gives, published once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import FittedEncoding, Floats
from kdcache_stores.errors import DataError
from kdcache_stores.format.header import Field
from kdcache_stores.format.layout import ArrayLayout
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.write.shared_arrays import publish_shared


def calibration_rows(field: Field, samples: int) -> NDArray[np.int64] | None:
    """The rows that a field's encoding is fitted to, spread evenly; None if it is not fitted.

    They are the same ones for every writer.
    """
    if not isinstance(field.encoding, FittedEncoding):
        return None
    count = field.encoding.calibration_samples(samples, field.shape)
    return np.linspace(0, samples - 1, count).round().astype(np.int64)


def fit_and_publish(
    files: LocalFiles,
    field: Field,
    layouts: Iterable[ArrayLayout],
    chosen: NDArray[np.int64],
    values: NDArray[np.floating],
) -> None:
    """Fit a field's encoding to its calibration rows, unless another writer published a fit first.

    Args:
        files: the store.
        field: whose encoding is fitted.
        layouts: its arrays.
        chosen: the calibration rows.
        values: float (v, rows, *shape): views 0 and 1 of these rows, or view 0 alone.
    """
    assert isinstance(field.encoding, FittedEncoding)
    fitted = field.encoding.fit(_checked(field, chosen, values))
    for layout in layouts:
        if layout.spec.per == "store":
            publish_shared(files, layout, fitted[layout.spec.name])


def _checked(field: Field, chosen: NDArray[np.int64], values: NDArray[np.floating]) -> Floats:
    """The rows to fit to in float32; raises `DataError` unless they fit and are finite."""
    expected = (len(chosen), *field.shape)
    if values.shape[1:] != expected or not 1 <= len(values) <= 2 or values.dtype.kind != "f":
        raise DataError(
            f"{field.name}: expected floats of one or two views, {expected} each, to fit "
            f"{field.encoding.name} to, found {values.dtype} {values.shape}"
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(values, dtype=np.float32)
    if not (finite := np.isfinite(rows)).all():
        view, position = (int(i) for i in np.argwhere(~finite)[0][:2])
        raise DataError(
            f"{field.name} of view {view}, row {chosen[position]} is not finite in float32: "
            f"{field.encoding.name} cannot be fitted to it"
        )
    return rows

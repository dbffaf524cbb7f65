"""The teacher's last linear layer, kept beside its outputs: `head/weight` and `head/bias`."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from kdcache_stores.encodings.protocol import ArraySpec, Floats
from kdcache_stores.errors import CorruptStore, DataError, MismatchError, UsageError
from kdcache_stores.format.header import HEAD, Field, group
from kdcache_stores.format.layout import SHARED_BYTES, ArrayLayout
from kdcache_stores.format.shards import ShardReader, encode_shard
from kdcache_stores.objects.files import LocalFiles

Head = tuple[Floats, Floats]
"""Weight (K, D) and bias (K,), float32."""


def sees(head: Head, field: Field) -> bool:
    """Whether a head makes logits of a field: `pooled`, or the last map, whole or averaged (`last_4`)."""
    named = field.name == "pooled" or re.fullmatch(r"last(_\d+)?", field.name)
    return bool(named) and field.shape[0] == head[0].shape[1]


def head_layouts(shape: tuple[int, int]) -> tuple[ArrayLayout, ArrayLayout]:
    """The arrays of a head of shape (K, D)."""
    weight = ArraySpec("weight", "float32", shape, np.nan, compressed=True, per="store")
    bias = ArraySpec("bias", "float32", (1, shape[0]), np.nan, compressed=True, per="store")
    return ArrayLayout(HEAD, weight, 1, 1, 1, 1), ArrayLayout(HEAD, bias, 1, 1, 1, 1)


def head_documents(shape: tuple[int, int]) -> dict[str, bytes]:
    """The metadata objects of a head, by key."""
    documents = {layout.metadata_key: layout.document() for layout in head_layouts(shape)}
    return {f"{HEAD}/zarr.json": group({"kdcache": {"shape": list(shape)}}), **documents}


def head_keys(shape: tuple[int, int]) -> list[str]:
    """Keys of the two objects that hold the values."""
    return [layout.key(0, 0) for layout in head_layouts(shape)]


def check_head(head: tuple[ArrayLike, ArrayLike] | None, classes: int) -> Head | None:
    """Weight and bias in float32; raises `DataError` unless they fit each other and are finite."""
    if head is None:
        return None
    weight, bias = (np.asarray(values) for values in head)
    if weight.ndim != 2 or weight.shape[0] != classes or bias.shape != (classes,):
        raise DataError(
            f"head must be a weight ({classes}, D) and a bias ({classes},), found {weight.shape} "
            f"and {bias.shape}"
        )
    if weight.dtype.kind != "f" or bias.dtype.kind != "f":
        raise DataError(f"head must hold floats, found {weight.dtype} and {bias.dtype}")
    if weight.size == 0 or 4 * weight.size > SHARED_BYTES:
        raise UsageError(
            f"a head of shape {weight.shape} is not kept: it must have 1 to {SHARED_BYTES} bytes"
        )
    with np.errstate(over="ignore"):
        result = tuple(np.ascontiguousarray(values, np.float32) for values in (weight, bias))
    if not all(np.isfinite(values).all() for values in result):
        raise DataError("head must be finite in float32")
    return result[0], result[1]


def read_head(get: Callable[[str], bytes], shape: tuple[int, int], where: str) -> Head:
    """The head of a store.

    Args:
        get: gives the bytes of an object by its key.
        shape: (K, D).
        where: how errors name the store.

    Raises `CorruptStore` for values that are not finite, and what `get` raises.
    """
    arrays = []
    for layout in head_layouts(shape):
        key = layout.key(0, 0)
        values = ShardReader(layout, get(key), f"{where}/{key}").single()
        if not np.isfinite(values).all():
            raise CorruptStore(f"{where}/{key} holds values that are not finite")
        arrays.append(np.array(values, np.float32))
    return arrays[0], arrays[1][0]


def publish_head(files: LocalFiles, head: Head) -> None:
    """Publish a head in an unfinished store; one that is damaged is replaced.

    Raises `MismatchError` if another one is there.
    """
    weight, bias = head
    shape = weight.shape[0], weight.shape[1]
    try:
        present = read_head(files.get, shape, files.where)
    except (FileNotFoundError, CorruptStore):
        present = None
    if present is not None and not all(map(np.array_equal, present, head)):
        raise MismatchError(
            f"{files.where} was begun with another head under equal weights_sha256: pass the head of "
            "the teacher that the store is of"
        )
    for key, data in head_documents(shape).items():
        files.publish(key, data, replace=True)
    if present is None:
        for layout, values in zip(head_layouts(shape), (weight, bias[None]), strict=True):
            files.publish(layout.key(0, 0), encode_shard(layout, values[None]), replace=True)

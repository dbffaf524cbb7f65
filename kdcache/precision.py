"""What networks compute in: float32, or below it by autocast, which keeps sums and norms in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from kdcache_stores.errors import UnknownName

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(name: str) -> None:
    """Raise `UnknownName` unless it is a name of `PRECISIONS`."""
    if name not in PRECISIONS:
        raise UnknownName("precision", name, PRECISIONS)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a network of that precision runs on a device."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

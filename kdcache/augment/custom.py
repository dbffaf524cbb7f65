"""A user's own augmentation, named on the user's own command line as `pkg.module:factory`."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes
from kdcache.imports import import_own
from kdcache.philox import Draws
from kdcache_stores.errors import DataError, UsageError

#: The generators are the process's: one thread draws from them at a time.
_GENERATORS = threading.RLock()
os.register_at_fork(
    before=_GENERATORS.acquire,
    after_in_parent=_GENERATORS.release,
    after_in_child=_GENERATORS.release,
)
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(name: str) -> bool:
    """Whether a name has the form `pkg.module:factory`."""
    return _PATH.fullmatch(name) is not None


def import_factory(path: str) -> Callable[..., Any]:
    """The callable at `pkg.module:factory`; raises `UsageError` if there is none."""
    module, _, name = path.partition(":")
    try:
        factory = getattr(import_own(module), name)
    except (UsageError, AttributeError) as error:
        raise UsageError(f"cannot import {path!r}: {error}") from error
    if not callable(factory):
        raise UsageError(f"{path!r} is no function: {type(factory).__name__}")
    return factory  # type: ignore[no-any-return]


class Custom(Augmentation):
    """A pipeline of the user's (`torchvision.transforms.v2` or any callable on uint8 tensors).

    The generators of torch, NumPy and `random` are seeded with the view's own number before each
    call and put back after it, so a view is a function of (seed, key, view) as long as the pipeline
    draws from these. One image at a time, also where several threads call.

    Args:
        path: `pkg.module:factory`; the factory takes nothing and returns the pipeline.
        pipeline: the pipeline itself; by default the factory is imported and called.
    """

    name = "custom"
    batched = False

    def __init__(
        self, path: str, pipeline: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.path = path
        if pipeline is None:
            factory = import_factory(path)
            try:
                pipeline = factory()
            except Exception as error:  # whatever a user's code raises
                raise UsageError(
                    f"{path}, called without arguments, raised {type(error).__name__}: {error}"
                ) from error
        self.pipeline = pipeline

    def describe(self) -> dict[str, Any]:
        """Name and path; the path is never imported because a store names it."""
        return {"name": self.name, "factory": self.path}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """`random_seed` in [0, 2^63)."""
        low, high, _, _ = draws.blocks(np.zeros(1, dtype=np.int64))
        return {"random_seed": (low | ((high & 0x7FFFFFFF) << 32))[:, 0]}

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Call the pipeline under its own seed."""
        seed = int(parameters["random_seed"])
        with _GENERATORS:
            result = self._seeded(image, seed)
        if not (isinstance(result, torch.Tensor) and result.dtype == torch.uint8):
            raise DataError(
                f"{self.path} must return a uint8 image (C, H, W): normalisation belongs to the "
                "model; "
                f"found {getattr(result, 'dtype', type(result).__name__)}"
            )
        return result

    def _seeded(self, image: torch.Tensor, seed: int) -> Any:
        python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
                return self.pipeline(image)
        except Exception as error:  # whatever a user's code raises
            raise DataError(
                f"{self.path} raised {type(error).__name__} for an image uint8 "
                f"{tuple(image.shape)}: {error} (--debug shows where)"
            ) from error
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002

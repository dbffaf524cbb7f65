"""Items that are no images: features, spectrograms, token ids. A network takes them as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache_stores.errors import DataError, UsageError

#: What items are held as: numbers that a network computes with, and ids that it looks up.
DTYPES = {"float32": torch.float32, "int64": torch.int64}
#: Numbers of one item, at most.
MOST = 2**28


@dataclass(frozen=True)
class Item:
    """What each item of a dataset without images is; the input of a network, with nothing done to it.

    Args:
        dtype: "float32", or "int64" for token ids.
        shape: of one item, of one axis at least: (D,), (T,), (C, H, W).
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if (
            self.dtype not in DTYPES
            or not self.shape
            or not all(isinstance(size, int) and size > 0 for size in self.shape)
            or math.prod(self.shape) > MOST
        ):
            raise UsageError(
                f"items are {' or '.join(DTYPES)} of a shape such as (128,), {MOST} numbers at most, found "
                f"{self.dtype!r:.20} {self.shape!r:.80}"
            )

    def __str__(self) -> str:
        return f"{self.dtype} items of shape {'x'.join(map(str, self.shape))}"

    @property
    def remark(self) -> str:
        """What everyone who uses such a dataset should be told, the end of a sentence."""
        pictures = self.is_map and {1, 3} & {self.shape[0], self.shape[-1]}
        return f"{self}, given to networks as they are: no images, so no augmentation" + (
            ". If they are pictures, give them as uint8 from 0 to 255" if pictures else ""
        )

    @classmethod
    def of(cls, items: Tensor) -> Item:
        """Of items (N, *shape), as `item_tensor` gives them."""
        return cls(str(items.dtype).removeprefix("torch."), tuple(items.shape[1:]))

    @property
    def is_map(self) -> bool:
        """Whether an item has channels, height and width, so that a network of images takes it."""
        return self.dtype == "float32" and len(self.shape) == 3

    def __call__(self, items: Tensor) -> Tensor:
        """The items themselves, (B, *shape) or one alone; raises `DataError` for any others."""
        lone = tuple(items.shape) == self.shape
        if items.dtype != DTYPES[self.dtype] or not (lone or tuple(items.shape[1:]) == self.shape):
            raise DataError(
                f"the network takes {self.dtype} items of shape {self.shape}, found "
                f"{str(items.dtype).removeprefix('torch.')} of shape {tuple(items.shape[1:])}: give the "
                "dataset that it was trained on, or a network for this one"
            )
        return items

    def examples(self, count: int, network: nn.Module | None = None) -> Tensor:
        """Random items (count, *shape) on the CPU, always the same ones.

        Args:
            network: whose smallest embedding bounds the ids; without any, all are 0.
        """
        generator = torch.Generator().manual_seed(0)
        if self.dtype == "float32":
            return torch.randn(count, *self.shape, generator=generator)
        kinds = nn.Embedding, nn.EmbeddingBag
        sizes = [
            m.num_embeddings for m in (network or nn.Identity()).modules() if isinstance(m, kinds)
        ]
        return torch.randint(min(sizes, default=1), (count, *self.shape), generator=generator)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back."""
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Item:
        """The inverse of `to_dict`; raises `UsageError` for what makes no sense."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise UsageError(f"items: {error}; found {dict(fields)}") from None


def item_tensor(values: Any, what: str) -> Tensor:
    """Numbers of any dtype as float32, or as int64 where they are integers.

    Args:
        values: a tensor, or an array of NumPy.
        what: names them in messages.

    Raises:
        DataError: no numbers, numbers that are not finite or too large, or uint8, as images are.
    """
    if isinstance(values, Tensor):  # NumPy has no bfloat16
        values = (values.float() if values.is_floating_point() else values).numpy(force=True)
    array = np.asarray(values)
    if array.dtype == np.uint8 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{what} must be images (uint8), or items that are no images: float32 features or int64 "
            f"token ids; found {array.dtype} {array.shape}"
        )
    if array.dtype.kind in "iu":
        if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
            raise DataError(f"{what} hold {array.max()}, and ids must be below 2^63")
        return torch.from_numpy(np.ascontiguousarray(array, np.int64))
    with np.errstate(over="ignore"):  # what is too large for float32 is found below
        floats = np.ascontiguousarray(array, np.float32)
    if not (finite := np.isfinite(floats)).all():
        place = tuple(int(axis[0]) for axis in np.nonzero(~finite))
        raise DataError(
            f"{what} hold {array[place]} at {list(place)}: expected finite numbers. Remove or fill "
            "what is missing"
        )
    return torch.from_numpy(floats)

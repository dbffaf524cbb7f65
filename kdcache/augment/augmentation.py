"""What an augmentation is: parameters drawn per (sample, view), and a pure application of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.philox import Draws
from kdcache_stores.errors import DataError, UsageError

Parameters = dict[str, NDArray[Any]]
Sizes = NDArray[np.int64]


class Augmentation(ABC):
    """One augmentation: draws explicit parameters, applies them to uint8 images.

    A subclass gives `draw` and at least one of `apply` (a batch) and `apply_one` (an image); where
    it gives both, they are bit-equal unless its docstring says otherwise.
    """

    name: ClassVar[str]
    #: The number of views, where it is fixed.
    views: int | None = None
    #: Whether `apply` works on whole batches on any device (or just loops over images).
    batched: bool = True
    #: Whether every view of a sample is the same.
    fixed: bool = False
    #: Image files are decoded no larger than this asks for, see `decode_image`; None: as they are.
    decode_side: int | None = None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and options, plain JSON: part of the plan, and of its digest."""

    @abstractmethod
    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """Parameters of B views: named arrays (B,).

        Args:
            draws: the random numbers of the B (sample, view) pairs.
            sizes: int64 (B, 2), height and width of each image.
        """

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """Height and width of the results: int64 (B, 2)."""
        return sizes

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Apply to a batch, uint8 (B, C, H, W), on the device where it is."""
        done = [
            self.apply_one(image, {name: values[i] for name, values in parameters.items()})
            for i, image in enumerate(images)
        ]
        same_size(np.array([image.shape[1:] for image in done], dtype=np.int64))
        return torch.stack(done)

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Apply to one image, uint8 (C, H, W)."""
        batch = {name: np.asarray(value)[None] for name, value in parameters.items()}
        return self.apply(image[None], batch)[0]

    def unused(self, parameters: Parameters) -> dict[str, NDArray[np.bool_]]:
        """Which parameters have no effect on which views: empty, or a mask (B,) per name."""
        return {}


class Identity(Augmentation):
    """`none`: the image as it is; every view is the same."""

    name = "none"
    fixed = True

    def describe(self) -> dict[str, Any]:
        """Just the name."""
        return {"name": self.name}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """Nothing to draw."""
        return {}

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """The images themselves."""
        return images

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """The image itself."""
        return image


class Chain(Augmentation):
    """Augmentations one after the other; parameters are named `part.parameter`."""

    name = "chain"

    def __init__(self, parts: Sequence[Augmentation]) -> None:
        names = [part.name for part in parts]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UsageError(
                f"a chain has at least two different augmentations, found {'+'.join(names)!r}"
            )
        for part in parts:
            if part.views is not None:
                raise UsageError(
                    f"{part.name!r} enumerates its views, so nothing can be chained to it"
                )
        if any(part.decode_side is not None for part in parts[1:]):
            raise UsageError(
                "decode_side belongs to the first of a chain, which gets the decoded image"
            )
        self.parts = tuple(parts)
        self.decode_side = parts[0].decode_side
        self.batched = all(part.batched for part in parts)

    def describe(self) -> dict[str, Any]:
        """Name and descriptions of the parts, in order."""
        return {"name": self.name, "parts": [part.describe() for part in self.parts]}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """Every part draws from its own operation."""
        drawn: Parameters = {}
        for index, part in enumerate(self.parts):
            for name, values in part.draw(draws.part(index), sizes).items():
                drawn[f"{part.name}.{name}"] = values
            sizes = part.output_sizes(sizes)
        return drawn

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """Sizes after the last part."""
        for part in self.parts:
            sizes = part.output_sizes(sizes)
        return sizes

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Apply the parts in order."""
        for part in self.parts:
            images = part.apply(images, within(part.name, parameters))
        return images

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Apply the parts in order."""
        for part in self.parts:
            image = part.apply_one(image, within(part.name, parameters))
        return image

    def unused(self, parameters: Parameters) -> dict[str, NDArray[np.bool_]]:
        """What is unused in a part is unused in the chain."""
        return {
            f"{part.name}.{name}": mask
            for part in self.parts
            for name, mask in part.unused(within(part.name, parameters)).items()
        }


def within(prefix: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters named `prefix.something`, as `something`."""
    start = prefix + "."
    return {
        name[len(start) :]: value for name, value in parameters.items() if name.startswith(start)
    }


def tensor(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Drawn parameters (B,) as a tensor on the device, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def same_size(sizes: Sizes) -> tuple[int, int]:
    """The one size of a batch; raises `DataError` if there are several."""
    if (sizes != sizes[0]).any():
        shapes = sorted({(int(h), int(w)) for h, w in sizes})
        raise DataError(
            f"images of a batch must end up in one size, found {shapes[:3]} (height, width)"
            "; use resized-crop-flip or center-crop, which give one size"
        )
    return int(sizes[0, 0]), int(sizes[0, 1])

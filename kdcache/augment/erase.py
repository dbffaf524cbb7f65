"""Hiding a box of the image: random erasing and cutout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes, tensor
from kdcache.augment.crops import check_range, draw_box
from kdcache.philox import Draws, below
from kdcache_stores.errors import DataError, UsageError


class _Box(Augmentation):
    """A box `top`, `left`, `height`, `width` filled with one colour; height 0: nothing is
    erased.
    """

    fill: tuple[int, ...]

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Fill the boxes of a batch; bit-equal per image."""
        channels, height, width = images.shape[1:]
        if len(self.fill) not in (1, channels):
            raise DataError(
                f"{self.name} fills with {len(self.fill)} values, but the images have {channels} "
                "channels; give one value or one per channel"
            )
        device = images.device
        top, left, tall, wide = (
            tensor(np.asarray(parameters[name], dtype=np.int64), device)[:, None]
            for name in ("top", "left", "height", "width")
        )
        y = torch.arange(height, device=device)
        x = torch.arange(width, device=device)
        rows = (y >= top) & (y < top + tall)
        columns = (x >= left) & (x < left + wide)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        fill = tensor(np.array(self.fill, dtype=np.uint8), device)[:, None, None]
        return torch.where(inside, fill, images)


class Erase(_Box):
    """`erase`: random erasing: with probability p, a box of random area and shape is filled.

    Box as in torchvision's RandomErasing (Zhong et al., "Random erasing data augmentation", 2017),
    in one colour since views are uint8 images, before any normalisation.

    Args:
        p: probability.
        scale: range of the box's share of the area.
        ratio: range of its width / height.
        fill: 0 to 255, one value or one per channel.
    """

    name = "erase"

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        fill: int | Sequence[int] = 124,
    ) -> None:
        self.p = check_probability(self.name, "p", p)
        self.scale = check_range(self.name, "scale", scale, 0, 1)
        self.ratio = check_range(self.name, "ratio", ratio, 0.05, 20)
        self.fill = check_fill(self.name, fill)

    def describe(self) -> dict[str, Any]:
        """Name and all options."""
        return {
            "name": self.name,
            "p": self.p,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "fill": list(self.fill),
        }

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """The box in pixels; all 0 where nothing is erased."""
        uniform = draws.uniform(23)
        height, width = draw_box(uniform[:, :20], sizes, self.scale, self.ratio)
        chosen = (uniform[:, 22] < self.p) & (height > 0)
        box = {
            "top": below(uniform[:, 20], sizes[:, 0] - height + 1),
            "left": below(uniform[:, 21], sizes[:, 1] - width + 1),
            "height": height,
            "width": width,
        }
        return {name: np.where(chosen, value, 0) for name, value in box.items()}


class Cutout(_Box):
    """`cutout`: a square around a random point is filled, cut at the edges of the image.

    As in FixMatch's RandAugment, which MLKD's strong view uses: its side is uniform in [0, part] of
    the width. DeVries and Taylor, "Improved regularization of CNNs with cutout" (2017), have a
    fixed side.

    Args:
        part: largest side as a share of the width.
        fill: 0 to 255, one value or one per channel.
    """

    name = "cutout"

    def __init__(self, part: float = 0.5, fill: int | Sequence[int] = 124) -> None:
        self.part = check_probability(self.name, "part", part)
        self.fill = check_fill(self.name, fill)

    def describe(self) -> dict[str, Any]:
        """Name and all options."""
        return {"name": self.name, "part": self.part, "fill": list(self.fill)}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """The box in pixels, already cut at the edges."""
        uniform = draws.uniform(3)
        side = uniform[:, 0] * self.part * sizes[:, 1]
        box: Parameters = {}
        for axis, (start, extent) in enumerate((("top", "height"), ("left", "width"))):
            limit = sizes[:, axis]
            first = np.floor(np.maximum(0, uniform[:, axis + 1] * limit - side / 2))
            last = np.minimum(limit, np.floor(first + side))
            box[start] = first.astype(np.int64)
            box[extent] = (last - first).astype(np.int64)
        return box


def check_probability(name: str, option: str, value: float) -> float:
    """The value as a float; raises `UsageError` unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} needs {option} in [0, 1], found {value!r}")
    return float(value)


def check_fill(name: str, fill: int | Sequence[int]) -> tuple[int, ...]:
    """A fill colour as a tuple; raises `UsageError` unless it is bytes."""
    fill = (fill,) if isinstance(fill, int) else tuple(fill)
    if not fill or any(not 0 <= value <= 255 for value in fill):
        raise UsageError(f"{name} needs fill values in [0, 255], found {fill}")
    return fill

"""Crops: padded and resized at random, all padded ones in turn, and central ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes, tensor
from kdcache.augment.batched import resized_crop
from kdcache.philox import Draws, below, exp
from kdcache_stores.errors import UsageError

PADDING_MODES = ("constant", "reflect")


class PadCropFlip(Augmentation):
    """`pad-crop-flip`: pad all sides, cut out the old size anywhere, mirror with probability 1/2.

    The augmentation of CIFAR (padding 4 for 32 pixels): (2 padding + 1)^2 crops, twice that with
    the flip. Nothing is interpolated: batched and per image are bit-equal.

    Args:
        padding: pixels on each side.
        flip: whether to mirror.
        mode: "constant" (black) or "reflect".
    """

    name = "pad-crop-flip"

    def __init__(self, padding: int, flip: bool = True, mode: str = "constant") -> None:
        if padding < 0 or mode not in PADDING_MODES:
            raise UsageError(
                f"{self.name} needs padding >= 0 and mode in {PADDING_MODES}, "
                f"found padding={padding}, mode={mode!r}"
            )
        self.padding, self.flip, self.mode = padding, flip, mode

    def describe(self) -> dict[str, Any]:
        """Name, padding, flip, mode."""
        return {
            "name": self.name,
            "padding": self.padding,
            "flip": self.flip,
            "mode": self.mode,
        }

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """`top` and `left` in [0, 2 padding], counted in the padded image, and `flip`."""
        uniform = draws.uniform(3 if self.flip else 2)
        steps = 2 * self.padding + 1
        drawn: Parameters = {
            "top": below(uniform[:, 0], steps),
            "left": below(uniform[:, 1], steps),
        }
        if self.flip:
            drawn["flip"] = uniform[:, 2] < 0.5
        return drawn

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Gather all crops at once out of the padded images."""
        top, left, flip = parameters["top"], parameters["left"], parameters.get("flip")
        height, width = images.shape[-2:]
        if images.device.type == "cpu":
            # NumPy copies such windows several times faster than torch does on a CPU.
            windows = np.lib.stride_tricks.sliding_window_view(
                self._pad(images.numpy()), (height, width), axis=(2, 3)
            )
            crops = windows[np.arange(len(top)), :, top, left]
            if flip is not None:
                mirrored = np.flatnonzero(flip)
                crops[mirrored] = crops[mirrored][..., ::-1]
            return torch.from_numpy(crops)
        device = images.device
        padded = F.pad(images, [self.padding], padding_mode=self.mode) if self.padding else images
        index = torch.arange(len(top), device=device)
        view = padded.unfold(2, height, 1).unfold(3, width, 1)
        result = view[index, :, tensor(top, device), tensor(left, device)]
        if flip is not None:
            result = torch.where(tensor(flip, device)[:, None, None, None], result.flip(3), result)
        return result

    def _pad(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        p = self.padding
        if p == 0:
            return images
        if self.mode == "reflect":
            return np.pad(images, ((0, 0), (0, 0), (p, p), (p, p)), mode="reflect")
        batch, channels, height, width = images.shape
        padded = np.zeros((batch, channels, height + 2 * p, width + 2 * p), dtype=np.uint8)
        padded[:, :, p:-p, p:-p] = images
        return padded

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Pad, crop, flip."""
        height, width = image.shape[-2:]
        padded = F.pad(image, [self.padding], padding_mode=self.mode) if self.padding else image
        crop: torch.Tensor = F.crop(
            padded, int(parameters["top"]), int(parameters["left"]), height, width
        )
        return mirror(crop) if parameters.get("flip", False) else crop


class Exhaustive(PadCropFlip):
    """`exhaustive`: every view that `pad-crop-flip` can give, each once, in an order of its own per
    key.

    There are (2 padding + 1)^2 views, twice that with the flip: 162 for padding 4. Were the order
    the same for all keys, an epoch would shift every image alike.
    """

    name = "exhaustive"

    def __init__(self, padding: int, flip: bool = True, mode: str = "constant") -> None:
        super().__init__(padding, flip, mode)
        self.views = (2 * padding + 1) ** 2 * (2 if flip else 1)

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """The parameters of view v are those at place v of the key's own permutation."""
        assert self.views is not None
        if len(draws) and int(draws.views.max()) >= self.views:
            raise UsageError(
                f"{self.name} with padding {self.padding} has {self.views} views, numbered from 0; "
                f"asked for view {int(draws.views.max())}"
            )
        steps = 2 * self.padding + 1
        place = permute(draws, steps, self.views // steps)
        top, rest = place // (self.views // steps), place % (self.views // steps)
        drawn: Parameters = {"top": top, "left": rest % steps}
        if self.flip:
            drawn["flip"] = rest >= steps
        return drawn


def permute(draws: Draws, a: int, b: int, rounds: int = 8) -> NDArray[np.int64]:
    """Map each view in [0, a b) through a pseudo-random permutation of its key.

    An unbalanced Feistel cipher over Z_a x Z_b: Black and Rogaway, "Ciphers with arbitrary finite
    domains" (CT-RSA 2002), "generalized Feistel"; round function: Philox at view 0 of the key.
    """
    x = draws.views.copy()
    fixed = Draws(draws.words, np.zeros_like(draws.views), draws.seed, draws.operation)
    for i in range(rounds):
        p, q = (a, b) if i % 2 == 0 else (b, a)
        left, right = x // q, x % q  # left in Z_p, right in Z_q
        word = fixed.blocks((right + i * max(a, b))[:, None])[0][:, 0]
        left = (left + word % p) % p
        x = right * p + left
    return x


class ResizedCropFlip(Augmentation):
    """`resized-crop-flip`: a random box of the image, resized to a square, mirrored with
    probability 1/2.

    The augmentation of ImageNet. Area and aspect ratio are drawn as in torchvision's
    RandomResizedCrop: ten attempts, then the largest central box within the ratio. Images may
    differ in size. A CPU crops and resizes them one by one, a GPU all at once, where pixels may
    differ by 1.

    Args:
        size: side of the result in pixels.
        scale: range of the box's share of the area.
        ratio: range of its width / height.
        flip: whether to mirror.
        interpolation: "bilinear" or "bicubic", both antialiased.
        decode_side: decode image files at the smallest of 1/8, 1/4, 1/2 and 1 whose shorter side has
            at least so many pixels: faster, and other pixels. None: as they are.
    """

    name = "resized-crop-flip"
    batched = False

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        interpolation: str = "bilinear",
        decode_side: int | None = None,
    ) -> None:
        check_size(self.name, size, interpolation)
        self.size = size
        self.decode_side = check_decode_side(self.name, decode_side)
        self.scale = check_range(self.name, "scale", scale, 0, 1)
        self.ratio = check_range(self.name, "ratio", ratio, 0.05, 20)
        self.flip, self.interpolation = flip, interpolation

    def describe(self) -> dict[str, Any]:
        """Name and all options."""
        return {
            "name": self.name,
            "size": self.size,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "flip": self.flip,
            "interpolation": self.interpolation,
        } | _described(self.decode_side)

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """The box `top`, `left`, `height`, `width` in pixels of the image, and `flip`."""
        uniform = draws.uniform(23)
        height, width = draw_box(uniform[:, :20], sizes, self.scale, self.ratio)
        none = height == 0
        fallback_height, fallback_width = central_box(sizes, self.ratio)
        height = np.where(none, fallback_height, height)
        width = np.where(none, fallback_width, width)
        room_y, room_x = sizes[:, 0] - height, sizes[:, 1] - width
        drawn: Parameters = {
            "top": np.where(none, room_y // 2, below(uniform[:, 20], room_y + 1)),
            "left": np.where(none, room_x // 2, below(uniform[:, 21], room_x + 1)),
            "height": height,
            "width": width,
        }
        if self.flip:
            drawn["flip"] = uniform[:, 22] < 0.5
        return drawn

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """A square for all."""
        return np.full_like(sizes, self.size)

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Crop, resize, flip: at once on a GPU, one by one on a CPU."""
        if images.device.type == "cpu":
            return super().apply(images, parameters)
        return self.apply_at_once(images, parameters)

    def apply_at_once(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Crop, resize, flip a whole batch on any device, within 1 of `apply_one`."""
        names = ("top", "left", "height", "width")
        boxes = np.stack([parameters[name] for name in names], 1).astype(np.float32)
        device = images.device
        result = resized_crop(images, tensor(boxes, device), self.size, self.interpolation)
        if "flip" in parameters:
            flip = tensor(parameters["flip"], device)[:, None, None, None]
            result = torch.where(flip, result.flip(3), result)
        return result

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Crop, resize, flip."""
        box = [int(parameters[name]) for name in ("top", "left", "height", "width")]
        mode = InterpolationMode(self.interpolation)
        crop: torch.Tensor = F.resized_crop(
            image, *box, [self.size, self.size], mode, antialias=True
        )
        return mirror(crop) if parameters.get("flip", False) else crop


def mirror(image: torch.Tensor) -> torch.Tensor:
    """Left and right exchanged."""
    result: torch.Tensor = F.horizontal_flip(image)
    return result


def draw_box(
    uniform: NDArray[np.float64],
    sizes: Sizes,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Height and width (B,) of the first of ten drawn boxes that fits; 0 where none does.

    Args:
        uniform: (B, 20), two numbers per attempt.
        sizes: int64 (B, 2).
        scale: range of the share of the area, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    area = sizes[:, :1] * sizes[:, 1:] * (scale[0] + uniform[:, 0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = exp(low + uniform[:, 1::2] * (high - low))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (heights > 0) & (heights <= sizes[:, :1]) & (widths <= sizes[:, 1:])
    first = fits.argmax(axis=1)[:, None]
    fitting = fits.any(axis=1)
    height = np.take_along_axis(heights, first, 1)[:, 0]
    width = np.take_along_axis(widths, first, 1)[:, 0]
    return np.where(fitting, height, 0), np.where(fitting, width, 0)


def central_box(sizes: Sizes, ratio: tuple[float, float]) -> tuple[Any, Any]:
    """Height and width (B,) of the largest box whose aspect ratio is in range."""
    height, width = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    narrow, wide = aspect < ratio[0], aspect > ratio[1]
    return (
        np.where(narrow, np.rint(width / ratio[0]).astype(np.int64), height),
        np.where(wide, np.rint(height * ratio[1]).astype(np.int64), width),
    )


class CenterCrop(Augmentation):
    """`center-crop`: the shorter side resized, the central square cut out; every view is the same.

    The usual evaluation on ImageNet (resize 256, size 224).

    Args:
        size: side of the result in pixels.
        resize: length of the shorter side before the crop; at least `size`.
        interpolation: "bilinear" or "bicubic", both antialiased.
        decode_side: see `ResizedCropFlip`.
    """

    name = "center-crop"
    fixed = True
    batched = False

    def __init__(
        self,
        size: int,
        resize: int,
        interpolation: str = "bilinear",
        decode_side: int | None = None,
    ) -> None:
        check_size(self.name, size, interpolation)
        self.decode_side = check_decode_side(self.name, decode_side)
        if resize < size:
            raise UsageError(f"{self.name} needs resize >= size, found {resize} < {size}")
        self.size, self.resize, self.interpolation = size, resize, interpolation

    def describe(self) -> dict[str, Any]:
        """Name and all options."""
        return {
            "name": self.name,
            "size": self.size,
            "resize": self.resize,
            "interpolation": self.interpolation,
        } | _described(self.decode_side)

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """Nothing to draw."""
        return {}

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """A square for all."""
        return np.full_like(sizes, self.size)

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Resize, crop."""
        mode = InterpolationMode(self.interpolation)
        resized = F.resize(image, [self.resize], mode, antialias=True)
        crop: torch.Tensor = F.center_crop(resized, [self.size])
        return crop


def check_range(
    name: str, option: str, value: tuple[float, float], low: float, high: float
) -> tuple[float, float]:
    """A range as floats; raises `UsageError` unless low <= from <= to <= high."""
    if not (len(value) == 2 and low <= value[0] <= value[1] <= high):
        raise UsageError(f"{name} needs {option}=from/to within {low:g}/{high:g}, found {value!r}")
    return float(value[0]), float(value[1])


def check_decode_side(name: str, side: int | None) -> int | None:
    """The option; raises `UsageError` for what is no number of pixels."""
    if side is not None and (type(side) is not int or side < 1):
        raise UsageError(f"{name} needs decode_side >= 1, a number of pixels, found {side!r}")
    return side


def _described(decode_side: int | None) -> dict[str, Any]:
    return {} if decode_side is None else {"decode_side": decode_side}


def check_size(name: str, size: int, interpolation: str) -> None:
    """Raise `UsageError` for a size or an interpolation that does not exist."""
    if size < 1 or interpolation not in ("bilinear", "bicubic"):
        raise UsageError(
            f"{name} needs size >= 1 and interpolation bilinear or bicubic, "
            f"found size={size}, interpolation={interpolation!r}"
        )

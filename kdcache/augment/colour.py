"""Colour jitter and RandAugment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes, tensor
from kdcache.augment.batched import COLUMNS, blend, cut_levels, sharpen, shift_hue, warp
from kdcache.philox import Draws, below
from kdcache_stores.errors import UsageError

ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
_ORDERS = ["".join(order) for order in permutations("bcsh")]
_FULL = {name[0]: name for name in ADJUST}


class ColorJitter(Augmentation):
    """`color-jitter`: brightness, contrast, saturation and hue by random factors, in random order.

    As torchvision's ColorJitter: factors uniform in [1 - x, 1 + x] (not below 0), the hue's shift
    in [-hue, hue], its unit the full circle. A factor of 0 leaves its adjustment out.

    Args:
        brightness: 0 or more.
        contrast: 0 or more.
        saturation: 0 or more.
        hue: in [0, 0.5].
    """

    name = "color-jitter"

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
    ) -> None:
        self.strengths = {
            "brightness": float(brightness),
            "contrast": float(contrast),
            "saturation": float(saturation),
            "hue": float(hue),
        }
        if min(self.strengths.values()) < 0 or hue > 0.5:
            raise UsageError(
                f"{self.name} needs strengths >= 0 and hue <= 0.5, found {self.strengths}"
            )

    def describe(self) -> dict[str, Any]:
        """Name and strengths."""
        return {"name": self.name, **self.strengths}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """`order` (a permutation of the initials, "bcsh") and a factor each."""
        uniform = draws.uniform(5)
        drawn: Parameters = {"order": np.array(_ORDERS)[below(uniform[:, 0], len(_ORDERS))]}
        for column, (name, strength) in enumerate(self.strengths.items(), start=1):
            if strength:
                low, high = (max(0.0, 1 - strength), 1 + strength)
                if name == "hue":
                    low, high = -strength, strength
                drawn[name] = low + uniform[:, column] * (high - low)
        return drawn

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Adjust all images at once: what comes before the hue, the hue, and what comes after it.

        Bit-equal per image on a CPU, but for images of odd sizes, see `kdcache.augment.batched`;
        there and on a GPU it may differ by 2, as three roundings in a row do.
        """
        orders, count = np.array([list(order) for order in parameters["order"]]), len(images)
        turn = np.nonzero(orders == "h")[1]
        # Those with most adjustments before the hue come first, and so have fewest after it.
        by_turn = np.argsort(-turn, kind="stable")
        orders, turn = orders[by_turn], turn[by_turn]
        settings = np.zeros((4, count, COLUMNS))
        settings[:, :, 0] = 1
        for initial, column in (("b", 1), ("s", 2), ("c", 3)):
            if (name := _FULL[initial]) in parameters:
                image, step = np.nonzero(orders == initial)
                settings[step, image, 0] = parameters[name][by_turn[image]]
                if initial != "b":
                    settings[step, image, column] = 1
        settings[:, :, 1] = 1 - settings[:, :, 0]
        shift = parameters["hue"][by_turn] if "hue" in parameters else None
        indices = np.stack([by_turn, np.argsort(by_turn)])
        numbers = tensor(settings.astype(np.float32), images.device)
        forward, back = tensor(indices, images.device)
        result = images.index_select(0, forward)
        for place in range(3):
            if stop := int((turn > place).sum()):
                result[:stop] = blend(result[:stop], numbers[place, :stop])
        if shift is not None:
            result = shift_hue(result, tensor(shift.astype(np.float32), images.device))
        for place in range(1, 4):
            if (start := int((turn >= place).sum())) < count:
                result[start:] = blend(result[start:], numbers[place, start:])
        return result.index_select(0, back)

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Adjust in the drawn order; saturation and hue leave grey images alone."""
        for initial in str(parameters["order"]):
            name = _FULL[initial]
            if name in parameters:
                image = ADJUST[name](image, float(parameters[name]))
        return image


#: Operations of RandAugment: (least, greatest magnitude, whether it is negated half of the time).
#: "torchvision" is that library's RandAugment, with translations as shares of the width or height;
#: "fixmatch" is the list of FixMatch's code, which MLKD's strong view uses.
SPACES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "torchvision": {
        "identity": (0, 0, False),
        "shear-x": (0, 0.3, True),
        "shear-y": (0, 0.3, True),
        "translate-x": (0, 150 / 331, True),
        "translate-y": (0, 150 / 331, True),
        "rotate": (0, 30, True),
        "brightness": (0, 0.9, True),
        "saturation": (0, 0.9, True),
        "contrast": (0, 0.9, True),
        "sharpness": (0, 0.9, True),
        "posterize": (8, 4, False),
        "solarize": (255, 0, False),
        "autocontrast": (0, 0, False),
        "equalize": (0, 0, False),
    },
    "fixmatch": {
        "autocontrast": (0, 0, False),
        "brightness": (0.05 - 1, 0.95 - 1, False),
        "saturation": (0.05 - 1, 0.95 - 1, False),
        "contrast": (0.05 - 1, 0.95 - 1, False),
        "equalize": (0, 0, False),
        "identity": (0, 0, False),
        "posterize": (4, 8, False),
        "rotate": (-30, 30, False),
        "sharpness": (0.05 - 1, 0.95 - 1, False),
        "shear-x": (-0.3, 0.3, False),
        "shear-y": (-0.3, 0.3, False),
        "solarize": (0, 256, False),
        "translate-x": (-0.3, 0.3, False),
        "translate-y": (-0.3, 0.3, False),
    },
}


class RandAugment(Augmentation):
    """`rand-augment`: a few operations drawn from a list, each with a magnitude.

    Cubuk et al., "RandAugment" (2020). Geometric operations take the nearest pixel and fill with
    black.

    Args:
        ops: how many operations, one after the other.
        magnitude: 0 to 30 (of 30), the same for all, or -1: uniformly random for each.
        space: "torchvision" or "fixmatch", see `SPACES`.
    """

    name = "rand-augment"

    def __init__(self, ops: int = 2, magnitude: int = 9, space: str = "torchvision") -> None:
        if not (1 <= ops <= 8 and -1 <= magnitude <= 30 and space in SPACES):
            raise UsageError(
                f"{self.name} needs ops in [1, 8], magnitude in [-1, 30] and space in "
                f"{tuple(SPACES)}, found ops={ops}, magnitude={magnitude}, space={space!r}"
            )
        self.ops, self.magnitude, self.space = ops, magnitude, space
        self._bits = np.rint if space == "torchvision" else np.floor

    def describe(self) -> dict[str, Any]:
        """Name and all options."""
        return {
            "name": self.name,
            "ops": self.ops,
            "magnitude": self.magnitude,
            "space": self.space,
        }

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """`op_i` (a name of `SPACES`) and `magnitude_i`, in the unit of the operation."""
        space = SPACES[self.space]
        names = np.array(list(space))
        bounds = np.array([bounds[:2] for bounds in space.values()], dtype=np.float64)
        signed = np.array([bounds[2] for bounds in space.values()])
        drawn: Parameters = {}
        for i in range(self.ops):
            uniform = draws.uniform(3, start=4 * i)
            op = below(uniform[:, 0], len(space))
            level = uniform[:, 1] if self.magnitude < 0 else np.full(len(op), self.magnitude / 30)
            magnitude = bounds[op, 0] + level * (bounds[op, 1] - bounds[op, 0])
            magnitude[signed[op] & (uniform[:, 2] < 0.5)] *= -1
            whole = names[op] == "posterize"  # a number of bits
            magnitude[whole] = self._bits(magnitude[whole])
            drawn[f"op_{i}"] = names[op]
            drawn[f"magnitude_{i}"] = magnitude
        return drawn

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Apply each kind of operation at once to all images that have it, whatever its magnitude.

        Bit-equal per image on a CPU, but for the blends of images of odd sizes, see
        `kdcache.augment.batched`.
        """
        size = images.shape[2], images.shape[3]
        rounds = [
            _sorted_by_kind(parameters[f"op_{i}"], parameters[f"magnitude_{i}"], size)
            for i in range(self.ops)
        ]
        moves, last = [], np.arange(len(images))
        for order, _, _ in rounds:  # from one order right to the next
            moves.append(last[order])
            last = np.argsort(order)
        numbers = tensor(np.stack([settings for *_, settings in rounds]), images.device)
        indices = tensor(np.stack([*moves, last]), images.device)
        for (_, counts, _), settings, index in zip(rounds, numbers, indices[:-1], strict=True):
            groups = zip(
                _KINDS.values(),
                images.index_select(0, index).split(counts),
                settings.split(counts),
                strict=True,
            )
            images = torch.cat([work(*group) for work, *group in groups if len(group[0])])
        return images.index_select(0, indices[-1])

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Apply the operations in order."""
        for i in range(self.ops):
            name, magnitude = str(parameters[f"op_{i}"]), float(parameters[f"magnitude_{i}"])
            image = apply_operation(image, name, magnitude)
        return image


#: Operations that are applied together, by what applies them to a batch, see `kdcache.augment.batched`.
_KINDS: dict[tuple[str, ...], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ("identity",): lambda images, _: images,
    ("shear-x", "shear-y", "translate-x", "translate-y", "rotate"): warp,
    ("brightness", "saturation", "contrast"): blend,
    ("sharpness",): sharpen,
    ("posterize", "solarize"): cut_levels,
    ("autocontrast",): lambda images, _: F.autocontrast(images),
    ("equalize",): lambda images, _: F.equalize(images),
}
_KIND_OF = {name: kind for kind, names in enumerate(_KINDS) for name in names}


def _sorted_by_kind(
    names: NDArray[np.str_], magnitudes: NDArray[np.float64], size: tuple[int, int]
) -> tuple[NDArray[np.int64], list[int], NDArray[np.float32]]:
    """The images (B,) in the order of `_KINDS`, how many there are of each, and their settings.

    The settings are float32 (B, `COLUMNS`), in that order, as each of `_KINDS` takes them.
    """
    distinct, which = np.unique(names, return_inverse=True)
    kind = np.array([_KIND_OF[str(name)] for name in distinct])[which]
    order = np.argsort(kind, kind="stable")
    settings = np.zeros((len(names), COLUMNS))
    for number, name in enumerate(distinct):
        mine = np.flatnonzero(which == number)
        settings[mine] = _settings(str(name), magnitudes[mine], size)
    counts = np.bincount(kind, minlength=len(_KINDS)).tolist()
    return order, counts, settings[order].astype(np.float32)


def _settings(
    name: str, magnitude: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float64]:
    """What the batched operation of that name takes for some magnitudes: (B, `COLUMNS`)."""
    result = np.zeros((len(magnitude), COLUMNS))
    match name:
        case "brightness" | "saturation" | "contrast":
            result[:, 0] = 1 + magnitude
            result[:, 1] = 1 - result[:, 0]
            result[:, 2], result[:, 3] = name == "saturation", name == "contrast"
        case "sharpness":
            result[:, 0] = 1 - (1 + magnitude)
        case "posterize":
            bits = magnitude.astype(np.int64)
            result[:, 0], result[:, 1] = 256 - (1 << (8 - bits)), 256
        case "solarize":
            result[:, 0], result[:, 1] = 255, np.minimum(magnitude, 255)
        case "rotate" | "shear-x" | "shear-y" | "translate-x" | "translate-y":
            half = 0.5 * size[1], 0.5 * size[0]
            # torchvision divides in float32 too
            matrix = _inverse(name, magnitude, half).astype(np.float32)
            result[:] = (matrix / np.array(half, np.float32)[:, None]).reshape(-1, 6)
    return result


def _inverse(
    name: str, magnitude: NDArray[np.float64], half: tuple[float, float]
) -> NDArray[np.float64]:
    """Inverse matrices (B, 2, 3) in pixels from the centre; `half` the width and height."""
    result = np.tile(np.eye(2, 3), (len(magnitude), 1, 1))
    match name:
        case "rotate":
            angle = np.radians(-(magnitude % 360))
            cos, sin = np.cos(angle), np.sin(angle)
            result[:, 0, 0], result[:, 0, 1] = cos, sin
            result[:, 1, 0], result[:, 1, 1] = -sin, cos
        case "translate-x" | "translate-y":
            axis = int(name == "translate-y")
            result[:, axis, 2] = -np.trunc(magnitude * 2 * half[axis])
        case _:  # around the upper left corner
            axis = int(name == "shear-y")
            tangent = np.tan(np.radians(np.degrees(np.arctan(magnitude))))
            result[:, axis, 1 - axis] = tangent
            result[:, axis, 2] = tangent * half[1 - axis]
    return result


def apply_operation(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    """One operation of RandAugment on uint8 (..., C, H, W); `name` and unit as in `SPACES`."""
    result: torch.Tensor
    match name:
        case "identity":
            result = image
        case "brightness" | "saturation" | "contrast":
            result = ADJUST[name](image, 1 + magnitude)
        case "sharpness":
            result = F.adjust_sharpness(image, 1 + magnitude)
        case "rotate":
            result = F.rotate(image, magnitude, InterpolationMode.NEAREST)
        case "posterize":
            result = F.posterize(image, int(magnitude))
        case "solarize":
            result = F.solarize(image, min(magnitude, 255))
        case "autocontrast":
            result = F.autocontrast(image)
        case "equalize":
            result = F.equalize(image)
        case "shear-x" | "shear-y" | "translate-x" | "translate-y":
            result = _affine(image, name, magnitude)
        case _:
            raise UsageError(f"RandAugment has no operation {name!r}")
    return result


def _affine(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    height, width = image.shape[-2:]
    translate, shear, center = [0, 0], [0.0, 0.0], None
    match name:
        case "translate-x":
            translate[0] = int(magnitude * width)
        case "translate-y":
            translate[1] = int(magnitude * height)
        case "shear-x" | "shear-y":  # around the upper left corner, as PIL and the papers' codes do
            center = [0.0, 0.0]
            shear[name == "shear-y"] = float(np.degrees(np.arctan(magnitude)))
    result: torch.Tensor = F.affine(
        image,
        angle=0.0,
        translate=translate,
        scale=1.0,
        shear=shear,
        interpolation=InterpolationMode.NEAREST,
        center=center,
    )
    return result

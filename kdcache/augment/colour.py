"""Colour jitter and RandAugment."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes, tensor
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
    batched = False

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
        """Apply each operation at once to all images that share it and its magnitude.

        Bit-equal per image. With a fixed magnitude that is a call per operation and sign; with random
        ones hardly any images share theirs.
        """
        result = images.clone()
        for i in range(self.ops):
            magnitudes = parameters[f"magnitude_{i}"]
            for name in np.unique(parameters[f"op_{i}"]):
                chosen = np.flatnonzero(parameters[f"op_{i}"] == name)
                for magnitude in np.unique(magnitudes[chosen]):
                    index = tensor(chosen[magnitudes[chosen] == magnitude], images.device)
                    group = result.index_select(0, index)
                    group = apply_operation(group, str(name), float(magnitude))
                    result.index_copy_(0, index, group)
        return result

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """Apply the operations in order."""
        for i in range(self.ops):
            name, magnitude = str(parameters[f"op_{i}"]), float(parameters[f"magnitude_{i}"])
            image = apply_operation(image, name, magnitude)
        return image


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

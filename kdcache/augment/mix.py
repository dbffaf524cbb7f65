"""Two images in one view: mixup and cutmix. The partner is drawn from the plan, not from the
batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv

from kdcache.augment.augmentation import Augmentation, Identity, Parameters, Sizes, tensor
from kdcache.philox import Draws, below
from kdcache_stores.errors import UsageError


class Mix(Augmentation):
    """Mixes a view with the same view of a partner, another sample of the plan.

    The partner and lambda are a pure function of (plan, key, view): the partner is a row of the
    plan, uniform over all of them, and its label mixes into the target as lambda * own + (1 -
    lambda) * partner. Own and partner image are first augmented by `base`, each with its own
    parameters.

    Args:
        alpha: lambda ~ Beta(alpha, alpha).
        base: what comes before the mix.
    """

    def __init__(self, alpha: float = 1.0, base: Augmentation | None = None) -> None:
        if not alpha > 0:
            raise UsageError(f"{self.name} needs alpha > 0, found {alpha}")
        self.alpha = float(alpha)
        self.base = base if base is not None else Identity()
        self.batched = self.base.batched
        self.decode_side = self.base.decode_side
        if isinstance(self.base, Mix) or self.base.views is not None:
            raise UsageError(f"{self.name} cannot follow {self.base.name!r}")

    def describe(self) -> dict[str, Any]:
        """Name, alpha and the description of the base."""
        return {"name": self.name, "alpha": self.alpha, "base": self.base.describe()}

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """The parameters of the base alone; the mix itself is drawn by `draw_mix`."""
        return self.base.draw(draws.part(0), sizes)

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """Sizes after the base."""
        return self.base.output_sizes(sizes)

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Apply the base alone."""
        return self.base.apply(images, parameters)

    def unused(self, parameters: Parameters) -> dict[str, NDArray[np.bool_]]:
        """As the base has it."""
        return self.base.unused(parameters)

    def draw_lambda(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Beta(alpha, alpha) by inversion; for alpha = 1 the uniform number itself."""
        if self.alpha == 1:
            return uniform
        return np.asarray(betaincinv(self.alpha, self.alpha, uniform))

    def partners(self, draws: Draws, population: int) -> NDArray[np.int64]:
        """The `partner` of `draw_mix` alone: int64 (B,)."""
        return below(draws.part(1).uniform(1)[:, 0], population)

    @abstractmethod
    def draw_mix(self, draws: Draws, sizes: Sizes, population: int) -> Parameters:
        """`partner` (row of the plan), `lambda` (float32) and what else the mix needs, (B,) each.

        Args:
            draws: as in `draw`.
            sizes: int64 (B, 2), sizes after the base.
            population: number of samples of the plan.
        """

    @abstractmethod
    def mix(
        self, images: torch.Tensor, partners: torch.Tensor, parameters: Parameters
    ) -> torch.Tensor:
        """Mix two batches uint8 (B, C, H, W) on their device."""


class Mixup(Mix):
    """`mixup`: lambda * image + (1 - lambda) * partner, rounded to uint8.

    Zhang et al., "mixup: beyond empirical risk minimization" (2018). In float32; may differ by 1
    between devices.
    """

    name = "mixup"

    def draw_mix(self, draws: Draws, sizes: Sizes, population: int) -> Parameters:
        """`partner` and `lambda`."""
        uniform = draws.part(1).uniform(2)
        return {
            "partner": below(uniform[:, 0], population),
            "lambda": self.draw_lambda(uniform[:, 1]).astype(np.float32),
        }

    def mix(
        self, images: torch.Tensor, partners: torch.Tensor, parameters: Parameters
    ) -> torch.Tensor:
        """Blend."""
        lam = tensor(parameters["lambda"], images.device)[:, None, None, None]
        blend = images.float() * lam + partners.float() * (1 - lam)
        return blend.round_().to(torch.uint8)


class Cutmix(Mix):
    """`cutmix`: a box of the image is replaced by the partner's; lambda is the share that stays.

    Yun et al., "CutMix" (2019): the box has (1 - lambda) of the area and a uniform centre, and is
    cut at the edges, after which lambda is computed anew. Bit-equal on all devices.
    """

    name = "cutmix"

    def draw_mix(self, draws: Draws, sizes: Sizes, population: int) -> Parameters:
        """`partner`, `lambda` and the box `box_top`, `box_left`, `box_height`, `box_width`."""
        uniform = draws.part(1).uniform(4)
        side = np.sqrt(1 - self.draw_lambda(uniform[:, 1]))
        drawn: Parameters = {"partner": below(uniform[:, 0], population)}
        area = np.ones(len(uniform))
        for axis, (start, extent) in enumerate(
            (("box_top", "box_height"), ("box_left", "box_width"))
        ):
            limit = sizes[:, axis]
            center = below(uniform[:, axis + 2], limit)
            half = np.floor(side * limit).astype(np.int64) // 2
            first, last = np.maximum(center - half, 0), np.minimum(center + half, limit)
            drawn[start], drawn[extent] = first, last - first
            area *= (last - first) / limit
        drawn["lambda"] = (1 - area).astype(np.float32)
        return drawn

    def mix(
        self, images: torch.Tensor, partners: torch.Tensor, parameters: Parameters
    ) -> torch.Tensor:
        """Take the box from the partner."""
        height, width = images.shape[-2:]
        top, left, tall, wide = (
            tensor(parameters[name], images.device)[:, None]
            for name in ("box_top", "box_left", "box_height", "box_width")
        )
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        rows = (y >= top) & (y < top + tall)
        columns = (x >= left) & (x < left + wide)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(inside, partners, images)

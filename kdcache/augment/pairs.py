"""A weak and a strong view of every sample, as multi-level distillation wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.augment.augmentation import Augmentation, Parameters, Sizes, within
from kdcache.augment.mix import Mix
from kdcache.philox import Draws
from kdcache_stores.errors import UsageError


class WeakStrong(Augmentation):
    """`weak+strong`: view 2i is the weak, view 2i + 1 the strong view of a sample.

    Each draws its own crop, as the code of MLKD does (Jin, Wang, Lin, "Multi-level logit
    distillation", CVPR 2023): weak is pad-crop-flip; strong is pad-crop-flip, two operations of
    FixMatch's RandAugment of random magnitude, and a cutout.

    Args:
        weak: augmentation of even views.
        strong: augmentation of odd views.
    """

    name = "weak+strong"

    def __init__(self, weak: Augmentation, strong: Augmentation) -> None:
        for part in (weak, strong):
            if isinstance(part, Mix | WeakStrong) or part.views is not None:
                raise UsageError(f"{self.name} cannot be made of {part.name!r}")
        if weak.decode_side != strong.decode_side:
            raise UsageError(f"{self.name}: weak and strong views need one decode_side")
        self.weak, self.strong = weak, strong
        self.decode_side = weak.decode_side
        self.batched = weak.batched and strong.batched

    def describe(self) -> dict[str, Any]:
        """Name and both descriptions."""
        return {
            "name": self.name,
            "weak": self.weak.describe(),
            "strong": self.strong.describe(),
        }

    def draw(self, draws: Draws, sizes: Sizes) -> Parameters:
        """`strong`, and the parameters of both as `weak.x` and `strong.x`; one half is unused."""
        drawn: Parameters = {"strong": draws.views % 2 == 1}
        for index, (prefix, part) in enumerate((("weak", self.weak), ("strong", self.strong))):
            for name, values in part.draw(draws.part(index), sizes).items():
                drawn[f"{prefix}.{name}"] = values
        return drawn

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """Both parts must give the same sizes."""
        weak, strong = self.weak.output_sizes(sizes), self.strong.output_sizes(sizes)
        if not np.array_equal(weak, strong):
            raise UsageError(f"{self.name}: weak and strong views must have the same size")
        return weak

    def apply(self, images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Each part on its views of the batch."""
        result: torch.Tensor | None = None
        for prefix, part, chosen in (
            ("weak", self.weak, np.flatnonzero(~parameters["strong"])),
            ("strong", self.strong, np.flatnonzero(parameters["strong"])),
        ):
            if len(chosen):
                mine = {name: v[chosen] for name, v in within(prefix, parameters).items()}
                index = torch.from_numpy(chosen).to(images.device)
                done = part.apply(images.index_select(0, index), mine)
                if result is None:
                    result = done.new_empty((len(images), *done.shape[1:]))
                result.index_copy_(0, index, done)
        assert result is not None
        return result

    def apply_one(self, image: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
        """The part that the view belongs to."""
        if parameters["strong"]:
            return self.strong.apply_one(image, within("strong", parameters))
        return self.weak.apply_one(image, within("weak", parameters))

    def unused(self, parameters: Parameters) -> dict[str, NDArray[np.bool_]]:
        """The weak parameters of strong views, and the other way round."""
        strong = parameters["strong"]
        masks: dict[str, NDArray[np.bool_]] = {}
        for prefix, part, off in (("weak", self.weak, strong), ("strong", self.strong, ~strong)):
            mine = within(prefix, parameters)
            inner = part.unused(mine)
            masks |= {f"{prefix}.{name}": off | inner.get(name, False) for name in mine}
        return masks

"""Feature maps as the methods look at them: averaged to another size, or as attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def averaged(features: Tensor, height: int, width: int | None = None) -> Tensor:
    """A map (B, C, H, W) average-pooled to (B, C, height, width); width is height where it is not given.

    Where the new size does not divide the old one the windows overlap, so that the mean of the result
    is not the mean of the map.
    """
    size = (height, height if width is None else width)
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)


def attention(features: Tensor) -> Tensor:
    """Where a stage is active: the mean over channels of f squared, of unit length. (B, C, H, W) -> (B, H, W).

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, with p = 2.
    """
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features.square().mean(1).flatten(1)).view(-1, *features.shape[2:])


def attention_at(maps: Sequence[Tensor], height: int) -> Tensor:
    """Attention of all stages that are at least so high, their maps averaged to that height first.

    Args:
        maps: (B, C, H, W) of each stage, from first to last; no stage is higher than the one before.
        height: of the result; its width keeps the ratio.

    Returns:
        (B, stages, height, width).
    """
    high = [m for m in maps if m.shape[2] >= height]
    width = max(1, round(height * maps[0].shape[3] / maps[0].shape[2]))
    return torch.stack([attention(averaged(m, height, width)) for m in high], 1)


def attention_heights(heights: Sequence[int]) -> list[int]:
    """Heights at which students may look at stages of these heights, the largest first.

    Those of the stages, and halves of them down to 2: a student's stages halve as the teacher's do.

    >>> attention_heights([32, 16, 8]), attention_heights([56, 28, 14, 7])
    ([32, 16, 8, 4, 2], [56, 28, 14, 7])
    """
    result = set(heights)
    for height in heights:
        while height % 2 == 0 and height > 2:
            height //= 2
            result.add(height)
    return sorted(result, reverse=True)

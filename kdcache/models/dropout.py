"""Dropout with fixed masks: one posterior sample of a network (Gal and Ghahramani 2016).

Ordinary dropout draws a mask per image of a batch, so that logits depend on the batch. Here one
mask serves every image: a sample is one thinned network, its logits a function of the image.
"""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn

from kdcache_stores.errors import UsageError

#: The layers that drop single features, and those that drop whole channels.
FEATURES = (nn.Dropout,)
CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class FixedDropout(nn.Module):
    """Multiplies features by one mask of 0 and 1 / (1 - p), drawn once for their shape.

    Args:
        p: probability of a zero.
        whole_channels: drop channels (B, C, ...) as a whole, as Dropout2d does.
        key: with the shape, the seed of the mask; nothing else is.
    """

    def __init__(self, p: float, whole_channels: bool, key: str) -> None:
        super().__init__()
        self.p = p
        self.whole_channels = whole_channels
        self.key = key
        self.masks: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) times the mask of its shape without B."""
        shape = tuple(x.shape[1:])
        if self.whole_channels:
            shape = (shape[0], *(1 for _ in shape[1:]))
        if shape not in self.masks:
            self.masks[shape] = self._draw(shape).to(x.device)
        return x * self.masks[shape].to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # nothing there to trace
    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        # On the CPU, by a generator of its own: the same mask on every device, in any order of use.
        digest = hashlib.sha256(f"{self.key} {shape}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        kept = torch.rand(shape, generator=generator, dtype=torch.float64) >= self.p
        return kept.float() / (1 - self.p)

    def extra_repr(self) -> str:
        """For `print(module)`."""
        return f"p={self.p}, whole_channels={self.whole_channels}"


def fix_dropout(module: nn.Module, seed: int) -> nn.Module:
    """A copy of the module, weights shared, with every active dropout layer's mask fixed.

    Args:
        module: its dropout layers must be nn.Dropout or nn.Dropout1d/2d/3d, batch first.
        seed: of the posterior sample.

    Raises:
        UsageError: the module has no dropout layer with p > 0, so all samples would be equal.
    """
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    sample = copy.deepcopy(module, shared)
    layers = {
        name: layer
        for name, layer in sample.named_modules()
        if isinstance(layer, FEATURES + CHANNELS) and layer.p > 0
    }
    if not layers:
        raise UsageError(
            f"MC dropout: {type(module).__name__} has no dropout layer with p > 0, so that every "
            "posterior sample would be the same. Use several checkpoints of one training run "
            "instead, or a model with dropout, such as wrn_16_2_dropout"
        )
    for name, layer in layers.items():
        if layer.p >= 1:
            raise UsageError(f"MC dropout: layer {name} drops everything (p = {layer.p})")
        fixed = FixedDropout(layer.p, isinstance(layer, CHANNELS), f"{seed} {name}")
        if not name:
            return fixed
        parent, _, child = name.rpartition(".")
        setattr(sample.get_submodule(parent), child, fixed)
    return sample

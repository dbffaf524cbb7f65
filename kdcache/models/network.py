"""What every network of the zoo has in common: stages, pooled features, a linear head."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """An image classifier as stages, global average pooling and one linear head.

    A subclass defines `stages` and `head`; logits are `head(pooled(stages(x)[-1]))`.
    """

    def stages(self, x: Tensor) -> list[Tensor]:
        """The stem's output and each stage's, (B, C, H, W) each, the deepest last."""
        raise NotImplementedError

    def pooled(self, features: Tensor) -> Tensor:
        """The vector (B, D) that the head sees, from the deepest stage's map (B, C, H, W)."""
        return F.adaptive_avg_pool2d(features, 1).flatten(1)

    @property
    def head(self) -> nn.Linear:
        """The last layer, (B, D) -> (B, classes)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        logits: Tensor = self.head(self.pooled(self.stages(x)[-1]))
        return logits


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size (or divides it by the stride)."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def run(x: Tensor, stages: Iterator[nn.Module] | list[nn.Module]) -> list[Tensor]:
    """The outputs of modules applied one after another, `x` itself first."""
    outputs = [x]
    for stage in stages:
        outputs.append(stage(outputs[-1]))
    return outputs


def init_fan_out(net: nn.Module) -> None:
    """Kaiming-normal convolutions, std sqrt(2 / (k^2 C_out)) (He et al. 2015, eq. 14)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

"""What every network of the zoo has in common: stages, pooled features, a linear head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Stage(NamedTuple):
    """The map of a stage, (B, C, H, W) both times.

    Attributes:
        before: its last ReLU; the same as `after` where the stage ends without one.
        after: what the next stage takes.
    """

    before: Tensor
    after: Tensor


class Network(nn.Module):
    """An image classifier as stages, global average pooling and one linear head.

    A subclass defines `stages` and `head`; logits are `head(pooled(last(stages(x))))`.
    """

    def stages(self, x: Tensor) -> list[Stage]:
        """The stem's map and each stage's, the deepest last."""
        raise NotImplementedError

    def last(self, stages: Sequence[Stage]) -> Tensor:
        """The last map (B, D, H, W), of which the head sees the mean."""
        return stages[-1].after

    def pooled(self, last: Tensor) -> Tensor:
        """The vector (B, D) that the head sees, from the last map (B, D, H, W)."""
        return F.adaptive_avg_pool2d(last, 1).flatten(1)

    def norms(self) -> list[nn.BatchNorm2d]:
        """The batch norm before the last ReLU of each stage but the stem; none where there is none."""
        return []

    @property
    def head(self) -> nn.Linear:
        """The last layer, (B, D) -> (B, classes)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        logits: Tensor = self.head(self.pooled(self.last(self.stages(x))))
        return logits


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size (or divides it by the stride)."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class Block(nn.Module):
    """A block that ends with a ReLU, or with what stands for it (`after`)."""

    def before(self, x: Tensor) -> Tensor:
        """What its last ReLU is taken of."""
        raise NotImplementedError

    def after(self, before: Tensor) -> Tensor:
        """The output, from what is before the last ReLU."""
        return F.relu(before)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.after(self.before(x))


def run(stem: Tensor, stages: Sequence[nn.Sequential]) -> list[Stage]:
    """The maps of stages of blocks applied one after another, the stem's first.

    Args:
        stem: (B, C, H, W), before the stem's ReLU.
        stages: `Block`s each.
    """
    maps = [Stage(stem, F.relu(stem))]
    for stage in stages:
        x = maps[-1].after
        *blocks, last = stage
        for block in blocks:
            x = block(x)
        assert isinstance(last, Block)
        before = last.before(x)
        maps.append(Stage(before, last.after(before)))
    return maps


def init_fan_out(net: nn.Module) -> None:
    """Kaiming-normal convolutions, std sqrt(2 / (k^2 C_out)) (He et al. 2015, eq. 14)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Within, the batch norms of a network use the mean and variance of each batch, in eval mode too.

    Their running numbers are neither used nor changed.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks

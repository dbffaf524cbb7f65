"""Wide residual networks for small images (Zagoruyko and Komodakis 2016), pre-activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.network import Network, Stage, conv1x1, conv3x3, init_fan_out


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, dropout, 3x3; the shortcut is the input or a 1x1 convolution of it.

    Where the width changes, the shortcut starts after the first ReLU, as in the published teachers.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(outputs, outputs)
        self.convShortcut = conv1x1(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, x: Tensor, normalised: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride).

        Args:
            x: the input.
            normalised: `bn1` of it, where it is there already.
        """
        out = F.relu(self.bn1(x) if normalised is None else normalised)
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        residual: Tensor = self.conv2(self.dropout(out))
        return shortcut + residual


class WideStage(nn.Module):
    """One stage of blocks; the blocks lie under `layer`, as their published names say."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int, dropout: float) -> None:
        super().__init__()
        blocks = [PreActivationBlock(inputs, outputs, stride, dropout)]
        blocks += [PreActivationBlock(outputs, outputs, 1, dropout) for _ in range(depth - 1)]
        self.layer = nn.Sequential(*blocks)

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch norm that the stage begins with."""
        first = self.layer[0]
        assert isinstance(first, PreActivationBlock)
        return first.bn1

    def forward(self, x: Tensor, normalised: Tensor) -> Tensor:
        """(B, inputs, H, W) and `norm` of it -> (B, outputs, H / stride, W / stride)."""
        first, *blocks = self.layer
        out: Tensor = first(x, normalised)
        for block in blocks:
            out = block(out)
        return out


class WideResNet(Network):
    """WRN-d-k: a 3x3 stem of 16 channels, three stages of (d - 4) / 6 blocks, k times as wide."""

    def __init__(
        self, depth: int, widen: int, classes: int, channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv3x3(channels, 16)
        self.block1 = WideStage(16, 16 * widen, n, 1, dropout)
        self.block2 = WideStage(16 * widen, 32 * widen, n, 2, dropout)
        self.block3 = WideStage(32 * widen, 64 * widen, n, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        init_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def stages(self, x: Tensor) -> list[Stage]:
        """Four maps: the stem's and three stages'.

        A stage ends with a sum, which the next one takes: that is `Stage.after`. `Stage.before` is what
        the next ReLU is taken of, the sum after the batch norm that follows.
        """
        blocks = [self.block1, self.block2, self.block3]
        x = self.conv1(x)
        maps: list[Stage] = []
        for block in blocks:
            maps.append(Stage(block.norm(x), x))
            x = block(x, maps[-1].before)
        return [*maps, Stage(self.bn1(x), x)]

    def norms(self) -> list[nn.BatchNorm2d]:
        """Those that follow the three stages."""
        return [self.block2.norm, self.block3.norm, self.bn1]

    def last(self, stages: Sequence[Stage]) -> Tensor:
        """(B, 64 k, H, W): the last stage after its batch norm and ReLU."""
        return F.relu(stages[-1].before)

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc


SIZES = ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2), (40, 4))

#: The published teachers have no dropout. Those with it (p = 0.3, the paper's) serve MC dropout.
WRNS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"wrn_{d}_{k}": partial(WideResNet, d, k) for d, k in SIZES},
    **{f"wrn_{d}_{k}_dropout": partial(WideResNet, d, k, dropout=0.3) for d, k in SIZES if k > 1},
}

"""ResNets for small images (He et al. 2016): 6n+2 layers, and ResNet-18/50 with a 3x3 stem.

Widths, shortcuts and state-dict names are those of the published CIFAR-100 distillation teachers
(RepDistiller, mdistiller), so their checkpoints load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.network import Block, Network, Stage, conv1x1, conv3x3, init_fan_out, run


class BasicBlock(Block):
    """Two 3x3 convolutions beside an identity or a projection (1x1 convolution + batch norm)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = add_projection(self, shortcut, inputs, width, stride)

    def before(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        total: Tensor = self.bn2(self.conv2(out)) + getattr(self, self.shortcut_name)(x)
        return total


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, four times as wide at the end, beside the shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut_name = add_projection(self, shortcut, inputs, outputs, stride)

    def before(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        total: Tensor = self.bn3(self.conv3(out)) + getattr(self, self.shortcut_name)(x)
        return total


BlockKind = type[BasicBlock] | type[Bottleneck]


def add_projection(block: nn.Module, name: str, inputs: int, outputs: int, stride: int) -> str:
    """Give the block a shortcut under its published name; identity where the shapes agree."""
    if stride == 1 and inputs == outputs:
        block.add_module(name, nn.Identity())
    else:
        projection = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        block.add_module(name, projection)
    return name


def stage(
    block: BlockKind, inputs: int, width: int, depth: int, stride: int, name: str
) -> nn.Sequential:
    """`depth` blocks, the first of which takes the stride and the change of width."""
    outputs = width * block.expansion
    blocks: list[nn.Module] = [block(inputs, width, stride, name)]
    blocks += [block(outputs, width, 1, name) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def last_norm(stage: nn.Sequential) -> nn.BatchNorm2d:
    """The last batch norm of a stage's last block; the shortcut is added after it."""
    block = stage[-1]
    assert isinstance(block, (BasicBlock, Bottleneck))
    return block.bn3 if isinstance(block, Bottleneck) else block.bn2


class CifarResNet(Network):
    """The 6n+2 ResNet: a 3x3 stem, three stages of n blocks at full, half and quarter size."""

    def __init__(self, depth: int, widths: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        stem, *wide = widths
        n = (depth - 2) // 6
        self.conv1 = conv3x3(channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = stage(BasicBlock, stem, wide[0], n, 1, "downsample")
        self.layer2 = stage(BasicBlock, wide[0], wide[1], n, 2, "downsample")
        self.layer3 = stage(BasicBlock, wide[1], wide[2], n, 2, "downsample")
        self.fc = nn.Linear(wide[2], classes)
        init_fan_out(self)

    def stages(self, x: Tensor) -> list[Stage]:
        """Four maps: the stem's and three stages'."""
        return run(self.bn1(self.conv1(x)), [self.layer1, self.layer2, self.layer3])

    def norms(self) -> list[nn.BatchNorm2d]:
        """The last of each stage's last block."""
        return [last_norm(stage) for stage in (self.layer1, self.layer2, self.layer3)]

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc


class WideStemResNet(Network):
    """ResNet-18/50 of ImageNet with a 3x3 stride-1 stem and no max-pool, for small images."""

    def __init__(
        self, block: BlockKind, depths: tuple[int, ...], classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        e = block.expansion
        self.layer1 = stage(block, 64, 64, depths[0], 1, "shortcut")
        self.layer2 = stage(block, 64 * e, 128, depths[1], 2, "shortcut")
        self.layer3 = stage(block, 128 * e, 256, depths[2], 2, "shortcut")
        self.layer4 = stage(block, 256 * e, 512, depths[3], 2, "shortcut")
        self.linear = nn.Linear(512 * e, classes)
        init_fan_out(self)

    def stages(self, x: Tensor) -> list[Stage]:
        """Five maps: the stem's and four stages'."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return run(self.bn1(self.conv1(x)), stages)

    def norms(self) -> list[nn.BatchNorm2d]:
        """The last of each stage's last block."""
        return [last_norm(stage) for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear


THIN = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)

RESNETS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{d}": partial(CifarResNet, d, THIN) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(CifarResNet, d, WIDE) for d in (8, 32)},
    "ResNet18": partial(WideStemResNet, BasicBlock, (2, 2, 2, 2)),
    "ResNet50": partial(WideStemResNet, Bottleneck, (3, 4, 6, 3)),
}

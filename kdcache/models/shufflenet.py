"""ShuffleNetV1 (3 groups) and ShuffleNetV2 (1x) for small images: a 1x1 stem and no max-pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.network import Block, Network, Stage, conv1x1, run


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    """A 3x3 convolution of each channel by itself."""
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class GroupedUnit(Block):
    """ShuffleNetV1's unit (Zhang et al. 2018, fig. 2): grouped 1x1, shuffle, depthwise, 1x1.

    With stride 2 the average-pooled input is concatenated, else the input is added.
    """

    GROUPS = 3

    def __init__(self, inputs: int, outputs: int, stride: int, first_groups: int) -> None:
        super().__init__()
        hidden = outputs // 4
        self.conv1 = nn.Conv2d(inputs, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = depthwise(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, groups=self.GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride = stride

    def before(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, inputs + outputs, H / 2, W / 2), or the input's shape."""
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            total: Tensor = out + x
            return total
        return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)


class ShuffleNetV1(Network):
    """ShuffleNetV1 with 3 groups: 240, 480, 960 channels, 4, 8, 4 units."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(channels, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.linear = nn.Linear(960, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
        # The stem's 24 channels are too few to be grouped (section 3.2).
        groups = 1 if inputs == 24 else GroupedUnit.GROUPS
        units = [GroupedUnit(inputs, outputs - inputs, 2, groups)]
        units += [GroupedUnit(outputs, outputs, 1, GroupedUnit.GROUPS) for _ in range(depth - 1)]
        return nn.Sequential(*units)

    def stages(self, x: Tensor) -> list[Stage]:
        """Four maps: the stem's and three stages'."""
        return run(self.bn1(self.conv1(x)), [self.layer1, self.layer2, self.layer3])

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear


class SplitUnit(Block):
    """ShuffleNetV2's unit (Ma et al. 2018, fig. 3c): half of the channels pass untouched."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def before(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), the same out; the untouched half is of a ReLU, so another changes nothing."""
        untouched, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        shuffled: Tensor = self.shuffle(torch.cat([untouched, out], 1))
        return shuffled


class HalvingUnit(Block):
    """ShuffleNetV2's spatial down-sampling (fig. 3d): both branches see all channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = depthwise(inputs, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = conv1x1(inputs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(inputs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def before(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        shuffled: Tensor = self.shuffle(torch.cat([left, right], 1))
        return shuffled


class ShuffleNetV2(Network):
    """ShuffleNetV2 1x: 116, 232, 464 channels, 1 + 3, 1 + 7, 1 + 3 units, 1024 at the end."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(channels, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
        return nn.Sequential(
            HalvingUnit(inputs, outputs), *(SplitUnit(outputs) for _ in range(depth))
        )

    def stages(self, x: Tensor) -> list[Stage]:
        """Four maps: the stem's and three stages'."""
        return run(self.bn1(self.conv1(x)), [self.layer1, self.layer2, self.layer3])

    def last(self, stages: Sequence[Stage]) -> Tensor:
        """(B, 1024, H, W) from the last stage, by a 1x1 convolution."""
        return F.relu(self.bn2(self.conv2(stages[-1].after)))

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear


SHUFFLENETS: dict[str, Callable[[int, int], nn.Module]] = {
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}

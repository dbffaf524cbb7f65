"""MobileNetV2 of half width for small images, and MobileNetV1 for ImageNet.

Both as the published distillation students define them: ReLU where the papers have ReLU6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.network import Network, Stage, conv1x1, init_fan_out


def conv_bn_relu(inputs: int, outputs: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    """A 1x1 convolution, batch norm and ReLU."""
    return [conv1x1(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def split(layers: nn.Sequential, x: Tensor) -> Stage:
    """The output of layers that end with a ReLU, and what that is taken of."""
    for layer in list(layers)[:-1]:
        x = layer(x)
    return Stage(x, F.relu(x))


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1 without ReLU; added to the input if it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *pointwise(inputs, hidden),
            *conv_bn_relu(hidden, hidden, stride, groups=hidden),
            *pointwise(hidden, outputs)[:-1],
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(Network):
    """MobileNetV2 (Sandler et al. 2018, table 2) of half width; of its strides, 1/16 remain."""

    # expansion, channels at full width, blocks, stride
    LAYOUT = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        inputs = 16
        self.conv1 = nn.Sequential(*conv_bn_relu(channels, inputs, 2))
        self.blocks = nn.ModuleList()
        for expansion, full, depth, stride in self.LAYOUT:
            outputs = full // 2
            layers = [InvertedResidual(inputs, outputs, stride, expansion)]
            layers += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(nn.Sequential(*layers))
            inputs = outputs
        self.conv2 = nn.Sequential(*pointwise(inputs, 1280))
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        init_fan_out(self)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def stages(self, x: Tensor) -> list[Stage]:
        """Five maps: the stem's and those at the end of each published stage, which have no ReLU."""
        stem = split(self.conv1, x)
        maps, x = [stem], stem.after
        for block in self.blocks:
            x = block(x)
            maps.append(Stage(x, x))
        return [maps[i] for i in (0, 2, 3, 5, 7)]

    def last(self, stages: Sequence[Stage]) -> Tensor:
        """(B, 1280, H, W) from the last stage, by a 1x1 convolution."""
        result: Tensor = self.conv2(stages[-1].after)
        return result

    @property
    def head(self) -> nn.Linear:
        """`classifier.0`."""
        linear = self.classifier[0]
        assert isinstance(linear, nn.Linear)
        return linear


class MobileNetV1(Network):
    """MobileNetV1 (Howard et al. 2017, table 1), the published ImageNet student."""

    # outputs and stride of the thirteen depthwise separable convolutions
    LAYOUT = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
    )

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        inputs = 32
        layers = [nn.Sequential(*conv_bn_relu(channels, inputs, 2))]
        for outputs, stride in self.LAYOUT:
            depthwise = conv_bn_relu(inputs, inputs, stride, groups=inputs)
            layers.append(nn.Sequential(*depthwise, *pointwise(inputs, outputs)))
            inputs = outputs
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def stages(self, x: Tensor) -> list[Stage]:
        """Five maps: the stem's and those at 1/4, 1/8, 1/16 and 1/32 of the size."""
        maps: list[Stage] = []
        for layer in self.model:
            assert isinstance(layer, nn.Sequential)
            maps.append(split(layer, maps[-1].after if maps else x))
        return [maps[i] for i in (0, 3, 5, 11, 13)]

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc


MOBILENETS: dict[str, Callable[[int, int], nn.Module]] = {
    "MobileNetV2": MobileNetV2,
    "mobilenetv1": MobileNetV1,
}

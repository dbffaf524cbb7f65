"""VGG with batch norm for small images (Simonyan and Zisserman 2015), with one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.network import Network, Stage, init_fan_out

WIDTHS = (64, 128, 256, 512, 512)


def block(inputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` times convolution, batch norm, ReLU, without the last ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(inputs if i == 0 else width, width, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class VGG(Network):
    """Five blocks of 3x3 convolutions, halved in size after the first three.

    Images of 64 pixels or more are halved after the fourth too, as the published Tiny-ImageNet
    variant is: the last block sees maps of 4x4 for 32 pixels as for 64.
    """

    def __init__(self, depths: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        self.block0 = block(channels, WIDTHS[0], depths[0])
        self.block1 = block(WIDTHS[0], WIDTHS[1], depths[1])
        self.block2 = block(WIDTHS[1], WIDTHS[2], depths[2])
        self.block3 = block(WIDTHS[2], WIDTHS[3], depths[3])
        self.block4 = block(WIDTHS[3], WIDTHS[4], depths[4])
        self.classifier = nn.Linear(WIDTHS[4], classes)
        init_fan_out(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def stages(self, x: Tensor) -> list[Stage]:
        """Five maps, each block's before it is halved."""
        halvings = 4 if min(x.shape[2:]) >= 64 else 3
        maps: list[Stage] = []
        for i, layer in enumerate(
            (self.block0, self.block1, self.block2, self.block3, self.block4)
        ):
            if 0 < i <= halvings:
                x = F.max_pool2d(x, 2)
            before = layer(x)
            x = F.relu(before)
            maps.append(Stage(before, x))
        return maps

    def norms(self) -> list[nn.BatchNorm2d]:
        """The last layer of each block but the first."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return [norm for block in blocks if isinstance(norm := block[-1], nn.BatchNorm2d)]

    @property
    def head(self) -> nn.Linear:
        """`classifier`."""
        return self.classifier


DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

VGGS: dict[str, Callable[[int, int], nn.Module]] = {
    name: partial(VGG, depths) for name, depths in DEPTHS.items()
}

"""A student whose last map is projected to its teacher's and classified by the teacher's own head (SimKD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.fields.maps import averaged
from kdcache.models.network import Network, Stage, conv1x1, conv3x3
from kdcache.models.taps import head_of, source_of


class Projected(Network):
    """A network, a projector of its last map, and a teacher's frozen head.

    The projector is the published one: a 1x1, a 3x3 and a 1x1 convolution, each with batch norm and ReLU,
    the first two of `channels / factor` channels. It is part of the network: exported, evaluated and
    dumped with it.

    Args:
        network: of the zoo, of torchvision or of timm, with a last map.
        inputs: channels of its last map.
        channels: D of the teacher's last map.
        classes: K of the teacher's head.
        factor: by which the projector is narrower than the teacher's map.
        height: side of the projected map where it is smaller than the network's own.

    Attributes:
        spec: the numbers above, from which a run's network is built again.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: int,
        channels: int,
        classes: int,
        factor: int = 2,
        height: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = {"inputs": inputs, "channels": channels, "factor": factor}
        if height is not None:
            self.spec["height"] = height
        self.height = height
        self.source = source_of(network)
        own = head_of(network)
        assert own is not None
        own.requires_grad_(False)  # the teacher's stands in its place
        narrow = channels // factor
        self.projector = nn.Sequential(
            *_with_norm(conv1x1(inputs, narrow)),
            *_with_norm(conv3x3(narrow, narrow)),
            *_with_norm(conv1x1(narrow, channels)),
        )
        self.classifier = nn.Linear(channels, classes).requires_grad_(False)

    def stages(self, x: Tensor) -> list[Stage]:
        """The maps of the network's stages, then the projected map."""
        maps = self.source(x)
        last = maps.last if self.height is None else averaged(maps.last, self.height)
        projected = self.projector(last)
        return [*maps.stages, Stage(projected, projected)]

    @property
    def head(self) -> nn.Linear:
        """The teacher's, frozen."""
        return self.classifier


def _with_norm(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()


def from_spec(network: nn.Module, classes: int, spec: Mapping[str, Any]) -> Projected:
    """The network of a run, with fresh weights, by the `Projected.spec` that the run keeps."""
    return Projected(network, classes=classes, **spec)

"""Networks by name: the zoo that kdcache defines, and other libraries' by their prefix.

>>> net = build_model("resnet20", classes=100, channels=3, size=32)

A bare name is always one of the zoo (`MODELS`), `torchvision:NAME` torchvision's, `timm:NAME`
timm's, `MODULE:FUNCTION` a user's own. So `ResNet18` has the 3x3 stem for small images and
`torchvision:resnet18` is ImageNet's; a bare `resnet18` is refused, and the message says so.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kdcache.models import library
from kdcache.models.mobilenet import MOBILENETS
from kdcache.models.resnet import RESNETS
from kdcache.models.shufflenet import SHUFFLENETS
from kdcache.models.vgg import VGGS
from kdcache.models.wrn import WRNS
from kdcache_stores.errors import UnknownName, UsageError

__all__ = ["MODELS", "build_model"]

#: Every network of the zoo: name -> function of (classes, channels).
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    **RESNETS,
    **WRNS,
    **VGGS,
    **MOBILENETS,
    **SHUFFLENETS,
}

#: The smallest side of an image in pixels that a network takes.
SMALLEST = 8


def build_model(name: str, classes: int, channels: int = 3, size: int = 32) -> nn.Module:
    """A network with fresh weights, drawn from torch's default generator.

    Args:
        name: a key of `MODELS`, "torchvision:NAME", "timm:NAME" or "MODULE:FUNCTION".
        classes: how many logits it gives.
        channels: of its images, 1 or 3 as a rule.
        size: side of its square images in pixels.

    Returns:
        A module from normalised images (B, channels, size, size) float to logits (B, classes).

    Raises:
        UnknownName: there is no such network.
        UsageError: it does not work for this size or channel count, or a library is missing.
    """
    if classes < 1 or channels < 1:
        raise UsageError(
            f"model {name}: expected at least 1 class and 1 channel, "
            f"found {classes} classes and {channels} channels"
        )
    if name in MODELS:
        if size < SMALLEST:
            raise UsageError(
                f"model {name} needs images of {SMALLEST}x{SMALLEST} pixels or more, "
                f"found {size}x{size}: choose a larger size in its preprocessing"
            )
        return MODELS[name](classes, channels)
    source, _, rest = name.partition(":")
    if source == "torchvision":
        return library.build_torchvision(rest, classes, channels)
    if source == "timm":
        return library.build_timm(rest, classes, channels)
    if rest:
        return library.build_factory(name, classes, channels, size)
    if name in library.torchvision_names():
        raise UsageError(
            f"model {name!r} is not one of the zoo but torchvision's: torchvision:{name}. "
            f"The zoo has: {', '.join(MODELS)}"
        )
    raise UnknownName("model", name, MODELS)

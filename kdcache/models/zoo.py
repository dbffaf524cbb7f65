"""Networks by name: the zoo that kdcache defines, and other libraries' by their prefix.

>>> net = build_model("resnet20", classes=100, channels=3, size=32)

A bare name is always one of the zoo (`MODELS`), `torchvision:NAME` torchvision's, `timm:NAME`
timm's, `MODULE:FUNCTION` a user's own. So `ResNet18` has the 3x3 stem for small images and
`torchvision:resnet18` is ImageNet's; a bare `resnet18` is refused, and the message says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcache_stores.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from torch import nn

    from kdcache.data.item import Item

__all__ = ["MODELS", "build_model"]

# The families, "module:dictionary" of functions of (classes, channels), and whom they have. Their modules
# are imported when a network is made, so that a list of names costs no torch.
_FAMILIES = {
    "kdcache.models.resnet:RESNETS": (
        "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4",
        "resnet32x4", "ResNet18", "ResNet50",
    ),
    "kdcache.models.wrn:WRNS": (
        "wrn_16_1", "wrn_16_2", "wrn_16_4", "wrn_28_2", "wrn_28_4", "wrn_40_1", "wrn_40_2", "wrn_40_4",
        "wrn_16_2_dropout", "wrn_16_4_dropout", "wrn_28_2_dropout", "wrn_28_4_dropout", "wrn_40_2_dropout",
        "wrn_40_4_dropout",
    ),
    "kdcache.models.vgg:VGGS": ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
    "kdcache.models.mobilenet:MOBILENETS": ("MobileNetV2", "mobilenetv1"),
    "kdcache.models.shufflenet:SHUFFLENETS": ("ShuffleV1", "ShuffleV2"),
}  # fmt: skip


class Zoo(Mapping[str, "Callable[[int, int], nn.Module]"]):
    """The networks that kdcache defines: name -> function of (classes, channels)."""

    def __init__(self, families: Mapping[str, tuple[str, ...]]) -> None:
        self._homes = {name: home for home, names in families.items() for name in names}

    def __getitem__(self, name: str) -> Callable[[int, int], nn.Module]:
        module, _, family = self._homes[name].partition(":")
        networks: Mapping[str, Callable[[int, int], nn.Module]]
        networks = getattr(import_module(module), family)
        return networks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes


#: Every network of the zoo.
MODELS = Zoo(_FAMILIES)

#: The smallest side of an image in pixels that a network takes.
SMALLEST = 8


def build_model(
    name: str, classes: int, channels: int = 3, size: int = 32, item: Item | None = None
) -> nn.Module:
    """A network with fresh weights, drawn from torch's default generator.

    Args:
        name: a key of `MODELS`, "torchvision:NAME", "timm:NAME" or "MODULE:FUNCTION".
        classes: how many logits it gives.
        channels: of its images, 1 or 3 as a rule.
        size: side of its square images in pixels.
        item: what it is given where that are no images: a user's own function is called with their
            `shape`; float items (C, H, W) go to every other network too.

    Returns:
        A module from normalised images (B, channels, size, size) float, or items, to logits
        (B, classes).

    Raises:
        UnknownName: there is no such network.
        UsageError: it does not work for this size or channel count, or a library is missing.
    """
    from kdcache.models import library  # with torchvision, which a list of names does not need

    source, _, rest = name.partition(":")
    own = bool(rest) and source not in ("torchvision", "timm")
    if item is not None and not own:
        if not item.is_map:
            raise UsageError(
                f"model {name} takes images, and the dataset holds {item}: name a function of your own, "
                "MODULE:FUNCTION of (classes, shape)"
            )
        channels, size = item.shape[0], min(item.shape[1:])
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
    if source in ("torchvision", "timm"):
        build = library.build_torchvision if source == "torchvision" else library.build_timm
        try:
            return build(rest, classes, channels)
        except UnknownName:
            if rest not in MODELS:
                raise
            raise UsageError(
                f"model {name}: {source} has no {rest}; the zoo has it, without a prefix: {rest}"
            ) from None
    if own:
        offered: dict[str, Any] = {"classes": classes, "num_classes": classes}
        offered |= {"channels": channels, "size": size} if item is None else {"shape": item.shape}
        return library.build_factory(name, offered)
    raise unknown_model(name)


def unknown_model(name: str) -> UsageError:
    """What to say of a bare name that is none of the zoo."""
    from kdcache.models import library

    if name not in library.torchvision_names():
        return UnknownName("model", name, MODELS)
    return UsageError(
        f"model {name!r} is not one of the zoo but torchvision's: torchvision:{name}. "
        f"The zoo has: {', '.join(MODELS)}"
    )

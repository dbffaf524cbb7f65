"""What stands between a view and a model: channels, size, normalisation, and the precision it computes in.

Views are uint8 images that every model of a plan shares; normalisation belongs to the model. It is
part of the teacher's digest, since other pixels give other logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.data.item import Item
from kdcache_stores.errors import DataError, UnknownName, UsageError

if TYPE_CHECKING:
    from kdcache.data.dataset import Dataset

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
LARGEST_SIZE = 2**13
"""Side in pixels that views are resized to, at most."""

#: What networks compute in: float32, or below it by autocast, which keeps sums and norms in float32.
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 views to the normalised images of one model: (x / 255 - mean) / std.

    Args:
        mean: per channel, of pixels in [0, 1]; its length is the model's channel count.
        std: per channel, of pixels in [0, 1].
        size: side in pixels that views are resized to; None takes them as they are.
        interpolation: "bicubic", "bilinear" or "nearest", where views are resized.
        antialias: low-pass before shrinking (bicubic and bilinear).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    interpolation: str = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError, OverflowError):
                values = (math.nan,)
            if not all(map(math.isfinite, values)):
                raise UsageError(
                    f"preprocessing: expected a {name} of finite numbers, found {getattr(self, name)!r:.80}"
                )
            object.__setattr__(self, name, values)
        if not self.mean or len(self.mean) != len(self.std):
            raise UsageError(
                "preprocessing: expected one mean and one std per channel, "
                f"found {len(self.mean)} means and {len(self.std)} stds"
            )
        if not all(s > 0 for s in self.std):
            raise UsageError(f"preprocessing: expected stds above 0, found {self.std}")
        if self.size is not None and not (
            type(self.size) is int and 1 <= self.size <= LARGEST_SIZE
        ):
            raise UsageError(
                f"preprocessing: expected a size of 1 to {LARGEST_SIZE}, found {self.size!r:.80}"
            )
        if type(self.antialias) is not bool:
            raise UsageError(
                f"preprocessing: antialias is true or false, not {self.antialias!r:.80}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UnknownName("interpolation", self.interpolation, INTERPOLATIONS)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        resized = "" if self.size is None else f", resized to {self.size}"
        return f"mean {mean}, std {std}{resized}"

    @property
    def channels(self) -> int:
        """How many channels the model sees."""
        return len(self.mean)

    def __call__(self, views: Tensor) -> Tensor:
        """Normalised images, float32 (B, channels, H, W), on the device of the views.

        Args:
            views: uint8 (B, C, H, W), or one alone, (C, H, W), which gives (channels, H, W). Grey
                views (C = 1) are repeated for a model of 3 channels.

        Raises:
            DataError: the views are not uint8, of other dimensions or of other channels.
        """
        if views.ndim == 3:
            return self(views[None])[0]
        if views.dtype != torch.uint8 or views.ndim != 4:
            raise DataError(
                f"preprocessing: expected uint8 views (B, C, H, W), "
                f"found {views.dtype} of shape {tuple(views.shape)}"
            )
        if views.shape[1] not in (1, self.channels):
            raise DataError(
                f"preprocessing: the model takes {self.channels} channel(s), "
                f"the views have {views.shape[1]}"
            )
        images = views.float().div_(255)
        if self.size is not None and views.shape[2:] != (self.size, self.size):
            images = self._resize(images, self.size)
        # Broadcasting repeats a grey view only after it was resized once.
        mean, std = (_constant(v, views.device) for v in (self.mean, self.std))
        return images.sub(mean).div_(std)

    def _resize(self, images: Tensor, size: int) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images, (size, size), mode="nearest")
        resized = F.interpolate(
            images, (size, size), mode=self.interpolation, antialias=self.antialias
        )
        return resized.clamp_(0, 1)  # bicubic overshoots; pixels of uint8 images do not

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for digests and configurations; `from_dict` reads it back."""
        fields = asdict(self)
        return fields | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            UsageError: a field is missing or unknown, or its value makes no sense.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise UsageError(f"preprocessing: {error}; found {dict(fields)!r:.200}") from None

    @classmethod
    def measured(cls, images: Tensor) -> Preprocessing:
        """Mean and std of each channel over uint8 images (N, C, H, W), rounded to 4 digits.

        Raises:
            DataError: a channel is constant.
        """
        # Sums of counts per pixel value are exact, whatever the device and the number of images.
        counts = [torch.bincount(c.flatten(), minlength=256).double() for c in images.unbind(1)]
        levels = torch.arange(256, dtype=torch.float64, device=images.device) / 255
        means = [float((c * levels).sum() / c.sum()) for c in counts]
        squares = [float((c * levels**2).sum() / c.sum()) for c in counts]
        stds = [max(s - m * m, 0.0) ** 0.5 for m, s in zip(means, squares, strict=True)]
        if min(stds) < 1e-4:
            raise DataError(f"preprocessing: a channel of the images is constant, stds {stds}")
        return cls(tuple(round(m, 4) for m in means), tuple(round(s, 4) for s in stds))


#: What makes the input of a network of what a dataset holds: of images, or of items that are none.
Inputs = Preprocessing | Item


def inputs_from_dict(fields: Mapping[str, Any]) -> Inputs:
    """The inverse of both `to_dict`; raises `UsageError` for what is neither."""
    return Item.from_dict(fields) if "dtype" in fields else Preprocessing.from_dict(fields)


def channels_last(inputs: Tensor) -> Tensor:
    """Images (B, C, H, W) in that memory format; raises `UsageError` for items without channels."""
    if inputs.ndim != 4:
        raise UsageError(
            f"--channels-last is a memory format of images (B, C, H, W), found items of shape "
            f"{tuple(inputs.shape[1:])}: leave it out"
        )
    return inputs.contiguous(memory_format=torch.channels_last)


#: A dict, and not `functools.lru_cache`, which torch.compile does not look into.
_CONSTANTS: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, C, 1, 1) on the device, copied there once; usable in and out of inference mode."""
    if (values, device) not in _CONSTANTS:
        with torch.inference_mode(False):
            constant = torch.tensor(values, dtype=torch.float32, device=device)
            _CONSTANTS[values, device] = constant.view(1, -1, 1, 1)
    return _CONSTANTS[values, device]


#: Normalisation by the name of a dataset: what published checkpoints of it were trained with.
PREPROCESSINGS: dict[str, Preprocessing] = {
    "cifar10": Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Preprocessing((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny-imagenet": Preprocessing((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}


def normalisation(dataset: Dataset) -> Inputs:
    """Mean and std for a network trained on the dataset: the published ones, else as measured.

    Items that are no images stay as they are.
    """
    if dataset.item is not None:
        return dataset.item
    if dataset.name in PREPROCESSINGS:
        return PREPROCESSINGS[dataset.name]
    if dataset.images is None:
        return PREPROCESSINGS["imagenet"]
    return Preprocessing.measured(dataset.images)


def origin(dataset: Dataset) -> str:
    """Where `normalisation` has it from, in words that follow "preprocessing"; and what gives another."""
    if dataset.item is not None:
        return f"none for {dataset.name}"
    instead = "if the network was trained with another: --normalize NAME, or --mean and --std"
    if dataset.name in PREPROCESSINGS:
        return f"published for {dataset.name} ({instead})"
    if dataset.images is None:
        return f"ImageNet's, as the images differ in size ({instead})"
    return f"measured on {dataset.name} ({instead})"


def require_precision(name: str) -> None:
    """Raise `UnknownName` unless it is a name of `PRECISIONS`."""
    if name not in PRECISIONS:
        raise UnknownName("precision", name, PRECISIONS)


def slow_precision(
    device: str | torch.device, precision: str, capabilities: Mapping[str, Any] | None = None
) -> list[str]:
    """What to say of a precision that makes this machine slower, if it does: a sentence or none.

    Args:
        device: where the network runs; nothing is known of others than x86 processors.
        precision: a name of `PRECISIONS`.
        capabilities: of the processor, as `torch.cpu.get_capabilities` names them, which None asks.
    """
    needed = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
    if torch.device(device).type != "cpu" or precision not in needed:
        return []
    has = torch.cpu.get_capabilities() if capabilities is None else capabilities
    if has.get("architecture") != "x86_64" or any(has.get(name) for name in needed[precision]):
        return []
    return [
        f"--precision {precision}: this processor has none of {', '.join(needed[precision])} and computes it "
        "by way of float32, up to nine times slower: leave it out, unless its rounding is wanted"
    ]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a network of that precision runs on a device."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

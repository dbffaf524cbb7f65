"""Models that others define: torchvision's, timm's (an extra) and a user's own factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision.models as tv
from torch import nn

from kdcache.imports import import_own
from kdcache.models.weights import load_weights
from kdcache.preprocessing import Inputs, Preprocessing
from kdcache_stores.errors import DataError, KDCacheError, UnknownName, UsageError


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights, and what their source states about them.

    Args:
        module: with the weights loaded.
        preprocessing: what they were evaluated with, its crop as the size; None if unknown.
        file_sha256: of the file that they came from; None if unknown.
        entry: of that file, where it holds more than the weights.
    """

    module: nn.Module
    preprocessing: Inputs | None = None
    file_sha256: str | None = None
    entry: str | None = None


def torchvision_names() -> list[str]:
    """The classifiers of the installed torchvision."""
    names: list[str] = tv.list_models(module=tv)
    return names


def build_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """A torchvision classifier with fresh weights.

    Raises:
        UnknownName: torchvision has no such classifier.
        UsageError: for other than 3 channels, which torchvision's models do not take.
    """
    if name not in torchvision_names():
        raise UnknownName("torchvision model", name, torchvision_names())
    if channels != 3:
        raise UsageError(
            f"model torchvision:{name} takes 3 channels, found {channels}: give a preprocessing "
            "of three means and stds (it repeats grey images)"
        )
    module: nn.Module = tv.get_model(name, weights=None, num_classes=classes)
    return module


def pretrained_torchvision(name: str, entry: str) -> Pretrained:
    """A torchvision classifier with weights of its enum, such as "IMAGENET1K_V1" or "DEFAULT".

    Downloads them to torch's hub cache unless they are there.

    Raises:
        UnknownName: no such classifier or weights.
        DataError: the download failed, or the weights are not plain tensors.
    """
    weights = _torchvision_weights(name, entry)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        if not cached.exists():
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        # torchvision unpickles whatever lies in the cache; this proves it to be tensors first.
        file_sha256 = load_weights(cached).file_sha256
        module = tv.get_model(name, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision:{name}@{entry}: the weights could not be had from {weights.url} "
            f"({error}). Fetch them yourself and give the file: torchvision:{name}@FILE"
        ) from error
    preset = weights.transforms()
    preprocessing = Preprocessing(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
    )
    return Pretrained(module, preprocessing, file_sha256)


def torchvision_class_names(name: str, entry: str = "DEFAULT") -> list[str]:
    """The names of the classes of torchvision's own weights, in the order of the logits.

    Raises:
        UnknownName: no such classifier or weights.
    """
    return list(_torchvision_weights(name, entry).meta.get("categories", []))


def _torchvision_weights(name: str, entry: str) -> tv.WeightsEnum:
    if name not in torchvision_names():
        raise UnknownName("torchvision model", name, torchvision_names())
    members = tv.get_model_weights(name).__members__
    if entry not in members:
        raise UnknownName(f"weights of torchvision:{name}", entry, members)
    return members[entry]


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(
            f"models of timm need timm ({error}): pip install 'kdcache[timm]'"
        ) from None


def build_timm(name: str, classes: int, channels: int) -> nn.Module:
    """A timm classifier with fresh weights, such as `resnet18` or `vit_tiny_patch16_224`.

    Raises:
        UsageError: timm is not installed.
        UnknownName: timm has no such model.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise UnknownName("timm model", name, _timm_close(timm, name))
    module: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=classes, in_chans=channels
    )
    return module


def pretrained_timm(name: str, tag: str) -> Pretrained:
    """A timm classifier with the weights of a tag, such as "a1_in1k", or "DEFAULT".

    Raises:
        UsageError: timm is not installed.
        UnknownName: timm has no such model or tag.
        DataError: the download failed.
    """
    timm = _timm()
    if not timm.is_model(name):
        raise UnknownName("timm model", name, _timm_close(timm, name))
    tags = [n.removeprefix(f"{name}.") for n in timm.list_pretrained(f"{name}.*")]
    if tag not in ("DEFAULT", *tags):
        raise UnknownName(f"weights of timm:{name}", tag, ["DEFAULT", *tags])
    full = name if tag == "DEFAULT" else f"{name}.{tag}"
    try:
        module = timm.create_model(full, pretrained=True)
    except Exception as error:
        raise DataError(
            f"timm:{name}@{tag}: the weights could not be had ({error}). "
            f"Fetch them yourself and give the file: timm:{name}@FILE"
        ) from error
    return Pretrained(module, timm_preprocessing(module))


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """The preprocessing that timm states for a model of its own."""
    config: dict[str, Any] = importlib.import_module("timm.data").resolve_model_data_config(module)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=config["input_size"][-1],
        interpolation=config["interpolation"],
    )


def _timm_close(timm: ModuleType, name: str) -> list[str]:
    """Names that begin like this one: timm has over a thousand, too many for a message."""
    close: list[str] = timm.list_models(f"{name[:4]}*")
    return close or ["see timm.list_models()"]


def build_factory(spec: str, offered: Mapping[str, Any]) -> nn.Module:
    """The module that a user's function gives, named `pkg.module:function`.

    The working directory is searched too. The function is called with what it has parameters for.

    Args:
        offered: `classes` (and as `num_classes`), and `channels` and `size` of images or the `shape` of other
            items.

    Raises:
        UsageError: there is no such module or function.
        DataError: it gives something else than an nn.Module.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        module = import_own(module_name)
    except UsageError as error:
        raise UsageError(
            f"model {spec}: {error}. Other models: NAME of the zoo, torchvision:NAME, timm:NAME"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"model {spec}: module {module_name} has no function {function_name!r}")
    wanted = inspect.signature(function).parameters
    called = {name: value for name, value in offered.items() if name in wanted}
    try:
        net = function(**called)
    except KDCacheError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise UsageError(
            f"model {spec}: called as {function_name}({', '.join(f'{n}={v}' for n, v in called.items())})"
            f" it raised {type(error).__name__}: {error} (--debug shows where)"
        ) from error
    if not isinstance(net, nn.Module):
        raise DataError(f"model {spec}: expected an nn.Module, found {type(net).__name__}")
    return net

"""Augmentations by name, with explicit parameters.

A name is written `name`, `name:option=value,option=value` or a chain of these, `a+b`:
`pad-crop-flip:padding=4,flip=false+erase`. Values are numbers, true/false, words, or lists with
`/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from kdcache.augment.augmentation import Augmentation, Chain, Identity, Parameters
from kdcache.augment.colour import ColorJitter, RandAugment
from kdcache.augment.crops import CenterCrop, Exhaustive, PadCropFlip, ResizedCropFlip
from kdcache.augment.custom import Custom, is_import_path
from kdcache.augment.erase import Cutout, Erase
from kdcache.augment.mix import Cutmix, Mix, Mixup
from kdcache.augment.pairs import WeakStrong
from kdcache.data.item import Item
from kdcache_stores.errors import FormatError, UnknownName, UsageError

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Chain",
    "Custom",
    "Mix",
    "Parameters",
    "WeakStrong",
    "default_augmentation",
    "from_description",
    "make_augmentation",
]


class Images(Protocol):
    """What an augmentation's defaults depend on."""

    image_shape: tuple[int, int, int] | None
    item: Item | None
    flip: bool


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    part.name: part
    for part in (
        Identity,
        PadCropFlip,
        Exhaustive,
        ResizedCropFlip,
        CenterCrop,
        RandAugment,
        ColorJitter,
        Erase,
        Cutout,
        Mixup,
        Cutmix,
        WeakStrong,
    )
}
MLKD_FILL = (125, 123, 114)


def default_augmentation(dataset: Images) -> str:
    """The usual one for a dataset: pad-crop-flip up to 96 pixels, else resized-crop-flip.

    Of items that are no images: none.
    """
    if dataset.item is not None:
        return Identity.name
    shape = dataset.image_shape
    return "pad-crop-flip" if shape is not None and max(shape) <= 96 else "resized-crop-flip"


def make_augmentation(spec: str, dataset: Images, **options: Any) -> Augmentation:
    """Make an augmentation from its name, with the defaults that suit a dataset.

    Args:
        spec: `name`, `name:option=value,...`, a chain `a+b`, or a user's `pkg.module:factory`,
            which is imported: pass only what the user asked for, never what a store says.
        dataset: size and `flip` decide the defaults of `padding` (an eighth of the side), `size`
            (the side; 224 for images of differing sizes) and `flip`.
        options: further options of a single augmentation.

    Raises:
        UnknownName: no such augmentation.
        UsageError: no such option, or a value that makes no sense; or items that are no images.
    """
    if dataset.item is not None and spec != Identity.name:
        raise UsageError(no_augmentation(spec, dataset.item))
    if is_import_path(spec) and spec.partition(":")[0] not in AUGMENTATIONS:
        if options:
            raise UsageError(f"{spec!r} takes no options, found {sorted(options)}")
        return Custom(spec)
    # "weak+strong" holds the character that joins chains.
    specs = spec.replace("weak+strong", "weak&strong").split("+")
    parsed = [_parse(part.replace("weak&strong", "weak+strong")) for part in specs]
    if options:
        if len(parsed) > 1:
            raise UsageError("options of a chain are written into it: name:option=value+name")
        parsed[0][1].update(options)
    mix = None
    if parsed[-1][0] in (Mixup.name, Cutmix.name):
        mix = parsed.pop()
    parts = [_make(name, given, dataset) for name, given in parsed]
    base = Chain(parts) if len(parts) > 1 else parts[0] if parts else None
    if any(isinstance(part, Mix) for part in parts):
        raise UsageError(f"mixup or cutmix can only come last in a chain: {spec!r}")
    if len(parts) > 1 and any(isinstance(part, WeakStrong) for part in parts):
        raise UsageError(f"weak+strong cannot be part of a chain: {spec!r}")
    if mix is not None:
        if "base" in mix[1]:
            raise UsageError("the base of a mix is written before it: pad-crop-flip+mixup")
        return _call(mix[0], {**mix[1], "base": base})
    assert base is not None
    return base


def no_augmentation(name: str, item: Item) -> str:
    """Why items that are no images have no augmentation of this name."""
    return (
        f"{name} augments images, and the dataset holds {item}: their augmentation is none. Augment them "
        "before they are made a dataset, or leave the option out"
    )


def _make(name: str, given: dict[str, Any], dataset: Images) -> Augmentation:
    if name not in AUGMENTATIONS:
        raise UnknownName("augmentation", name, AUGMENTATIONS)
    if name == WeakStrong.name:
        return _weak_strong(given, dataset)
    accepted = inspect.signature(AUGMENTATIONS[name]).parameters
    options = {key: value for key, value in _defaults(name, dataset).items() if key in accepted}
    return _call(name, options | given)


#: What `_defaults` takes from the dataset, for the page of an augmentation.
OF_THE_DATASET = {
    "size": "the side of its images, 224 where these differ",
    "flip": "whether a mirrored image keeps its label",
    "padding": "an eighth of the side",
    "resize": "8/7 of the size",
}


def _defaults(name: str, dataset: Images) -> dict[str, Any]:
    shape = dataset.image_shape
    options: dict[str, Any] = {"flip": dataset.flip, "size": shape[-1] if shape else 224}
    if shape is not None:
        options["padding"] = shape[-1] // 8
    elif name in (PadCropFlip.name, Exhaustive.name):
        raise UsageError(
            f"{name} needs images of one size, but those of this dataset differ: use "
            "resized-crop-flip"
        )
    options["resize"] = options["size"] * 8 // 7
    return options


def _weak_strong(given: dict[str, Any], dataset: Images) -> WeakStrong:
    crop = default_augmentation(dataset)
    fill = MLKD_FILL if dataset.image_shape is None or dataset.image_shape[0] == 3 else 124
    return WeakStrong(
        _make(crop, dict(given), dataset),
        Chain(
            [
                _make(crop, dict(given), dataset),
                RandAugment(ops=2, magnitude=-1, space="fixmatch"),
                Cutout(part=0.5, fill=fill),
            ]
        ),
    )


def _call(name: str, options: dict[str, Any]) -> Augmentation:
    accepted = inspect.signature(AUGMENTATIONS[name]).parameters
    for key, value in options.items():
        if key not in accepted:
            raise UnknownName(f"option of {name}", key, [key for key in accepted if key != "base"])
        kind = {"int": int, "bool": bool}.get(accepted[key].annotation)
        if kind is not None and type(value) is not kind:
            raise UsageError(f"{name} needs {key} as {kind.__name__}, found {value!r}")
    try:
        return AUGMENTATIONS[name](**options)
    except TypeError as error:
        raise UsageError(f"{name}: wrong options {options}: {error}") from error


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = spec.strip().partition(":")
    options = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"options are written name:option=value, found {item!r} in {spec!r}")
        options[key.strip().replace("-", "_")] = _value(value.strip())
    return name, options


def _value(text: str) -> Any:
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def from_description(description: dict[str, Any]) -> Augmentation:
    """Make the augmentation that a plan describes: the inverse of `Augmentation.describe`.

    Built-in ones alone: a description that names a user's own factory is refused, not imported.
    Raises `FormatError` for what describes none.
    """
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise FormatError(
            f"an augmentation is described by a table with a name, found {description!r:.80}: the store "
            "is damaged or forged"
        )
    options = {key: value for key, value in description.items() if key != "name"}
    name = description["name"]
    if name == Chain.name:
        parts = options.get("parts")
        if not isinstance(parts, list):
            raise FormatError(
                f"the parts of a chain of augmentations are a list, found {parts!r:.80}: the store is "
                "damaged or forged"
            )
        return Chain([from_description(part) for part in parts])
    if name == Custom.name:
        raise UsageError(
            f"this plan was made with a user's own augmentation, {options.get('factory')!r}. A "
            "store "
            "cannot make kdcache import code: name the augmentation yourself, if you trust it: "
            f"--augment {options.get('factory')}"
        )
    if name == "fixed":
        raise UsageError(
            "this store's logits were imported without saying of which views they are, so a student "
            "cannot be shown them: import them again with --dataset NAME (and --augment)"
        )
    if name not in AUGMENTATIONS:
        raise UnknownName("augmentation", name, AUGMENTATIONS)
    for key in ("weak", "strong", "base"):
        if key in options:
            options[key] = from_description(options[key])
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return _call(name, options)
    except UsageError as error:
        raise FormatError(f"{error}: the store is damaged, forged, or of a newer kdcache") from None

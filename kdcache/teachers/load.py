"""A teacher from what a user names: its network built, its weights loaded, tried on a small batch.

SPEC                                  what it is
resnet32x4@FILE                       a network of the zoo with weights from a file
resnet32x4@FILE#model_ema             the same, from one entry of a file that holds several
torchvision:resnet34@IMAGENET1K_V1    torchvision's with its own weights (or @DEFAULT, or @FILE)
timm:resnet18@a1_in1k                 timm's with the weights of a tag (or @DEFAULT, or @FILE)
my.module:make_teacher[@FILE]         a user's own function
RUN[@FILE]                            a directory written by `kdcache train-teacher`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.data.item import Item
from kdcache.fields.spelling import is_last, spelled, stored_name
from kdcache.models.library import (
    Pretrained,
    pretrained_timm,
    pretrained_torchvision,
    torchvision_class_names,
)
from kdcache.models.taps import as_fields, expanded, head_of, read_outputs, tapped
from kdcache.models.weights import load_weights, names_file, weights_digest
from kdcache.models.zoo import MODELS, build_model, unknown_model
from kdcache.preprocessing import PREPROCESSINGS, Inputs, Preprocessing, require_precision
from kdcache.runs import WEIGHTS, load_run_model
from kdcache.stages import stage
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import DataError, MismatchError, UsageError

#: Where weights come from when they are named and not a file.
LIBRARIES = {
    "torchvision": pretrained_torchvision,
    "timm": pretrained_timm,
}


def load_teacher(
    spec: str | Path,
    weights: str | Path | None = None,
    *,
    classes: int,
    channels: int = 3,
    size: int = 32,
    preprocessing: Inputs | None = None,
    fallback: Inputs | None = None,
    class_map: Sequence[int] | None = None,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    compile: bool = False,
    allow_untrained: bool = False,
    allow_code: bool = False,
    fields: Sequence[str] = ("logits",),
) -> Teacher:
    """A teacher for views of a dataset.

    Args:
        spec: as in the table of this module; what follows "@" is `weights`.
        weights: a file, or the name of a library's own weights.
        classes: of the dataset.
        channels: of the views.
        size: side of the views in pixels.
        preprocessing: of the model; one mean and std are of all channels. None: what the library's weights
            or the run say.
        fallback: preprocessing where neither says it; the teacher then holds this very object. Of a
            dataset of other items than images, its `item`.
        class_map: the module's logit for each class of the dataset (`load_class_map`).
        precision: "float32", "bf16" or "fp16".
        device: where it runs.
        channels_last: run in that memory format.
        compile: through torch.compile.
        allow_untrained: fresh weights where there is nothing to load.
        allow_code: import the function that a run names, if its network is a user's own.
        fields: what it shall give, as people spell it or as it is stored (`kdcache.fields.spelling`).

    Raises:
        UnknownName: no such model, weights or precision.
        UsageError: no preprocessing where it must be given, or a field that the model does not have.
        DataError: no weights, or not readable ones.
        MismatchError: they do not fit the model, or the model does not fit the dataset.
    """
    if isinstance(preprocessing, Preprocessing) and preprocessing.channels == 1 < channels:
        mean, std = preprocessing.mean * channels, preprocessing.std * channels
        preprocessing = replace(preprocessing, mean=mean, std=std)
    name, at, after = str(spec).partition("@")
    if at and weights is not None:
        raise UsageError(f"network {spec}: weights are given twice, {after} and {weights}")
    require_precision(precision)
    if not fields or len(set(map(stored_name, fields))) < len(fields):
        raise UsageError(f"fields {', '.join(fields)}: name one at least, and each once")
    require_known(name)
    source = str(weights) if weights is not None else after or None
    prefix, _, rest = name.partition(":")
    if prefix in LIBRARIES and source is not None and not names_file(source):
        loaded = LIBRARIES[prefix](rest, source)
    elif name not in MODELS and Path(name).is_dir():
        name, loaded = _from_run(Path(name), source, allow_code)
    elif source is None and Path(name).is_file():
        raise UsageError(
            f"network {name} is a file: name the network that its weights are of, NETWORK@{name}"
        )
    elif source is not None or allow_untrained or prefix not in (*MODELS, *LIBRARIES):
        assumed = preprocessing or fallback
        if isinstance(assumed, Preprocessing):
            channels_in, side = assumed.channels, assumed.size or size
        else:
            channels_in, side = channels, size
        item = assumed if isinstance(assumed, Item) else None
        build = partial(build_model, name, channels=channels_in, size=side, item=item)
        loaded = _built(name, build, source, classes, mapped=class_map is not None)
    else:
        advice = f", or take the library's: {name}@DEFAULT" if rest else ""
        raise DataError(f"network {name}: no weights are given. Give a file, {name}@FILE{advice}")
    preprocessing = preprocessing or loaded.preprocessing or fallback
    if preprocessing is None:
        raise UsageError(
            f"network {name}: the mean and std that it was trained with are not known. dump-teacher and "
            f"evaluate take --mean and --std, or --normalize with one of {', '.join(PREPROCESSINGS)}; a "
            "--store that it filled says them too"
        )
    digest = weights_digest(loaded.module.state_dict())
    module = loaded.module.eval().requires_grad_(False).to(device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    views = _random_views(preprocessing, module, channels, size)
    teacher = Teacher(
        architecture=name,
        module=module,
        preprocessing=preprocessing,
        classes=classes,
        weights_sha256=digest,
        file_sha256=loaded.file_sha256,
        weights_entry=loaded.entry,
        precision=precision,
        class_map=None if class_map is None else tuple(class_map),
        channels_last=channels_last,
        fields=expanded(module, fields, preprocessing(views[:1])),
    )
    with stage(f"trying {name} on a small batch"):
        return replace(teacher, shapes=_try_out(teacher, views), compile=compile)


def require_known(spec: str) -> None:
    """Refuse a teacher that is not there, before anything else is loaded.

    Raises:
        UnknownName: a bare name that is no model's.
        UsageError: one of torchvision's, without its prefix.
        DataError: a directory that is not there.
    """
    name = str(spec).partition("@")[0]
    if name in MODELS or ":" in name or Path(name).exists():
        return
    if "/" in name:
        raise DataError(f"network {name}: there is no such directory")
    raise unknown_model(name)


def _random_views(inputs: Inputs, module: nn.Module, channels: int, size: int) -> Tensor:
    """Three views, or other items, on the device of a module: always the same ones."""
    device = next(module.parameters(), torch.empty(0)).device
    if isinstance(inputs, Item):
        return inputs.examples(3, module).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (3, channels, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)


def _built(
    name: str, build: Callable[[int], nn.Module], source: str | None, classes: int, *, mapped: bool
) -> Pretrained:
    """A model with the weights of a file; with a class map, of as many classes as those.

    Args:
        build: from the number of classes.
    """
    if source is None:  # a user's function that loads its own weights, or allow_untrained
        return Pretrained(build(classes))
    file = load_weights(source)
    module = build(classes)
    if mapped and (own := file.classes(module, classes)) != classes:
        module = build(own)
    file.apply(module, name, MODELS)
    return Pretrained(module, file_sha256=file.file_sha256, entry=file.entry)


def _from_run(path: Path, source: str | None, allow_code: bool) -> tuple[str, Pretrained]:
    """The architecture and model of a run, with another checkpoint of its training if given."""
    run = load_run_model(path, allow_code)
    file = load_weights(source or path / WEIGHTS)
    if source is not None:
        file.apply(run.module, run.config["model"]["name"], MODELS)
    trained = Pretrained(run.module, run.preprocessing, file.file_sha256, file.entry)
    return run.config["model"]["name"], trained


def _try_out(teacher: Teacher, views: Tensor) -> dict[str, tuple[int, ...]]:
    """One small batch: what does not fit is found now, and dropout masks are drawn.

    Returns:
        The shape of each field per row.
    """
    images = teacher.preprocessing(views)
    try:
        with torch.no_grad():
            given = teacher.forward(images)
    except UsageError:  # a field that it does not have
        raise
    except Exception as error:  # whatever a network raises: an assertion about the size, say
        shape = "x".join(map(str, images.shape[1:]))
        kind = "items" if isinstance(teacher.preprocessing, Item) else "images"
        halved = {str(p.dtype) for p in teacher.module.parameters()} - {"torch.float32"}
        advice = (
            f"Its weights are {', '.join(sorted(halved))}: make them float32 (module.float()); "
            "dump-teacher --precision chooses what is computed in"
            if halved
            else f"It must take {teacher.preprocessing}"
            if isinstance(teacher.preprocessing, Item)
            else "dump-teacher and evaluate resize the views to a size that it takes: --size N"
        )
        raise MismatchError(
            f"network {teacher.architecture} does not take {kind} of {shape}, which its "
            f"preprocessing makes of the views: {type(error).__name__}: {error}. {advice}."
        ) from error
    outputs = read_outputs(teacher.architecture, given, ("logits", *teacher.fields), len(views))
    logits = outputs["logits"]
    if logits.ndim != 2:
        raise DataError(
            f"network {teacher.architecture}: expected logits (B, K), found shape "
            f"{tuple(logits.shape)}"
        )
    if teacher.class_map is None and logits.shape[1] != teacher.classes:
        raise MismatchError(
            f"network {teacher.architecture} gives {logits.shape[1]} logits, the dataset has "
            f"{teacher.classes} classes: give a network for these classes, or dump it with a class map "
            "(dump-teacher --class-map FILE)"
        )
    if teacher.class_map is not None and (
        len(teacher.class_map) != teacher.classes or max(teacher.class_map) >= logits.shape[1]
    ):
        raise MismatchError(
            f"class map of {len(teacher.class_map)} classes up to the teacher's class "
            f"{max(teacher.class_map)}: the dataset has {teacher.classes} classes, "
            f"network {teacher.architecture} has {logits.shape[1]}, counted from 0"
        )
    if (head := head_of(teacher.module)) is not None:
        if "pooled" in teacher.fields:
            _require_head(teacher, head, "pooled", outputs["pooled"], images)
        if any(is_last(name) for name in teacher.fields):
            with torch.no_grad():
                last = as_fields(tapped(teacher.module, ("last",))(images)).get("last")
            if last is not None:  # a user's module may give a part of it alone
                _require_head(teacher, head, "last", last.float().mean((2, 3)), images)
    shapes = {name: tuple(values.shape[1:]) for name, values in outputs.items()}
    return shapes | {"logits": (teacher.classes,)}


@torch.no_grad()
def _require_head(
    teacher: Teacher, head: nn.Linear, field: str, pooled: Tensor, images: Tensor
) -> None:
    """Refuse a field of which the head does not make the network's own logits.

    Args:
        field: its name.
        pooled: (B, D), the field, or the mean of its map.
        images: (B, C, H, W), what it was made of.
    """
    who, name = f"network {teacher.architecture}", spelled(field)
    if pooled.shape[1:] != (head.in_features,):
        raise DataError(
            f"{who}: expected {name} of {head.in_features} channels, the input of its head, found "
            f"{tuple(pooled.shape)}: give another field another name"
        )
    given = teacher.module(images)
    logits = read_outputs(teacher.architecture, given, ("logits",), len(images))["logits"]
    furthest = float((head(pooled) - logits).abs().max())
    if furthest > 1e-3 * float(logits.abs().max()):
        raise DataError(
            f"{who}: its head, on the field {name}, gives other logits than itself (by up to "
            f"{furthest:.3g}). pooled is the input of the linear layer `head`, and last the map of which "
            "that is the mean: dump another field, and give a field of your own another name"
        )


def teacher_class_names(spec: str | Path) -> list[str] | None:
    """The names of a teacher's classes where its library knows them, for `load_class_map`."""
    name, _, source = str(spec).partition("@")
    prefix, _, rest = name.partition(":")
    if prefix != "torchvision" or not source or names_file(source):
        return None
    return torchvision_class_names(rest, source)

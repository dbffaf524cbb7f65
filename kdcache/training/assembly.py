"""A student and its loss put together: which fields are read, and of which shapes the parts are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from kdcache.data.item import Item
from kdcache.fields.spelling import spelled
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.objective import Objective, loss_class
from kdcache.models.network import Network
from kdcache.models.taps import as_fields, averages_to, expanded, tapped
from kdcache.models.zoo import MODELS, build_model
from kdcache.teachers.teacher import Teacher
from kdcache.views.cached import CachedViews
from kdcache.views.sizes import InputShape
from kdcache_stores import Store, UsageError


def on_features(config: ObjectiveConfig) -> bool:
    """Whether a loss reads more than logits, of either network."""
    return not {*config.student_fields, *config.teacher_fields} <= {"logits"}


def student_shapes(network: nn.Module, config: ObjectiveConfig, image: InputShape) -> Shapes:
    """The shape per row of every field that a loss reads of a student, by stored name.

    Args:
        network: the student as it is built.
        config: the loss.
        image: (C, H, W) of the images, or other items.

    Raises:
        UsageError: it has no such field.
    """
    images = blank_inputs(image, 2, network)
    training = network.training
    network.eval()
    fields = expanded(network, config.student_fields, images)
    with torch.no_grad():
        given = as_fields(tapped(network, fields)(images))
        if {"last", "cam"} & set(fields) and not isinstance(image, Item):
            _require_mean(network, images)
    network.train(training)
    if missing := [name for name in fields if name not in given]:
        raise UsageError(
            f"{config.method} reads {', '.join(map(spelled, missing))} of the student, and "
            f"{type(network).__name__} gives {', '.join(map(spelled, given))}: have it give that too, or "
            "use another method"
        )
    return {name: tuple(given[name].shape[1:]) for name in ("logits", *fields)}


def build_network(name: str, classes: int, image: InputShape) -> nn.Module:
    """`build_model` for images, or other items, of a shape."""
    if isinstance(image, Item):
        return build_model(name, classes, item=image)
    return build_model(name, classes, image[0], image[-1])


def blank_inputs(image: InputShape, count: int, network: nn.Module) -> Tensor:
    """Black images, or other items, (count, *shape) that a network takes, on its device."""
    parameter = next(network.parameters(), torch.empty(0))
    if isinstance(image, Item):
        return image.examples(count, network).to(parameter.device)
    return torch.zeros(count, *image, dtype=parameter.dtype, device=parameter.device)


def read_fields(config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
    """Stored names of the fields that a loss reads of each teacher.

    Args:
        student: as of `student_shapes`.
        held: the fields that there are of a teacher, by stored name.

    Raises:
        UsageError: the student needs others.
    """
    names: list[str] = []
    for part in config.parts():
        if part.record.loss is not None:
            names += loss_class(part.record).reads(part, student, held)
    return tuple(dict.fromkeys(names))


@torch.no_grad()
def _require_mean(network: nn.Module, images: Tensor) -> None:
    """Refuse a network whose head sees something else than the mean of its last map."""
    images = images + torch.linspace(-1, 1, images.shape[-1], device=images.device)
    given = as_fields(tapped(network, ("last", "pooled"))(images))
    if "pooled" in given and not averages_to(given["last"], given["pooled"]):
        raise UsageError(
            f"{type(network).__name__} has no field last: its head does not see the mean of a map"
        )


@torch.no_grad()
def fields_of_network(network: nn.Module, image: tuple[int, int, int]) -> Shapes:
    """The shape per row of every field that a network could give to a method."""
    images = torch.zeros(1, *image, device=next(network.parameters()).device)
    names = expanded(
        network.eval(), ("pooled", "last", "attention", "stages", "stages:pre"), images
    )
    shapes = {n: tuple(v.shape[1:]) for n, v in tapped(network, names)(images).items()}
    channels, height, _ = shapes["last"]
    divisors = [r for r in range(1, height) if height % r == 0]
    return shapes | {f"last_{r}": (channels, r, r) for r in divisors}


def fields_of_architecture(name: str, classes: int, image: InputShape) -> Shapes | None:
    """Those of a network of the zoo by its name; shapes alone are computed. None for any other."""
    if name not in MODELS or isinstance(image, Item):
        return None
    with torch.device("meta"):
        return fields_of_network(MODELS[name](classes, image[0]), image)


def weight_of(fields: Sequence[str], shapes: Shapes, rows: int) -> str:
    """What fields of these shapes weigh, in a sentence that begins with a blank; empty for others.

    Args:
        rows: samples times views.
    """
    if not all(name in shapes for name in fields):
        return ""
    nbytes = 2 * sum(math.prod(shapes[name]) for name in fields)
    total = nbytes * rows / 1e6
    return f" As float16 that is {nbytes:,} bytes a view, {total:,.0f} MB for the {rows:,} views stored."


def fields_of_training(
    config: ObjectiveConfig,
    student: Shapes,
    stores: Sequence[Store],
    image: InputShape,
    online: bool,
) -> tuple[str, ...] | None:
    """Stored names of what a training reads of each teacher; None where the stores do not hold it.

    Args:
        student: as of `student_shapes`.
        stores: of the teachers; may be empty where one is in the loop.
        image: (C, H, W) of the views, or other items.
        online: whether a teacher in the loop can give what the stores lack.

    Raises:
        UsageError: nobody gives what is needed; the message says what it weighs.
    """
    if not stores:
        return None
    held = held_by(stores)
    try:
        fields = read_fields(config, student, held)
    except UsageError:
        if not online:
            raise
        return None
    missing = [name for name in fields if name not in held]
    if not missing:
        return fields
    if online:
        return None
    first = stores[0]
    known = fields_of_architecture(first.teacher.architecture, first.classes, image)
    if known is not None:
        missing = [name for name in read_fields(config, student, known) if name not in held]
    weight = weight_of(missing, known or {}, len(first) * len(first.view_range))
    wanted = ",".join(map(spelled, missing))
    raise UsageError(
        f"{config.method} reads {wanted} of the teacher, and its stores hold "
        f"{', '.join(map(spelled, held))}.{weight} Run the teacher in the loop (--online TEACHER), or dump "
        f"--fields {wanted} into a store of its own and give both."
    )


def held_by(stores: Sequence[Store]) -> Shapes:
    """The fields that the stores of the first teacher hold."""
    first = stores[0].teacher.digest
    return {
        name: spec.shape
        for store in stores
        if store.teacher.digest == first
        for name, spec in store.fields.items()
    }


def shapes_of_model(name: str, classes: int, image: InputShape, config: ObjectiveConfig) -> Shapes:
    """`student_shapes` of a model by its name; the random numbers of the caller are untouched."""
    with torch.random.fork_rng(devices=[]):
        network = build_network(name, classes, image)
    return student_shapes(network, config, image)


def assembled(
    network: nn.Module, config: ObjectiveConfig, nets: Nets
) -> tuple[nn.Module, Objective]:
    """The network that is trained, and its loss; new weights are drawn from torch's default generator.

    Args:
        network: the student.
        config: the loss.
        nets: what is known of both networks and the samples.
    """
    for part in config.parts():
        if part.record.student is not None:
            module, _, name = part.record.student.partition(":")
            network = getattr(import_module(module), name)(network, nets, part.options)
    return network, Objective(config, nets)


def nets_of(
    views: CachedViews, student: Shapes, fields: Sequence[str], teachers: Sequence[Teacher] = ()
) -> Nets:
    """What is known of the networks and the samples of a training.

    Args:
        views: what it reads.
        student: as of `student_shapes`.
        fields: of each teacher, those of `read_fields`.
        teachers: those in the loop; without any, the stores of the views have the fields.
    """
    stores = views.teachers[0] if views.teachers else {}
    stored = {name: store.fields[name].shape for name, store in stores.items()}
    held = teachers[0].shapes if teachers else stored
    return Nets(
        student=student,
        teacher={name: held[name] for name in fields},
        head=head_of_teacher(teachers) if teachers else head_of_stores(stores.values()),
        keys=views.keys.cpu(),
        labels=torch.from_numpy(views.labels),
        norms=norms_of(teachers[0].module) if teachers else {},
    )


def norms_of(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a network of the zoo, weight and bias of each stage's last batch norm, by the stage's field."""
    norms = module.norms() if isinstance(module, Network) else []
    return {
        f"stage_{number}_pre": (norm.weight.detach().cpu(), norm.bias.detach().cpu())
        for number, norm in enumerate(norms, 1)
    }


def head_of_stores(stores: Iterable[Store]) -> tuple[Tensor, Tensor] | None:
    """The head of a teacher, from whichever of its stores keeps one."""
    for store in stores:
        if store.head is not None:
            weight, bias = store.head
            return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())
    return None


def head_of_teacher(teachers: Sequence[Teacher]) -> tuple[Tensor, Tensor] | None:
    """The head of the first teacher, on the CPU."""
    head = teachers[0].head if teachers else None
    return None if head is None else (head[0].cpu(), head[1].cpu())

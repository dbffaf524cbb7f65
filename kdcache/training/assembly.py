"""A student and its loss put together: which fields are read, and of which shapes the parts are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.objective import Objective, loss_class
from kdcache.models.taps import as_fields, expanded, tapped
from kdcache.models.zoo import build_model
from kdcache.teachers.teacher import Teacher
from kdcache.views.cached import CachedViews
from kdcache_stores import Store


def on_features(config: ObjectiveConfig) -> bool:
    """Whether a loss reads more than logits, of either network."""
    return not {*config.student_fields, *config.teacher_fields} <= {"logits"}


def student_shapes(network: nn.Module, config: ObjectiveConfig, image: Sequence[int]) -> Shapes:
    """The shape per row of every field that a loss reads of a student, by stored name.

    Args:
        network: the student as it is built.
        config: the loss.
        image: (C, H, W) of the images.

    Raises:
        UsageError: it has no such field.
    """
    parameter = next(network.parameters())
    images = torch.zeros(2, *image, dtype=parameter.dtype, device=parameter.device)
    training = network.training
    network.eval()
    fields = expanded(network, config.student_fields, images)
    with torch.no_grad():
        given = as_fields(tapped(network, fields)(images))
    network.train(training)
    return {name: tuple(given[name].shape[1:]) for name in ("logits", *fields)}


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


def held_by(stores: Sequence[Store]) -> Shapes:
    """The fields that the stores of the first teacher hold."""
    first = stores[0].teacher.digest
    return {
        name: spec.shape
        for store in stores
        if store.teacher.digest == first
        for name, spec in store.fields.items()
    }


def shapes_of_model(
    name: str, classes: int, image: Sequence[int], config: ObjectiveConfig
) -> Shapes:
    """`student_shapes` of a model by its name; the random numbers of the caller are untouched."""
    with torch.random.fork_rng(devices=[]):
        network = build_model(name, classes, image[0], image[-1])
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
    )


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

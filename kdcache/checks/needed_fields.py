"""What a method reads of a teacher beside logits, what it weighs, and whether the stores hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from kdcache.checks.finding import Finding
from kdcache.fields.spelling import spelled
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.nets import Shapes
from kdcache.models.taps import expanded, tapped
from kdcache.models.zoo import MODELS
from kdcache.training.assembly import held_by, on_features, read_fields, shapes_of_model
from kdcache_stores import Store, UsageError


@torch.no_grad()
def fields_of_network(network: nn.Module, image: Sequence[int]) -> Shapes:
    """The shape per row of every field that a network could give to a method."""
    images = torch.zeros(1, *image, device=next(network.parameters()).device)
    names = expanded(network.eval(), ("pooled", "last", "attention"), images)
    shapes = {n: tuple(v.shape[1:]) for n, v in tapped(network, names)(images).items()}
    channels, height, _ = shapes["last"]
    divisors = [r for r in range(1, height) if height % r == 0]
    return shapes | {f"last_{r}": (channels, r, r) for r in divisors}


def fields_of_architecture(name: str, classes: int, image: Sequence[int]) -> Shapes | None:
    """Those of a network of the zoo by its name; shapes alone are computed. None for any other."""
    if name not in MODELS:
        return None
    with torch.device("meta"):
        return fields_of_network(MODELS[name](classes, image[0]), image)


def missing_fields(
    config: ObjectiveConfig,
    stores: Sequence[Store],
    student: str | None,
    image: Sequence[int] | None,
) -> Iterator[Finding]:
    """A finding for each field that a loss reads and no store of the first teacher holds.

    Args:
        student: a model's name; None where it is not known.
        image: (C, H, W) of the views; None where it is not known.

    Raises:
        UsageError: the field depends on the student or the size of the images, and they are not known.
    """
    if not on_features(config):
        return
    held, first = held_by(stores), stores[0]
    shapes: Shapes = {}
    known: Shapes | None = None
    if set(config.student_fields) - {"logits", "pooled"}:
        if student is None or image is None:
            raise UsageError(
                f"which fields {config.method} reads depends on the student and the size of the images: "
                "give --student and --dataset"
            )
        shapes = shapes_of_model(student, first.classes, image, config)
    if image is not None:
        known = fields_of_architecture(first.teacher.architecture, first.classes, image)
    try:
        wanted = read_fields(config, shapes, held)
        missing = [name for name in wanted if name not in held]
        if not missing:
            return
    except UsageError as error:
        if known is None:
            yield Finding("missing-field", f"{error}", "dump what is named, and give both stores.")
            return
        missing = [name for name in read_fields(config, shapes, known) if name not in held]
    fields = ",".join(map(spelled, missing))
    have = ", ".join(map(spelled, held))
    message = f"{config.method} reads {fields} of the teacher, and its stores hold {have}."
    if known is not None and all(name in known for name in missing):
        floats = sum(math.prod(known[name]) for name in missing)
        rows = len(first) * len(first.view_range)
        message += (
            f" As float16 that is {2 * floats:,} bytes a view, {2 * floats * rows / 1e6:,.0f} MB for the "
            f"{rows:,} views stored here."
        )
    yield Finding(
        "missing-field",
        message,
        f"dump-teacher --plan-from {first.where} --fields {fields} into a store of its own, and give both.",
    )

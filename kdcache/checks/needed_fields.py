"""What a method reads of a teacher beside logits, what it weighs, and whether the stores hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdcache.checks.finding import Finding
from kdcache.fields.spelling import spelled
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.nets import Shapes
from kdcache.training.assembly import (
    fields_of_architecture,
    held_by,
    on_features,
    read_fields,
    shapes_of_model,
    weight_of,
)
from kdcache.views.sizes import InputShape
from kdcache_stores import Store, UsageError


def missing_fields(
    config: ObjectiveConfig,
    stores: Sequence[Store],
    student: str | None,
    image: InputShape | None,
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
    rows = len(first) * len(first.view_range)
    weight = "" if known is None else weight_of(missing, known, rows)
    message = f"{config.method} reads {fields} of the teacher, and its stores hold {have}.{weight}"
    yield Finding(
        "missing-field",
        message,
        f"dump-teacher --plan-from {first.where} --fields {fields} into a store of its own, and give both.",
    )

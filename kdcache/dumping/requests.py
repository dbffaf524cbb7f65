"""The teachers that a dump is asked for, made ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.data.dataset import Dataset
from kdcache.models.classes import load_class_map
from kdcache.preprocessing import Preprocessing, normalisation, origin
from kdcache.runs import is_run, read_config
from kdcache.teachers.load import load_teacher, teacher_class_names
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import UsageError


@dataclass(frozen=True)
class TeacherRequest:
    """One teacher as asked for.

    Attributes:
        out: the path of its store.
        spec: as `load_teacher` takes it.
        weights: as `load_teacher` takes it.
        preprocessing: mean and std that it was trained with. None: its own, else its dataset's.
        size: side in pixels that views are resized to. None: its own.
        class_map: file that maps its classes to the dataset's.
    """

    out: Path
    spec: str
    weights: str | None = None
    preprocessing: Preprocessing | None = None
    size: int | None = None
    class_map: Path | None = None


def size_of_runs(teachers: Sequence[TeacherRequest]) -> int | None:
    """The side in pixels that they were trained at, where all are runs of one side and keep their own."""
    sides = {
        read_config(asked.spec)["model"].get("size")
        if is_run(asked.spec) and asked.size is None
        else None
        for asked in teachers
    }
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None


def prepare_teacher(
    request: TeacherRequest,
    trainset: Dataset,
    **options: Any,
) -> tuple[Teacher, str, bool]:
    """Load a teacher for the views of a dataset.

    Args:
        request: which one.
        trainset: the dataset's training split; its normalisation is the last resort.
        options: further arguments of `load_teacher`.

    Returns:
        The teacher, in words where its preprocessing comes from, and whether it is assumed: neither the
        request nor what its weights come with says it.
    """
    if trainset.item is not None and (request.preprocessing or request.size):
        option = "--size" if request.size else "--normalize, --mean and --std"
        raise UsageError(
            f"{option} prepare images, and {trainset.name} holds {trainset.item}: scale items before they "
            "are made a dataset, or within the network"
        )
    channels, side = (
        (trainset.image_shape[0], trainset.image_shape[-1]) if trainset.image_shape else (3, 224)
    )
    given = request.preprocessing
    if given is not None and request.size is not None:
        given = replace(given, size=request.size)
    fallback = normalisation(trainset)
    if isinstance(fallback, Preprocessing):
        fallback = replace(fallback, size=request.size)
    mapped = None
    if request.class_map is not None:
        spec = request.spec if request.weights is None else f"{request.spec}@{request.weights}"
        names = teacher_class_names(spec)
        mapped = load_class_map(
            request.class_map, trainset.classes, trainset.class_names, teacher_names=names
        )
    teacher = load_teacher(
        request.spec,
        request.weights,
        classes=trainset.classes,
        channels=channels,
        size=side,
        preprocessing=given,
        fallback=fallback,
        class_map=mapped,
        **options,
    )
    if given is not None:
        return teacher, "as given", False
    if teacher.preprocessing is fallback:
        return teacher, origin(trainset), True
    if request.size is not None and isinstance(teacher.preprocessing, Preprocessing):
        sized = replace(teacher.preprocessing, size=request.size)
        return replace(teacher, preprocessing=sized), "its own, at the size given", False
    return teacher, "its own", False

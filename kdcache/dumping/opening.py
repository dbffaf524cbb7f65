"""The stores that a dump fills: their paths, their teachers, and what is asked of each."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kdcache._version import __version__
from kdcache.dumping.default_encoding import choose_encodings
from kdcache.teachers.teacher import Teacher
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import FieldSpec, MismatchError, UsageError, begun_encodings

HEAVY = 64
"""A field that is so many times as large as another does not belong into one store with it."""


class Target(NamedTuple):
    """A teacher, the path of its store, and its top-1 on so many clean images of each split, if known."""

    teacher: Teacher
    path: str | os.PathLike[str]
    clean_top1: dict[str, float] | None = None
    clean_images: dict[str, int] | None = None


Targets = Sequence[Target | tuple[Teacher, str | os.PathLike[str]]]


def target_encodings(
    targets: Sequence[Target], views: int, rows: int, asked: str | Mapping[str, str] | None
) -> dict[str, str]:
    """The encoding of every field that some target has, for so many rows of so many views."""
    fields = dict.fromkeys(name for target in targets for name in target.teacher.fields)
    paths, classes = [target.path for target in targets], targets[0].teacher.classes
    return choose_encodings(paths, list(fields), views, rows, classes, asked)


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Where and with what a store was made: versions, device and command, never a path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"kdcache": __version__, "python": platform.python_version()} | replay.versions()
    return {"versions": versions, "device": f"{device.type} ({name})", "command": command}


def store_settings(
    plan: ViewPlan,
    target: Target,
    views: int,
    *,
    encodings: Mapping[str, str],
    batch_size: int,
    device: torch.device | str,
    hash_keys: bool = False,
    shard_rows: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """What a dump asks of a target's store: arguments of `StoreWriter`, and of `find_outstanding`.

    Args:
        encodings: by field; the others as for `dump`.

    Raises:
        UsageError: more views than the augmentation has, or a field of unknown shape.
        MismatchError: the store that is there is of other fields.
    """
    if plan.views is not None and views > plan.views:
        raise UsageError(f"{plan.augmentation.name} has {plan.views} views, {views} were asked for")
    teacher = target.teacher
    _require_same_fields(target)
    head = teacher.head
    return {
        "plan": plan.to_store(),
        "teacher": teacher.to_store(target.clean_top1),
        "samples": plan.samples,
        "views": views,
        "fields": {
            name: FieldSpec(_shape(teacher, name), encodings[name]) for name in teacher.fields
        },
        "config": {
            "batch_size": batch_size,
            "channels_last": teacher.channels_last,
            "compile": teacher.compile,
        },
        "provenance": provenance(torch.device(device), command)
        | ({"clean_images": target.clean_images} if target.clean_images else {}),
        "hash_keys": hash_keys,
        "shard_rows": shard_rows,
        "head": None if head is None else (head[0].cpu().numpy(), head[1].cpu().numpy()),
    }


def heavy_fields(teacher: Teacher) -> list[str]:
    """A remark on fields that share a store and are of very different weight; empty as a rule.

    A store has one number of rows a shard for all its fields, which the heaviest decides.
    """
    sizes = {name: math.prod(_shape(teacher, name)) for name in teacher.fields}
    light = [name for name in sizes if HEAVY * sizes[name] <= max(sizes.values())]
    if not light:
        return []
    heavy = [name for name in sizes if name not in light]
    return [
        f"{', '.join(heavy)} is {max(sizes.values()) // min(sizes.values())} times as large as "
        f"{', '.join(light)}, and the fields of a store are cut into shards of the same rows: dump the "
        "heavy ones into a store of their own (--plan-from this one); a training that is given both stores "
        "joins their fields"
    ]


def _shape(teacher: Teacher, field: str) -> tuple[int, ...]:
    if field not in teacher.shapes:
        raise UsageError(
            f"teacher {teacher.architecture}: the shape of {field} is not known: load_teacher finds it, "
            "or Teacher(shapes=...) says it"
        )
    return teacher.shapes[field]


def _require_same_fields(target: Target) -> None:
    held, asked = begun_encodings(target.path), target.teacher.fields
    if held and held.keys() != set(asked):
        lacking = [name for name in asked if name not in held]
        advice = (
            f"Dump --fields {','.join(lacking)} to another --out: a training that is given both stores "
            "joins their fields"
            if lacking
            else f"Go on with --fields {','.join(held)}, or choose another --out"
        )
        raise MismatchError(
            f"{target.path} holds the fields {', '.join(held)} of each view, this dump gives "
            f"{', '.join(asked)}: the fields of a store are fixed. {advice}"
        )

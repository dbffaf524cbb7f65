"""The stores that a dump fills: opened for writing, or looked at."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kdcache._version import __version__
from kdcache.teachers import Teacher
from kdcache.views import ViewPlan, replay
from kdcache_stores import FieldSpec, StoreWriter, UsageError, outstanding
from kdcache_stores.outstanding import Outstanding


class Target(NamedTuple):
    """A teacher, the path of its store, and its top-1 on clean splits, if known."""

    teacher: Teacher
    path: str | os.PathLike[str]
    clean_top1: dict[str, float] | None = None


Targets = Sequence[Target | tuple[Teacher, str | os.PathLike[str]]]


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Where and with what a store was made: versions, device and command, never a path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"kdcache": __version__, "python": platform.python_version()} | replay.versions()
    return {"versions": versions, "device": f"{device.type} ({name})", "command": command}


def open_writer(
    plan: ViewPlan,
    target: Target,
    views: int,
    *,
    encoding: str,
    batch_size: int,
    device: torch.device | str,
    hash_keys: bool = False,
    repair: bool = False,
    command: str = "",
) -> StoreWriter:
    """The writer of one target's store, new or resumed; arguments as for `dump`."""
    asked = _asked(plan, target, views, encoding, batch_size, device, hash_keys, command)
    return StoreWriter(target.path, repair=repair, **asked)


def find_outstanding(
    plan: ViewPlan,
    target: Target,
    views: int,
    *,
    encoding: str,
    batch_size: int,
    device: torch.device | str,
    hash_keys: bool = False,
) -> Outstanding:
    """What `open_writer` would find to be written, and nothing changed; raises what it would."""
    asked = _asked(plan, target, views, encoding, batch_size, device, hash_keys)
    return outstanding.find_outstanding(target.path, **asked)


def _asked(
    plan: ViewPlan,
    target: Target,
    views: int,
    encoding: str,
    batch_size: int,
    device: torch.device | str,
    hash_keys: bool,
    command: str = "",
) -> dict[str, Any]:
    """What a dump asks of a target's store: arguments of `StoreWriter`."""
    if plan.views is not None and views > plan.views:
        raise UsageError(f"{plan.augmentation.name} has {plan.views} views, {views} were asked for")
    teacher = target.teacher
    return {
        "plan": plan.to_store(),
        "teacher": teacher.to_store(target.clean_top1),
        "samples": plan.samples,
        "views": views,
        "fields": {"logits": FieldSpec(shape=(plan.dataset.classes,), encoding=encoding)},
        "config": {
            "batch_size": batch_size,
            "channels_last": teacher.channels_last,
            "compile": teacher.compile,
        },
        "provenance": provenance(torch.device(device), command),
        "hash_keys": hash_keys,
    }

"""What the files of a run may hold: each value of the type that it was written with, or absent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdcache_stores.errors import DataError

_NUMBER = (int, float)
_NAMES = {int: "a whole number", _NUMBER: "a number", str: "text", bool: "true or false",
          dict: "a table", list: "a list"}  # fmt: skip

_LOSS = ("ce_weight", "kd_weight", "alpha", "temperature", "teacher_temperature", "student_temperature",
         "label_smoothing")  # fmt: skip

CONFIG: dict[str, Any] = {
    **dict.fromkeys((f"objective.{name}" for name in _LOSS), _NUMBER),
    "kdcache": str,
    "online": list,
    "stores": list,
    "stores.*": dict,
    "stores.*.digest": str,
    "stores.*.plan": str,
    "store_paths": list,
    "store_paths.*": str,
    "resumed": list,
    "resumed.*": dict,
    "resumed.*.kdcache": str,
    "resumed.*.after_epoch": int,
    "data": dict,
    "data.name": str,
    "data.root": str,
    "data.views": int,
    "data.train_samples": int,
    "data.resident_views": int,
    "data.val_split": _NUMBER,
    "data.subset": bool,
    "model": dict,
    "model.name": str,
    "model.classes": range(1, 2**22),
    "model.channels": range(1, 2**10),
    "model.size": range(1, 2**13 + 1),
    "model.height": range(1, 2**13 + 1),
    "model.item": dict,
    "model.item.dtype": str,
    "model.item.shape": list,
    "model.item.shape.*": range(1, 2**28),
    "model.projector": dict,
    "model.projector.inputs": range(1, 2**16),
    "model.projector.channels": range(1, 2**16),
    "model.projector.factor": range(1, 2**16),
    "model.projector.height": range(1, 2**13 + 1),
    "model.widths": dict,
    "preprocessing": dict,
    "objective": dict,
    "objective.method": str,
    "objective.add": list,
    "objective.add.*": str,
    "objective.options": dict,
    "objective.standardize": (bool, str),
    "objective.noise": str,
    "objective.combine": str,
    "objective.weights": (list, str),
    "objective.weights.*": _NUMBER,
    "objective.ablation": str,
    "objective.reverse": bool,
    "training": dict,
    "training.seed": int,
    "training.epochs": int,
    "training.prune": str,
    "training.prune_by": str,
    "training.prune_epochs": int,
}
OF_A_RUN = ("data.name", "model.name", "objective.method", "training.seed", "training.epochs")
"""What the config of every run says."""

_MEASURES = (
    "last_top1", "last_top5", "last_nll", "last_ece", "best_top1", "temperature", "calibrated_nll",
    "calibrated_ece", "seconds_per_epoch", "data_wait_fraction", "teacher_forwards",
)  # fmt: skip
_CHOICES = ("best_chosen_on", "temperature_fitted_on")

SUMMARY: dict[str, Any] = {
    **dict.fromkeys(_MEASURES, _NUMBER),
    **dict.fromkeys(_CHOICES, str),
    "best_epoch": int,
    "test_samples": int,
    "class_names": list,
    "class_names.*": str,
    "teachers": dict,
    "teachers.*": _NUMBER,
    "warnings": list,
    "warnings.*": dict,
    "warnings.*.rule": str,
    "warnings.*.message": str,
    "warnings.*.remedy": str,
}

OF_A_SUMMARY = (*_MEASURES, *_CHOICES, "best_epoch")
"""What the summary of a training of this version says."""

RECORD: dict[str, Any] = {
    "epoch": int,
    **dict.fromkeys(
        ("train_loss", "train_kd", "seconds", "data_wait_seconds", "images_per_second", "lr",
         "test_top1", "test_top5", "test_nll", "test_ece"),
        _NUMBER,
    ),
}  # fmt: skip


def require_shape(
    value: Any, types: Mapping[str, Any], needed: Iterable[str], where: str | Path
) -> dict[str, Any]:
    """The table, if what it holds is as it was written.

    Args:
        value: as it was read.
        types: of values by their dotted names, or the range of whole numbers that they are in; "*" for each
            item of a list. Others may be anything.
        needed: dotted names that must be there.
        where: how errors name the file.

    Raises:
        DataError: naming the first value that is not.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a table, found {value!r:.80}")
    for name, kind in types.items():
        for item in _at(value, name.split(".")):
            if not _is(item, kind):
                raise DataError(f"{where}: {name} must be {_named(kind)}, found {item!r:.80}")
    if missing := [name for name in needed if not _at(value, name.split("."))]:
        raise DataError(f"{where} lacks {', '.join(missing)}, so it is of no run of kdcache.")
    return value


def _is(item: Any, kind: Any) -> bool:
    if isinstance(kind, range):
        return type(item) is int and item in kind
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(item, int) and not -(2**63) <= item < 2**64:
        return False
    return isinstance(item, kinds) and (bool in kinds or not isinstance(item, bool))


def _named(kind: Any) -> str:
    if isinstance(kind, range):
        return f"a whole number from {kind[0]} to {kind[-1]}"
    return _NAMES.get(kind) or " or ".join(_NAMES[each] for each in kind)


def _at(value: Any, parts: list[str]) -> list[Any]:
    """The values of a dotted name: one, or none; of a list each."""
    if not parts:
        return [value]
    first, *rest = parts
    if first == "*":
        items = value if isinstance(value, list) else []
        return [each for item in items for each in _at(item, rest)]
    return _at(value[first], rest) if isinstance(value, dict) and first in value else []

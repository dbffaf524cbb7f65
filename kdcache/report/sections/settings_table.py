"""The settings of each group as a table: what was minimised, for how long and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.report.collect import Group
from kdcache.report.page import Table
from kdcache_stores.printable import printable

COLUMNS = (
    "method",
    "T",
    "weight of CE",
    "of the teacher's term",
    "epochs",
    "batch",
    "lr",
    "schedule",
    "samples",
    "views",
    "seeds",
)


def settings_table(groups: Sequence[Group]) -> Table:
    """A line per group; T is tau where the logits are standardized."""
    return Table("Settings", COLUMNS, [_line(group) for group in groups])


def _line(group: Group) -> list[str]:
    run = group.runs[0]
    objective, training, data = (
        run.config.get(name, {}) for name in ("objective", "training", "data")
    )
    samples = data.get("train_samples") or (run.summary or {}).get("train_samples")
    return [
        group.label,
        _temperature(objective),
        *(_number(objective.get(name)) for name in ("ce_weight", "kd_weight")),
        *(_number(training.get(name)) for name in ("epochs", "batch_size", "lr")),
        printable(f"{training.get('optimizer', '')} {training.get('lr_schedule', '')}".strip()),
        _number(samples),
        _number(data.get("views")),
        seeds([run.seed for run in group.runs]),
    ]


def _temperature(objective: Mapping[str, Any]) -> str:
    both = [objective.get(f"{side}_temperature") for side in ("teacher", "student")]
    if any(value is not None for value in both):
        usual = objective.get("temperature")
        teacher, student = (_number(usual if value is None else value) for value in both)
        return f"{teacher} teacher, {student} student"
    return _number(objective.get("temperature"))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def seeds(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)

"""What the losses on features read of a teacher."""

from __future__ import annotations

from torch import Tensor

from kdcache.fields.maps import averaged
from kdcache.fields.spelling import is_last, spelled, tap_of
from kdcache.methods.loss import TargetFields
from kdcache.methods.nets import Shapes
from kdcache_stores.errors import UsageError


def field_of(target: TargetFields, name: str) -> Tensor:
    """A field of one teacher; ensembles are of logits alone."""
    values = target[name]
    assert isinstance(values, Tensor)
    return values


def choose_last(held: Shapes, height: int, method: str) -> str:
    """The smallest field of a teacher from which its last map averages exactly to a height.

    Args:
        held: the fields that there are, with their shapes per row.
        height: that is needed; one of the teacher's own, where that is smaller, serves as well.
        method: that needs it, for the message.

    Raises:
        UsageError: there is none; the message says which one to dump, and what it weighs.
    """
    maps = {name: shape for name, shape in held.items() if is_last(name) and len(shape) == 3}
    wanted = min([height, *([maps["last"][1]] if "last" in maps else [])])
    exact = [name for name, shape in maps.items() if shape[1] % wanted == 0]
    if exact:
        return min(exact, key=lambda name: maps[name][1])
    have = ", ".join(map(spelled, held)) or "none"
    weight = ""
    vectors = [shape[0] for name, shape in held.items() if name == "pooled" or name in maps]
    if vectors:
        nbytes = 2 * vectors[0] * height**2
        weight = f", {nbytes:,} bytes a view as float16"
    raise UsageError(
        f"{method} needs the teacher's last map at {height} x {height}, and the fields of its store are "
        f"{have}. Dump it, into a store of its own: dump-teacher --fields last@{height}{weight}"
    )


def stages_of(fields: Shapes, ending: str = "") -> list[str]:
    """The stages among some fields, "stage_1", "stage_2", ..., in order, by fields that end so ("_pre")."""
    taps = [(tap_of(name), name) for name in fields]
    before = ending == "_pre"
    numbers = sorted(
        tap.number
        for tap, _ in taps
        if tap is not None and tap.kind == "stage" and tap.before == before and tap.number
    )
    return [f"stage_{number}" for number in numbers]


def last_at(target: TargetFields, height: int, width: int) -> Tensor:
    """The teacher's last map (B, D, height, width), from the smallest field that averages to it exactly."""
    maps = [field_of(target, name) for name in target if is_last(name)]
    exact = [
        m for m in maps if m.shape[2] % height == 0
    ]  # several, if another method reads one too
    return averaged(min(exact, key=lambda m: m.shape[2]), height, width)

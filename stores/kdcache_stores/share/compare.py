"""Two stores compared: one plan? one teacher? which views differ, in which fields, and by how much?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from kdcache_stores.encodings.fidelity import kl
from kdcache_stores.format.canonical_json import Json, first_difference
from kdcache_stores.format.header import Field
from kdcache_stores.read.reader import Store

_VALUES = 2**23
"""Values of a field that are read at once."""


@dataclass(frozen=True)
class FieldDifference:
    """How far one field of one view is from that of another store.

    Args:
        view, field: which.
        rows: samples compared.
        error_mean, error_worst: ||a - b||^2 / ||a||^2 over rows (0 / 0 is 0).
        kl_mean, kl_worst: of logits: KL(softmax(a) || softmax(b)), nats, temperature 1; else None.
        top1_agreement: of logits: share of the rows with the same largest one; else None.
    """

    view: int
    field: str
    rows: int
    error_mean: float
    error_worst: float
    kl_mean: float | None = None
    kl_worst: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class StoreComparison:
    """What `compare_stores` found.

    Args:
        same_content: equal content digests.
        same_plan, same_teacher, same_encoding: equal digests; equal fields, shapes and encodings.
        same_head: the same weight and bias, or none in both.
        differences: of plan, teacher and fields, the first difference each: (name, a, b).
        equal_views: numbers of the views whose bytes are equal.
        differing_views: of stores of one plan, the views whose bytes differ.
        field_differences: of each of them, each field that both hold in one shape.
        only_a, only_b: views that one store holds.
        not_compared: per field why it was not compared, if it was not; `*` stands for all.
    """

    same_content: bool
    same_plan: bool
    same_teacher: bool
    same_encoding: bool
    same_head: bool
    differences: list[tuple[str, Json, Json]]
    equal_views: list[int]
    differing_views: list[int]
    only_a: list[int]
    only_b: list[int]
    field_differences: list[FieldDifference] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON."""
        return asdict(self)


def compare_stores(a: Store, b: Store) -> StoreComparison:
    """Compare two stores; fields are compared where both are of one plan, row by row."""
    fields = [{n: f.to_dict() for n, f in store.fields.items()} for store in (a, b)]
    pairs = {
        "plan": (a.plan.to_dict(), b.plan.to_dict()),
        "teacher": (a.teacher.to_dict(), b.teacher.to_dict()),
        "fields": (fields[0], fields[1]),
    }
    differences = [first_difference(*pair, name) for name, pair in pairs.items()]
    common = [view for view in a.view_range if view in b.view_range]
    digests = [dict(zip(s.view_range, s.view_digests, strict=True)) for s in (a, b)]
    equal = [view for view in common if digests[0][view] == digests[1][view]]
    result = StoreComparison(
        a.digest == b.digest,
        a.plan.digest == b.plan.digest,
        a.teacher.digest == b.teacher.digest,
        fields[0] == fields[1],
        _head(a) == _head(b),
        [difference for difference in differences if difference is not None],
        equal,
        [view for view in common if view not in equal] if a.plan.digest == b.plan.digest else [],
        [view for view in a.view_range if view not in b.view_range],
        [view for view in b.view_range if view not in a.view_range],
    )
    if not result.same_plan:
        result.not_compared["*"] = "the stores are of two view plans: their views show other images"
        return result
    for name in sorted(a.fields.keys() | b.fields.keys()):
        if (reason := _not_comparable(a, b, name)) is not None:
            result.not_compared[name] = reason
            continue
        for view in result.differing_views:
            result.field_differences.append(_measure(a, b, view, a.fields[name]))
    return result


def _head(store: Store) -> list[tuple[str, str]]:
    entries = store.source.entries.values()
    return sorted((entry.key, entry.sha256) for entry in entries if entry.kind == "head")


def _not_comparable(a: Store, b: Store, name: str) -> str | None:
    for store in (a, b):
        if name not in store.fields:
            return f"{store.where} has no field {name}: it has {', '.join(sorted(store.fields))}"
    if a.fields[name].shape != b.fields[name].shape:
        return f"a row is {a.fields[name].shape} in {a.where}, {b.fields[name].shape} in {b.where}"
    return None


def _measure(a: Store, b: Store, view: int, item: Field) -> FieldDifference:
    step = max(1, _VALUES // int(np.prod(item.shape)))
    errors, divergences, agrees = [], [], []
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        p, q = (
            store.read(view, rows, item.name)
            .reshape(-1, int(np.prod(item.shape)))
            .astype(np.float64)
            for store in (a, b)
        )
        size = (p**2).sum(axis=1)
        error = ((p - q) ** 2).sum(axis=1)
        with np.errstate(divide="ignore"):
            errors.append(np.divide(error, size, out=np.zeros_like(size), where=error > 0))
        if item.is_logits:
            divergences.append(kl(p, q))
            agrees.append(p.argmax(axis=1) == q.argmax(axis=1))
    error = np.concatenate(errors)
    figures = view, item.name, len(a), float(error.mean()), float(error.max())
    if not item.is_logits:
        return FieldDifference(*figures)
    value = np.concatenate(divergences)
    agree = float(np.concatenate(agrees).mean())
    return FieldDifference(*figures, float(value.mean()), float(value.max()), agree)

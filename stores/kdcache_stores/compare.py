"""Two stores compared: one plan? one teacher? which views differ, and by how much?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from kdcache_stores.canonical import Json, first_difference
from kdcache_stores.errors import MismatchError
from kdcache_stores.fidelity import kl
from kdcache_stores.reader import LogitStore

_ROWS = 65536


@dataclass(frozen=True)
class ViewDifference:
    """One view that both stores hold and whose bytes differ.

    Args:
        view: its number.
        rows: samples that both hold.
        kl_mean, kl_worst: KL(softmax(a) || softmax(b)) over the rows, nats, temperature 1.
        top1_agreement: share of the rows with the same largest logit.
    """

    view: int
    rows: int
    kl_mean: float
    kl_worst: float
    top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_stores` found.

    Args:
        same_content: equal content digests.
        same_plan, same_teacher, same_encoding: equal digests; equal encodings.
        differences: of plan, teacher and fields, the first difference each: (name, a, b).
        equal_views: numbers of the views whose bytes are equal.
        differing_views: the views that differ.
        only_a, only_b: views that one store holds.
        not_compared: why logits could not be compared, if they could not.
    """

    same_content: bool
    same_plan: bool
    same_teacher: bool
    same_encoding: bool
    differences: list[tuple[str, Json, Json]]
    equal_views: list[int]
    differing_views: list[ViewDifference]
    only_a: list[int]
    only_b: list[int]
    not_compared: str | None = None

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON."""
        return asdict(self)


def compare_stores(a: LogitStore, b: LogitStore, field: str = "logits") -> Comparison:
    """Compare two stores; logits are compared where both are of one plan, row by row."""
    differences = []
    pairs = {
        "plan": (a.plan.to_dict(), b.plan.to_dict()),
        "teacher": (a.teacher.to_dict(), b.teacher.to_dict()),
        "fields": tuple({n: f.to_dict() for n, f in s.fields.items()} for s in (a, b)),
    }
    for name, (one, other) in pairs.items():
        if difference := first_difference(one, other, name):
            differences.append(difference)
    common = [view for view in a.view_range if view in b.view_range]
    same_plan = a.plan.digest == b.plan.digest
    digests = [dict(zip(s.view_range, s.view_digests, strict=True)) for s in (a, b)]
    equal = [view for view in common if digests[0][view] == digests[1][view]]
    found: list[ViewDifference] = []
    reason = None
    if not same_plan:
        reason = "the stores are of two view plans, so their views show different images"
    else:
        try:
            found = [_measure(a, b, view, field) for view in common if view not in equal]
        except MismatchError as error:
            reason = str(error)
    return Comparison(
        a.digest == b.digest,
        same_plan,
        a.teacher.digest == b.teacher.digest,
        a.fields.keys() == b.fields.keys() and a.encoding == b.encoding,
        differences,
        equal,
        found,
        [view for view in a.view_range if view not in b.view_range],
        [view for view in b.view_range if view not in a.view_range],
        reason,
    )


def _measure(a: LogitStore, b: LogitStore, view: int, field: str) -> ViewDifference:
    for store in (a, b):
        if field not in store.fields or store.fields[field].shape != (a.classes,):
            raise MismatchError(f"{store.where} has no field {field!r} of {a.classes} classes")
    total = agree = 0.0
    worst = 0.0
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = (store.read(view, rows, field).astype(np.float64) for store in (a, b))
        values = kl(p, q)
        total, worst = total + float(values.sum()), max(worst, float(values.max()))
        agree += float((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    return ViewDifference(view, len(a), total / len(a), worst, agree / len(a))

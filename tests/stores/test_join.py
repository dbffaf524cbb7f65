"""Fields of one teacher in several stores, and the members of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache_stores import (
    FieldSpec,
    MismatchError,
    Store,
    UsageError,
    common_views,
    join_fields,
    open_store,
)
from kdcache_stores.share.pull import pull_store

from .conftest import CLASSES, make_plan, make_samples, make_teacher, open_writer

OTHER = make_teacher(architecture="other", weights_sha256="cd" * 32)


def dump(path: Path, *names: str, views: int = 2, **changes: Any) -> Store:
    shapes = {name: (CLASSES,) if name == "logits" else (3,) for name in names}
    fields = {name: FieldSpec(shape) for name, shape in shapes.items()}
    with open_writer(path, views, fields=fields, **changes) as writer:
        for shard in writer.pending():
            writer.write(
                shard, {n: np.ones((shard.rows, *s), np.float32) for n, s in shapes.items()}
            )
        writer.seal()
    return open_store(path)


def test_stores_of_one_teacher_join_their_fields(tmp_path: Path) -> None:
    logits = dump(tmp_path / "a", "logits", views=4)
    pooled = dump(tmp_path / "b", "pooled", "tokens", views=3)
    assert join_fields([logits, pooled], ["logits", "pooled"]) == [
        {"logits": logits, "pooled": pooled}
    ]
    assert join_fields([pooled, logits], ["tokens"]) == [{"tokens": pooled}]
    assert common_views([logits, pooled]) == range(3)


def test_different_teachers_are_an_ensemble_in_order_of_appearance(tmp_path: Path) -> None:
    a = dump(tmp_path / "a", "logits")
    b = dump(tmp_path / "b", "logits", "pooled", teacher=OTHER)
    c = dump(tmp_path / "c", "pooled")
    assert join_fields([a, b], ["logits"]) == [{"logits": a}, {"logits": b}]
    assert join_fields([c, b, a], ["logits", "pooled"]) == [
        {"logits": a, "pooled": c},
        {"logits": b, "pooled": b},
    ]


def test_parts_join_over_the_views_that_both_hold(tmp_path: Path) -> None:
    logits = dump(tmp_path / "a", "logits", views=5)
    dump(tmp_path / "b", "pooled", views=4)
    pull_store(tmp_path / "b", tmp_path / "part", views=(1, 3))
    pull_store(tmp_path / "b", tmp_path / "last", views=(3, 4))
    part, last = open_store(tmp_path / "part"), open_store(tmp_path / "last")
    (joined,) = join_fields([logits, part], ["logits", "pooled"])
    assert common_views(joined.values()) == range(1, 3)
    with pytest.raises(MismatchError, match=r"no view in common .*part: views 1 to 2"):
        common_views([part, last])
    grown = dump(tmp_path / "b", "pooled", views=5)
    assert common_views([logits, grown]) == range(5)


def test_a_field_that_two_stores_hold_is_refused_by_name(tmp_path: Path) -> None:
    a, b = dump(tmp_path / "a", "logits", "pooled"), dump(tmp_path / "b", "pooled")
    for wanted in ("logits", "pooled"):
        with pytest.raises(MismatchError, match=r"/a and .*/b both hold pooled of one teacher"):
            join_fields([a, b], [wanted])
    with pytest.raises(MismatchError, match="both hold logits"):
        join_fields([a, a], ["logits"])


def test_a_missing_field_says_what_there_is(tmp_path: Path) -> None:
    a = dump(tmp_path / "a", "logits", "tokens")
    with pytest.raises(MismatchError, match=r"/a: no field pooled of toy, it holds logits, tokens"):
        join_fields([a], ["logits", "pooled"])
    b = dump(tmp_path / "b", "logits", "pooled", teacher=OTHER)
    with pytest.raises(MismatchError, match=r"/a: no field pooled of toy") as raised:
        join_fields([b, a], ["pooled"])
    assert "another teacher" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"precision": "bfloat16"}, "precision is 'float32' here and 'bfloat16' there"),
        ({"preprocessing": {"mean": [0.4], "std": [0.25]}}, r"mean\[0\] is 0.5 here and 0.4 there"),
        (
            {"preprocessing": {"mean": [0.5], "std": [0.25], "class_map": [1, 0]}},
            r"class_map is None here and \[1, 0\] there",
        ),
    ],
)
def test_equal_weights_used_otherwise_are_another_teacher(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    logits = dump(tmp_path / "a", "logits")
    pooled = dump(tmp_path / "b", "pooled", teacher=make_teacher(**changes))
    with pytest.raises(
        MismatchError, match=f"equal weights, but that is another teacher.*{difference}"
    ):
        join_fields([logits, pooled], ["logits", "pooled"])


def test_stores_of_two_plans_are_refused(tmp_path: Path) -> None:
    a = dump(tmp_path / "a", "logits")
    b = dump(tmp_path / "b", "pooled", plan=make_plan(make_samples(), seed=8))
    with pytest.raises(MismatchError, match=r"two view plans.*plan\.seed is 7 and 8"):
        join_fields([a, b], ["logits"])


def test_nothing_to_join_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        join_fields([], ["logits"])
    with pytest.raises(UsageError, match="at least one"):
        join_fields([dump(tmp_path, "logits")], [])

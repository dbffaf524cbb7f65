"""What is said before a dump, against what the dump then does."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.estimate import encoded_bytes, estimate
from kdcache.dumping.opening import Target
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import MismatchError, StoreError, describe, open_store

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def plan(digits: Dataset) -> ViewPlan:
    return ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)


@pytest.mark.parametrize("encoding", ["float32", "float16", "quantized", "topk:3"])
def test_bytes_are_near_those_written(encoding: str, teacher: Teacher, tmp_path: Path) -> None:
    dataset = load_dataset("digits")
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    target = Target(teacher, tmp_path / "s")
    cost = estimate(plan, [target], 2, encoding=encoding)
    assert not (tmp_path / "s").exists()
    dump(plan, [target], 2, encoding=encoding)
    with open_store(tmp_path / "s") as store:
        per_row = describe(store)["fields"]["logits"]["bytes_per_row"]
    near = 0.05 if encoding.startswith("float") else 0.5  # of 30 rows, which compress badly
    assert cost.bytes_per_row == pytest.approx(per_row, rel=near)
    assert cost.nbytes == pytest.approx(per_row * cost.rows, rel=near)
    cost = estimate(plan, [target], 4, encoding=encoding)  # what is there is known
    assert cost.bytes_per_row == pytest.approx(per_row, rel=0.02)


def test_rows_forwards_and_break_even(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    targets = [Target(teacher, tmp_path / "a"), Target(teacher, tmp_path / "b")]
    cost = estimate(plan, targets, 4, epochs=10, students=3)
    assert (cost.rows, cost.stored) == (1200, 0)
    assert cost.forwards == 2 * 4 * 300
    assert cost.online_forwards == 2 * 10 * 3 * 300
    assert cost.break_even_epochs == 4
    assert cost.seconds == pytest.approx(cost.rows / cost.rows_per_second)
    dump(plan, targets[:1], 2)
    cost = estimate(plan, targets[:1], 4)
    assert (cost.rows, cost.stored) == (600, 600)
    assert estimate(plan, targets[1:], 4, part=(0, 4)).rows == 300
    dump(plan, targets[:1], 4)
    cost = estimate(plan, targets[:1], 4)
    assert (cost.rows, cost.stored, cost.nbytes) == (0, 1200, 0)


def test_a_full_disk_is_refused_before_anything_is_begun(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 9000, 9000))
    assert estimate(plan, [Target(teacher, tmp_path / "a" / "s")], 1).free_bytes == 9000
    twice = [Target(teacher, tmp_path / "a" / "s"), Target(teacher, tmp_path / "b" / "s")]
    with pytest.raises(StoreError, match="free"):
        estimate(plan, twice, 1)
    assert not list(tmp_path.iterdir())


def test_a_store_of_another_plan_is_refused_by_the_estimate(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 1)
    other = ViewPlan(plan.dataset, plan.augmentation, seed=1)
    with pytest.raises(MismatchError, match="seed"):
        estimate(other, [Target(teacher, tmp_path / "s")], 1)


def test_encoded_bytes_of_float32_are_four_each() -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 10)).astype(np.float32)
    size = encoded_bytes(
        {"logits": rows[None]}, np.zeros(1000, np.int64), 10, {"logits": "float32"}
    )
    assert (size.store, size.sample) == (0, 0)
    assert 40 <= size.row < 41


def test_many_views_of_compact_cost_what_the_later_ones_do(
    teacher: Teacher, tmp_path: Path
) -> None:
    dataset = load_dataset("digits")
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    target = Target(teacher, tmp_path / "s")
    found = []
    for views in (8, 16):  # a new store, then its growth
        cost = estimate(plan, [target], views, encoding="compact:2.5e-5")
        before = nbytes_of(tmp_path / "s")
        dump(plan, [target], views, encoding="compact:2.5e-5")
        found.append(cost.nbytes / (nbytes_of(tmp_path / "s") - before))
    assert found == pytest.approx([1, 1], rel=0.05)


def nbytes_of(path: Path) -> int:
    if not path.exists():
        return 0
    with open_store(path) as store:
        nbytes: int = describe(store)["fields"]["logits"]["nbytes"]
        return nbytes

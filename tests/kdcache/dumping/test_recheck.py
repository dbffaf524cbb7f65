"""Re-running a teacher on rows of a store: passes for its own, fails for any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.recheck import recheck
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import MismatchError, open_store
from tests.kdcache.dumping.conftest import MakeTeacher


@pytest.fixture
def plan(digits: Dataset) -> ViewPlan:
    return ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)


@pytest.mark.parametrize("encoding", ["float32", "float16", "quantized:0.25", "topk:2"])
def test_its_own_logits_pass(
    encoding: str, plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 5, encoding=encoding)
    with open_store(tmp_path / "s") as store:
        found = recheck(store, plan, teacher, rows=200, batch_size=7)
    assert found.ok, found.problems
    assert found.rows == 200


@pytest.mark.parametrize("encoding", ["float32", "quantized:0.25", "topk:2"])
def test_other_logits_fail(
    encoding: str, plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    teacher = make_teacher()
    dump(plan, [(teacher, tmp_path / "s")], 2, encoding=encoding)
    others = {
        "weights": make_teacher(seed=9),
        "scale": replace(teacher, module=nn.Sequential(teacher.module, Times(1.5))),
        "order": replace(teacher, class_map=(1, 0, *range(2, 10))),
    }
    with open_store(tmp_path / "s") as store:
        for name, other in others.items():
            found = recheck(store, plan, other, rows=100)
            assert not found.ok, name
            assert found.worst["key"] in plan.dataset.keys


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_rows_are_spread_over_views_and_samples(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 20)
    seen: list[tuple[int, int]] = []
    stream = ViewPlan.stream

    def watched(self: ViewPlan, batches: list, *args: object) -> object:
        for rows, views in batches:
            seen.extend(zip(rows.tolist(), np.broadcast_to(views, len(rows)).tolist(), strict=True))
        return stream(self, batches, *args)

    monkeypatch.setattr(ViewPlan, "stream", watched)
    with open_store(tmp_path / "s") as store:
        recheck(store, plan, teacher, rows=20)
    pairs = seen[-20:]
    assert {view for _, view in pairs} == set(range(20))
    assert len({row for row, _ in pairs}) > 15


def test_other_pixels_are_refused(
    plan: ViewPlan, teacher: Teacher, digits: Dataset, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 1)
    shifted = digits.subset(range(300))
    shifted.images = torch.roll(digits.images, 1, 0)
    with open_store(tmp_path / "s") as store, pytest.raises(MismatchError, match="replay"):
        recheck(store, ViewPlan(shifted, plan.augmentation, 0), teacher)

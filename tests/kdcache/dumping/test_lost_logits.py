"""A teacher whose logits float16 loses is refused before a shard is written, by every way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.estimate import estimate
from kdcache.dumping.imported import import_for
from kdcache.dumping.opening import Target
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, describe, open_store
from tests.kdcache.dumping.conftest import tree

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "underflow": lambda x: x * 1e-9,
    "offset": lambda x: x + 2e4,
    "overflow": lambda x: x * 1e6,
}


class Changed(nn.Module):
    """A network with something done to its logits."""

    def __init__(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.change = module, change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.module(images))


@pytest.fixture
def plan(digits: Dataset) -> ViewPlan:
    return ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)


@pytest.mark.parametrize("change", CHANGES)
def test_refused_by_the_estimate_and_by_the_dump(
    change: str, teacher: Teacher, plan: ViewPlan, tmp_path: Path
) -> None:
    sick = replace(teacher, module=Changed(teacher.module, CHANGES[change]))
    path = tmp_path / "s"
    with pytest.raises(DataError, match="use the encoding float32"):
        estimate(plan, [Target(sick, path)], 2)
    assert not path.exists()
    with pytest.raises(DataError, match="use the encoding float32"):
        dump(plan, [(sick, path)], 2)
    assert not [
        name
        for name in tree(path)
        if "/c/" in name or (name.endswith(".json") and "records" in name)
    ]
    dump(plan, [(sick, tmp_path / "t")], 2, encoding="float32")
    with open_store(tmp_path / "t") as store:
        assert describe(store)["fields"]["logits"]["fidelity"]["top1_agreement"] == 1


def test_a_growth_is_refused_too(teacher: Teacher, plan: ViewPlan, tmp_path: Path) -> None:
    path = tmp_path / "s"
    dump(plan, [(teacher, path)], 1)
    before = tree(path)
    sick = replace(teacher, module=Changed(teacher.module, CHANGES["underflow"]))
    for grow in (
        lambda: estimate(plan, [Target(sick, path)], 2),
        lambda: dump(plan, [(sick, path)], 2),
    ):
        with pytest.raises(DataError, match="use the encoding float32"):
            grow()
        assert tree(path) == before


def test_an_import_is_refused_too(digits: Dataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (len(digits), 10)).astype(np.float32)
    logits[np.arange(len(digits)), digits.labels] += 5
    np.savez(tmp_path / "l.npz", logits=logits * 1e-9, keys=np.array(digits.keys))
    with pytest.raises(DataError, match="use the encoding float32"):
        import_for(digits, tmp_path / "l.npz", tmp_path / "s")
    assert not (tmp_path / "s").exists()

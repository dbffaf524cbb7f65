"""A dump whose encoding learns first: the same store at once, in parts, and from where it stopped."""

from __future__ import annotations

import re
from pathlib import Path

from kdcache import load_dataset
from kdcache.augment.specs import make_augmentation
from kdcache.dumping.dump import dump
from kdcache.teachers.load import load_teacher
from kdcache.views.plan import ViewPlan
from kdcache_cli.commands.inspecting import page
from kdcache_stores import describe, open_store
from tests.conftest import Trained


def test_compact_stores_do_not_depend_on_parts_and_keep_what_was_said(
    trained: Trained, tmp_path: Path
) -> None:
    dataset = load_dataset("digits", "train").subset(range(300))
    live = open_store(trained.store)
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), live.plan.seed)
    teacher = load_teacher(trained.teacher, classes=10, channels=1, size=8)

    def run(name: str, views: int, part: tuple[int, int] = (0, 1)) -> int:
        target = (teacher, tmp_path / name)
        return dump(plan, [target], views, encoding="compact:1e-3", part=part).rows

    assert run("whole", 3) == 3 * 300
    assert run("parts", 3, (1, 3)) == 2 * 300  # view 0 is needed for its base
    assert run("parts", 3, (0, 3)) == 0
    assert run("parts", 3) == 300
    assert run("parts", 3) == 0
    whole, parts = open_store(tmp_path / "whole"), open_store(tmp_path / "parts")
    assert whole.digest == parts.digest
    text = dict(page(describe(whole)))
    assert text["encoding"] == "compact (kl=0.001)"
    assert text["asked for, Z-scored, tau=2"] == "1.0e-03"
    assert re.fullmatch(r"components [1-9], directions 9, step [0-9.]+", text["fitted"])
    assert re.match(r"values \d.*, mean \d.*, base \d.*, basis", text["of which, bytes a row"])
    fidelity = describe(whole)["fields"]["logits"]["fidelity"]
    assert fidelity["top1_agreement"] == 1
    assert fidelity["kl_z_mean"] < 1.3e-3

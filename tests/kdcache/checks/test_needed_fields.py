"""What a method reads of a teacher is known, with its weight, before it is dumped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kdcache.checks.check import CheckRequest, check_stores
from kdcache.methods.config import ObjectiveConfig
from kdcache.training.assembly import fields_of_architecture
from kdcache_stores import UsageError
from tests.conftest import Result, Trained


def findings(store: Path, method: str, **changes: Any) -> list[str]:
    asked = CheckRequest(stores=(str(store),), objective=ObjectiveConfig(method=method), **changes)
    return [str(f) for f in check_stores(asked) if f.rule == "missing-field"]


def test_fields_of_a_zoo_teacher_and_what_they_weigh() -> None:
    shapes = fields_of_architecture("resnet32x4", 100, (3, 32, 32))
    assert shapes is not None
    assert shapes["last_4"] == (256, 4, 4)
    assert set(shapes) == {
        "logits", "pooled", "last", "last_1", "last_2", "last_4",
        *(f"attention_{height}" for height in (32, 16, 8, 4, 2)),
        *(f"stage_{number}{end}" for number in (1, 2, 3) for end in ("", "_pre")),
    }  # fmt: skip
    assert fields_of_architecture("torchvision:resnet18", 100, (3, 32, 32)) is None


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("rkd", r"rkd reads pooled of the teacher, and its stores hold logits\. As float16 that is 128 bytes "),
        ("crd", "crd reads pooled"),
        ("at", "at reads attention@8,attention@4,attention@2 .* that is 216 bytes a view"),
        ("simkd", r"simkd reads last of .* 512 bytes .*--fields last into a store of its own"),
        ("cat-kd", "cat-kd reads last "),
    ],
)  # fmt: skip
def test_what_a_store_lacks_for_a_method(trained: Trained, method: str, needs: str) -> None:
    (message,) = findings(trained.store, method, dataset="digits", student="resnet8")
    assert re.search(needs, message), message


def test_methods_on_logits_and_stores_that_have_it_lack_nothing(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    assert findings(trained.store, "dkd", dataset="digits", student="resnet8") == []
    done: Result = kdcache(
        "dump-teacher", "--teacher", trained.teacher, "--dataset", "digits", "--views", 1, "--device",
        "cpu", "--fields", "pooled,last,attention", "--out", tmp_path / "s", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["estimate"]["field_bytes"] == pytest.approx(
        {"pooled": 128, "last": 512, "attention_8": 128, "attention_4": 64, "attention_2": 24},
        rel=0.1,
    )
    for method in ("rkd", "at", "simkd", "cat-kd", "crd"):
        assert findings(tmp_path / "s", method, dataset="digits", student="resnet8") == []
    with pytest.raises(UsageError, match="give --student and --dataset"):
        findings(tmp_path / "s", "simkd")


def test_a_training_names_what_is_to_be_dumped(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    done: Result = kdcache(
        "train-student", "--store", trained.store, "--dataset", "digits", "--student", "resnet8",
        "--method", "at", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 2
    assert (
        "at reads attention of the teacher, found logits: dump-teacher --fields attention"
        in done.err
    )
    assert not (tmp_path / "run").exists()


def test_heavy_fields_beside_light_ones_are_remarked_on(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    done: Result = kdcache(
        "dump-teacher", "--teacher", trained.teacher, "--dataset", "digits", "--views", 1, "--device",
        "cpu", "--fields", "logits,stage:1,last", "--out", tmp_path / "s", "--dry-run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "stage_1, last is 102 times as large as logits" in done.err

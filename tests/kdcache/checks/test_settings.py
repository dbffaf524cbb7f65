"""Weights and temperatures: what is published is silent, what is not is held against the ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.checks.all_rules import run_rules
from kdcache.checks.case import Case
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.table import METHODS
from kdcache.recipes import published as recipes

from .stores import rules, store, taught


def found(**options: Any) -> list[str]:
    return rules(Case(objective=ObjectiveConfig(**options)))


def published() -> list[tuple[str, str | None, str]]:
    """Every recipe, alone and with every pair of teacher and student that its file knows."""
    every = []
    for name in recipes.names():
        pairs = recipes.load(name.partition("/")[0]).get("pair", {})
        every += [(name, None, "resnet8x4"), (name, None, "mobilenetv1")]
        every += [(name, *pair.split(">")) for pair in pairs]
    return every


@pytest.mark.parametrize(("name", "teacher", "student"), published())
def test_recipes_never_warn(name: str, teacher: str | None, student: str) -> None:
    options = recipes.resolve(name, student, teacher)
    flags = {name: value for name, value in options.items() if name in ObjectiveConfig.flags()}
    assert rules(Case(objective=ObjectiveConfig.from_flags(flags))) == []


@pytest.mark.parametrize(("method", "standardize"), [
    (name, standardize) for name, method in METHODS.items()
    for standardize in ((False, "unbiased", "biased") if method.standardized else (False,))
])  # fmt: skip
def test_defaults_never_warn(method: str, standardize: Any) -> None:
    assert found(method=method, standardize=standardize) == []


@pytest.mark.parametrize("options", [
    {"temperature": 2.0}, {"temperature": 5.0}, {"alpha": 0.1, "temperature": 3.0}, {"alpha": 0.5},
    {"alpha": 0.3, "temperature": 2.5}, {"ce_weight": 1.0, "kd_weight": 1.0},
    {"ce_weight": 1.0, "kd_weight": 0.5, "temperature": 1.0}, {"method": "dkd", "options": {"beta": 2.0}},
    {"method": "dkd", "kd_weight": 0.8}, {"standardize": "unbiased", "kd_weight": 3.0},
    {"standardize": "biased", "temperature": 4.0}, {"method": "ce"},
    {"teacher_temperature": 3.0, "student_temperature": 2.0},
], ids=str)  # fmt: skip
def test_within_the_ranges_is_silent(options: dict[str, Any]) -> None:
    assert found(**options) == []


@pytest.mark.parametrize(("options", "rule"), [
    ({"temperature": 1.5}, "temperature"), ({"temperature": 5.5}, "temperature"),
    ({"method": "dkd", "temperature": 20.0}, "temperature"),
    ({"method": "mlkd", "temperature": 1.0, "alpha": 0.1}, "temperature"),
    ({"standardize": "unbiased", "temperature": 1.0}, "temperature"),
    ({"teacher_temperature": 1.0}, "temperature"),
    ({"alpha": 0.09}, "alpha"), ({"alpha": 0.51}, "alpha"), ({"ce_weight": 1.0, "kd_weight": 0.1}, "alpha"),
    ({"alpha": 0.0}, "no-labels"), ({"method": "ctkd", "ce_weight": 0.0}, "no-labels"),
    ({"alpha": 1.0}, "no-distillation"),
    ({"standardize": "unbiased", "kd_weight": 0.9}, "standardized-weight"),
    ({"standardize": "unbiased", "alpha": 0.1}, "standardized-weight"),
    ({"method": "dkd", "standardize": "unbiased", "kd_weight": 1.0}, "standardized-weight"),
    ({"kd_weight": 9.0}, "standardized-weight"), ({"method": "ctkd", "kd_weight": 9.0}, "standardized-weight"),
    ({"method": "dkd", "ce_weight": 0.1, "kd_weight": 0.9}, "other-method"),
    ({"method": "dkd", "standardize": "unbiased", "ce_weight": 0.1, "kd_weight": 9.0}, "other-method"),
    ({"method": "mlkd", "ce_weight": 1.0, "kd_weight": 1.0}, "other-method"),
], ids=str)  # fmt: skip
def test_outside_the_ranges_warns_once(options: dict[str, Any], rule: str) -> None:
    assert found(**options) == [rule]


def test_a_temperature_near_zero_is_told_once(tmp_path: Path) -> None:
    assert rules(taught(store(tmp_path / "s"), temperature=0.05)) == [
        "temperature",
        "certain-targets",
    ]


def test_a_batch_larger_than_the_samples() -> None:
    labels = np.arange(80) % 10
    assert rules(Case(labels=labels, batch_size=80)) == []
    (finding,) = run_rules(Case(labels=labels, batch_size=81, epochs=30))
    assert finding.rule == "batch-size"
    assert "30 epochs are 30 steps" in finding.message
    assert "--batch-size 10" in finding.remedy


def test_two_mistakes_are_two_findings() -> None:
    assert found(temperature=20.0, alpha=0.9) == ["temperature", "alpha"]


def test_without_labels_there_is_no_cross_entropy_to_weigh() -> None:
    objective = ObjectiveConfig(alpha=0.0)
    assert rules(Case(objective=objective, labels=np.full(10, -1))) == []
    assert rules(Case(objective=objective, labels=np.arange(10))) == ["no-labels"]


def test_a_finding_says_what_why_and_what_to_do() -> None:
    (finding,) = run_rules(Case(objective=ObjectiveConfig(temperature=20.0)))
    assert finding.to_dict().keys() == {"rule", "message", "remedy"}
    assert "T = 20 is outside 2 to 5" in finding.message
    assert "--temperature 4" in finding.remedy
    assert str(finding).endswith("[temperature]")

"""Rules about int8 and pruning, by the numbers that were measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Fit, Pruned
from kdcache.checks.rules.smaller import int8_loss, pruned_too_far


@pytest.mark.parametrize(
    ("lost", "won", "named"),
    [(0, 0, False), (10, 9, False), (30, 20, False), (0, 9, False), (40, 2, True), (3, 0, False)],
)
def test_a_loss_that_rounding_does_not_explain(lost: int, won: int, named: bool) -> None:
    assert [f.rule for f in int8_loss(lost, won, 360, 512)] == ["int8-loss"] * named


QUARTER = (0.2016, 0.8274, 0.4217, 0.4058, 0.4011, 0.3116, 0.2286, 0.1884)
HALF = (0.2016, 1.6618, 0.7708, 0.6117, 0.5381, 0.4003, 0.3255, 0.2838)
MOST = (0.2016, 5.0022, 4.2328, 2.8784, 2.1118, 1.7586, 1.5675, 1.5237)


@pytest.mark.parametrize(
    ("kd", "prune", "named"),
    [
        (QUARTER, Pruned(0.25, 2, True), False),
        (HALF, Pruned(0.5, 2, True), False),
        (MOST, Pruned(0.875, 2, True), True),
        (MOST, Pruned(0.875, 2, False), False),  # its first epoch is no measure
        (MOST, Pruned(0.875, 8, True), False),  # no epoch of recovery
        (MOST, None, False),
    ],
)
def test_pruned_past_the_knee(kd: Sequence[float], prune: Pruned | None, named: bool) -> None:
    case = Case(fit=Fit(tuple(kd), 0.9), prune=prune)
    findings = list(pruned_too_far(case))
    assert [finding.rule for finding in findings] == ["pruned-too-far"] * named
    if named:
        assert "7.6 times as far" in findings[0].message

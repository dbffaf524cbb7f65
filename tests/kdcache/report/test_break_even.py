"""The account of a store in teacher forwards."""

from typing import Any

import pytest

from kdcache.break_even import break_even


def info(views: int, samples: int = 50_000, name: str = "exhaustive") -> dict[str, Any]:
    return {"views": views, "samples": samples, "plan": {"augmentation": {"name": name}}}


def test_exhaustive_views_save_a_third_of_the_first_student() -> None:
    account = break_even(info(162))
    assert account.spent == 162 * 50_000
    assert account.saved_per_epoch == 50_000
    assert account.epochs == 162
    assert account.saving(240) == pytest.approx(0.325)
    assert account.saving(240, students=3) == pytest.approx(0.775)
    assert account.sentence() == (
        "pays off after 162 student epochs; one student of 240 epochs: 32.5% fewer than online; "
        "three students of 240 epochs: 77.5% fewer than online"
    )


def test_pairs_cost_two_forwards_an_epoch() -> None:
    account = break_even(info(40, name="weak+strong"))
    assert account.saved_per_epoch == 100_000
    assert account.epochs == 20


def test_a_store_can_cost_more_than_it_saves() -> None:
    account = break_even(info(162))
    assert account.saving(81) == pytest.approx(-1)
    assert "one student of 81 epochs: 100.0% more than online" in account.sentence(81)

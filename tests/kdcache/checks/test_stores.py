"""Rules about stores: each with a case that triggers it and one that just does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.checks.all_rules import run_rules
from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Baseline, Fit
from kdcache.checks.finding import Finding
from kdcache.checks.rules.members import correlation
from kdcache.checks.rules.view_count import fit, variances
from kdcache.checks.sample import draw
from kdcache_stores.share.pull import pull_store

from .stores import CLASSES, ROWS, VIEWS, rules, store, taught, teacher_logits, write

LABELS = np.arange(ROWS) % CLASSES


@pytest.mark.parametrize(
    "encoding", ["float32", "float16", "quantized:0.05", "topk:5", "compact:3e-4"]
)
def test_a_good_store_is_silent(tmp_path: Path, encoding: str) -> None:
    good = store(tmp_path / "s", encoding=encoding, clean={"train": 0.8, "test": 0.75})
    assert rules(taught(good)) == []
    assert rules(Case(stores=[good])) == []
    baseline = Baseline(tmp_path, 0.7)
    for method in ("kd", "dkd", "ctkd"):
        for standardize in (False, "unbiased"):
            case = taught(good, method=method, standardize=standardize, baseline=baseline)
            assert rules(case) == []


def test_cross_entropy_reads_no_store(tmp_path: Path) -> None:
    assert rules(taught(store(tmp_path / "s", right=0.0), method="ce")) == []


def test_unlabelled_data(tmp_path: Path) -> None:
    nothing = np.full(ROWS, -1)
    unlabelled = write(tmp_path / "s", teacher_logits(LABELS), nothing)
    assert rules(taught(unlabelled)) == []
    assert rules(taught(unlabelled, alpha=0.0)) == []
    small = write(tmp_path / "few", teacher_logits(LABELS, within=2.0), nothing)
    assert rules(taught(small)) == ["few-views"]


# ---- the teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "expected"), [(0.0, ["chance"]), (0.05, ["chance"]), (0.3, [])])
def test_chance(tmp_path: Path, right: float, expected: list[str]) -> None:
    assert rules(taught(store(tmp_path / "s", right=right))) == expected


def test_the_commonest_class_is_chance(tmp_path: Path) -> None:
    labels = np.where(np.arange(ROWS) % 10 < 7, 0, LABELS)
    always = store(tmp_path / "s", labels=labels, shown=np.zeros(ROWS, np.int64), right=1.0)
    assert "chance" in rules(taught(always))
    knows = store(tmp_path / "t", labels=labels, right=0.9)
    assert "chance" not in rules(taught(knows))


def test_classes_in_another_order_are_named(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(CLASSES)
    (finding,) = run_rules(taught(store(tmp_path / "s", shown=order[LABELS])))
    assert finding.rule == "class-order"
    moved = [f"{d} is its {t}" for d, t in enumerate(order) if d != t]
    assert ", ".join(moved[:5]) in finding.message
    assert "--class-map" in finding.remedy


def test_a_swapped_pair_of_classes_is_found_and_confusion_is_not(tmp_path: Path) -> None:
    swapped = LABELS.copy()
    swapped[LABELS == 3], swapped[LABELS == 5] = 5, 3
    assert rules(taught(store(tmp_path / "s", shown=swapped))) == ["class-order"]
    # Half of the 3s taken for 5s, and half of the 5s for 3s: a weak teacher, not another order.
    half = np.where(np.arange(ROWS) // CLASSES % 2 == 0, swapped, LABELS)
    assert rules(taught(store(tmp_path / "t", shown=half))) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_order_is_found_in_noise(tmp_path: Path, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 100, 2000)
    weak = store(tmp_path / "s", labels=labels, classes=100, right=0.25, seed=seed)
    assert rules(taught(weak)) == []


@pytest.mark.parametrize(("clean", "expected"), [(0.9, []), (1.0, ["lost-on-views"])])
def test_lost_on_the_views(tmp_path: Path, clean: float, expected: list[str]) -> None:
    weak = store(tmp_path / "s", right=0.65, clean={"train": clean})  # about 66% on the views
    assert rules(taught(weak)) == expected
    mixed = store(tmp_path / "m", right=0.65, clean={"train": clean}, augmentation="mixup")
    assert rules(taught(mixed)) == []


@pytest.mark.parametrize(("top1", "expected"), [(0.78, []), (0.80, ["weak-teacher"])])
def test_a_teacher_no_better_than_the_baseline(
    tmp_path: Path, top1: float, expected: list[str]
) -> None:
    """75% on 500 images has a standard error of 1.9 points: up to 78.9% may be equal."""
    good = store(tmp_path / "s", clean={"test": 0.75})
    assert rules(taught(good, baseline=Baseline(tmp_path, top1))) == expected
    few = store(tmp_path / "f", clean={"test": 0.75}, provenance={"clean_images": {"test": 28}})
    assert rules(taught(few, baseline=Baseline(tmp_path, top1))) == []  # 16 points of error
    unknown = store(tmp_path / "t", clean={"train": 0.75})
    assert rules(taught(unknown, baseline=Baseline(tmp_path, top1))) == []


@pytest.mark.parametrize(("top1", "expected"), [(0.74, []), (0.70, ["behind-labels"])])
def test_a_student_behind_its_training_from_labels(
    tmp_path: Path, top1: float, expected: list[str]
) -> None:
    """75% and 70% on 1000 images: the difference has a standard error of 2.0 points."""
    good = store(tmp_path / "s", clean={"test": 0.9})
    for images, warned in ((1000, expected), (None, [])):
        fit = Fit((0.1,), top1, images)
        assert rules(taught(good, baseline=Baseline(tmp_path, 0.75), fit=fit)) == warned


# ---- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(0.2, ["kd-share"]), (1.0, [])])
def test_logits_too_small_for_plain_kd(tmp_path: Path, scale: float, expected: list[str]) -> None:
    small = store(tmp_path / "s", scale=scale)
    assert rules(taught(small)) == expected
    assert rules(taught(small, standardize="unbiased")) == []
    assert rules(taught(small, method="dkd")) == []


@pytest.mark.parametrize(("scale", "expected"), [(40.0, ["certain-targets"]), (3.0, [])])
def test_a_teacher_that_is_sure(tmp_path: Path, scale: float, expected: list[str]) -> None:
    sure = store(tmp_path / "s", scale=scale, right=1.0, within=0.05)
    assert rules(taught(sure)) == expected
    assert rules(taught(sure, standardize="unbiased")) == []


def test_a_temperature_that_helps_is_named(tmp_path: Path) -> None:
    sure = store(tmp_path / "s", scale=10.0, right=1.0, within=0.05)
    found = run_rules(taught(sure, temperature=1.0, ce_weight=0.5, kd_weight=0.5))
    assert [finding.rule for finding in found] == ["certain-targets"]
    assert "--temperature" in found[0].remedy
    assert rules(taught(sure)) == []


# ---- views -----------------------------------------------------------------------------------------


def test_variances_are_the_two_way_ones(tmp_path: Path) -> None:
    """Against NumPy in float64; more views than are read would not change what is estimated."""
    logits = teacher_logits(LABELS, views=4, within=0.5)
    case = taught(write(tmp_path / "s", logits, LABELS, encoding="float32"))
    found = variances(case)
    wide = logits.astype(np.float64) / 4
    within = wide.var(0, ddof=1).sum(1).mean()
    between = wide.mean(0).var(0, ddof=1).sum() - within / 4
    assert found is not None
    assert found == pytest.approx((within, between), rel=1e-5)
    assert found.uncovered(4) == pytest.approx(within / 4 / between, rel=1e-5)
    assert found.uncovered(found.enough()) <= 0.01 < found.uncovered(found.enough() - 1)
    # 0.5^2 of the unit variance of a class, over samples
    assert found.within / found.between == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(("within", "epochs", "expected"), [
    (0.6, 240, ["few-views"]), (0.6, 8, []), (0.2, 240, []),
])  # fmt: skip
def test_few_views(tmp_path: Path, within: float, epochs: int, expected: list[str]) -> None:
    few = store(tmp_path / "s", within=within)
    assert rules(taught(few, epochs=epochs)) == expected


def test_no_more_views_are_advised_than_the_epochs_show(tmp_path: Path) -> None:
    """Thirty and more would do, of which eight epochs show eight; a single view is told of its own."""
    few = store(tmp_path / "s", within=2.0, views=3)
    (finding,) = run_rules(taught(few, epochs=8))
    assert finding.remedy.startswith(
        "dump-teacher --views 8: 8 views, all that its epochs show, bring that to "
    )
    (one,) = run_rules(taught(store(tmp_path / "t", views=1), epochs=3))
    assert one.remedy == "dump-teacher --views 3."


def test_as_many_views_as_it_says_are_enough(tmp_path: Path) -> None:
    (finding,) = run_rules(taught(store(tmp_path / "s", within=0.6)))
    count = int(finding.remedy.partition("--views ")[2].partition(":")[0])
    assert rules(taught(store(tmp_path / "more", within=0.6, views=count + 1))) == []
    assert rules(taught(store(tmp_path / "less", within=0.6, views=count // 2))) == ["few-views"]


def test_a_single_view_is_told_from_all_there_are(tmp_path: Path) -> None:
    assert rules(taught(store(tmp_path / "s", views=1))) == ["few-views"]
    assert rules(taught(store(tmp_path / "t", views=1), epochs=1)) == []
    assert rules(taught(store(tmp_path / "u", views=1, augmentation="none"))) == []
    center = {"name": "center-crop", "size": 8, "resize": 9}
    assert rules(taught(store(tmp_path / "w", views=1, augmentation=center))) == []
    nine = {"name": "exhaustive", "padding": 1, "flip": False, "mode": "constant"}
    all_of_them = store(tmp_path / "v", views=9, within=2.0, augmentation=nine)
    assert rules(taught(all_of_them)) == []
    assert rules(taught(all_of_them, views=range(4))) == ["few-views"]


def ended(case: Case, left: float, falling: float, epochs: int) -> Fit:
    quarter = epochs // 4
    shares = [left / (1 - falling)] * (epochs - quarter) + [left] * quarter
    uniform = [case.uniform_at(epoch) for epoch in range(epochs)]
    return Fit(tuple(s * u["kd"] for s, u in zip(shares, uniform, strict=True) if u), 0.7)


@pytest.mark.parametrize("options", [
    {}, *(pytest.param(options, marks=pytest.mark.slow)
          for options in ({"standardize": "unbiased"}, {"method": "dkd"})),
], ids=str)  # fmt: skip
def test_what_the_end_of_a_training_shows(tmp_path: Path, options: dict[str, object]) -> None:
    def end(case: Case, left: float, falling: float, epochs: int = 80) -> list[Finding]:
        return list(fit(case.finished(ended(case, left, falling, epochs))))

    case = taught(store(tmp_path / "s", within=0.4), **options)
    (stuck,) = end(case, 0.6, 0.01)
    assert stuck.rule == "unfit"
    assert "larger student" in stuck.remedy
    (rising,) = end(case, 1.2, -0.3)
    assert rising.rule == "unfit"
    assert end(case, 0.6, 0.05) == []  # still falling
    assert end(case, 0.9, 0.0, epochs=9) == []  # too short to tell
    assert end(case, 0.3, 0.01) == []
    (done,) = end(case, 0.01, 0.0)
    assert done.rule == "learned-by-heart"
    assert end(case, 0.01, 0.0, epochs=VIEWS) == []
    assert end(taught(store(tmp_path / "t", within=0.1), **options), 0.01, 0.0) == []


def test_views_that_are_stored_need_no_dump(tmp_path: Path) -> None:
    whole = store(tmp_path / "s", within=0.2)  # 4% / V
    (some,) = run_rules(taught(whole, views=range(2)))
    assert (some.rule, some.remedy[:27]) == ("few-views", "--views 4, which are stored")
    (one,) = run_rules(taught(whole, views=range(1)))
    assert (one.rule, one.remedy) == ("few-views", "--views 4, which are stored, or more.")


# ---- the student's samples ---------------------------------------------------------------------------


def test_class_prior(tmp_path: Path) -> None:
    good = store(tmp_path / "s")
    assert rules(taught(good, rows=np.flatnonzero(LABELS < 5))) == ["class-prior"]
    assert rules(taught(good, rows=np.arange(200))) == []
    drawn = np.sort(np.random.default_rng(0).permutation(ROWS)[:40])  # by chance far from even
    p = np.bincount(LABELS[drawn], minlength=CLASSES) / 40
    assert np.abs(p - 0.1).sum() / 2 > 0.1
    assert rules(taught(good, rows=drawn)) == []


def test_samples_that_the_teacher_is_surer_of(tmp_path: Path) -> None:
    logits = teacher_logits(LABELS)
    half = np.arange(ROWS) // CLASSES % 2 == 0
    logits[:, half] *= 3
    uneven = write(tmp_path / "s", logits, LABELS)
    assert rules(taught(uneven, rows=np.flatnonzero(half))) == ["other-samples"]
    assert rules(taught(uneven, rows=np.arange(0, ROWS, 3))) == []


# ---- several teachers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(5.5, []), (7.0, ["scales"])])
def test_scales(tmp_path: Path, scale: float, expected: list[str]) -> None:
    both = store(tmp_path / "a", seed=1), store(tmp_path / "b", seed=2, scale=scale)
    assert rules(taught(*both)) == expected
    assert rules(taught(*both, combine="mean-zscores", standardize="unbiased")) == []
    assert rules(taught(*both, combine="mean-probs")) == []
    assert rules(taught(*both, weights=(scale / 3, 1.0))) == []


def test_weights_that_make_scales_uneven(tmp_path: Path) -> None:
    both = store(tmp_path / "a", seed=1), store(tmp_path / "b", seed=2)
    assert rules(taught(*both, weights=(5.0, 1.0))) == []  # asked for, and the scales are alike
    assert rules(taught(*both, weights=(1.0, 0.0))) == []


def test_teachers_that_say_the_same(tmp_path: Path) -> None:
    logits = teacher_logits(LABELS)
    again = logits + np.random.default_rng(5).normal(scale=0.1, size=logits.shape).astype(
        np.float32
    )
    first, second = write(tmp_path / "a", logits, LABELS), write(tmp_path / "b", again, LABELS)
    assert rules(taught(first, second)) == ["alike"]
    # Right on the same samples, but not of one mind about the others.
    other = store(tmp_path / "c", seed=0, right=1.0)
    mine = store(tmp_path / "d", seed=9, right=1.0)
    assert rules(taught(other, mine)) == []


def test_correlation_is_pearsons() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7))
    expected = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    assert correlation(a, b) == pytest.approx(expected)
    assert correlation(a, 3 * a + 1) == pytest.approx(1)


# ---- what is read ------------------------------------------------------------------------------------


def test_a_sample_is_what_the_store_holds(tmp_path: Path) -> None:
    logits = teacher_logits(LABELS, views=6)
    whole = write(tmp_path / "s", logits, LABELS, encoding="float32", shard_rows=100)
    rows = np.arange(150, 450, 2)
    sample = draw([whole, whole], range(1, 6), rows)
    assert set(sample.rows) <= set(rows)
    assert sample.views == (1, 2, 4, 5)
    for view, read in zip(sample.views, sample.logits[1], strict=True):
        np.testing.assert_array_equal(read, logits[view, sample.rows])
    assert not set(range(150, 450, 2)) & {
        int(np.flatnonzero((logits[1] == r).all(1))[0]) for r in sample.rest
    }
    assert len(sample.rest) == len(sample.rest_labels) > 0


def test_only_shards_of_the_students_samples_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store(tmp_path / "s", shard_rows=100, views=6)
    asked: list[str] = []
    load = whole.source.load

    def spy(key: str) -> object:
        asked.append(key)
        return load(key)

    monkeypatch.setattr(whole.source, "load", spy)
    case = taught(whole, rows=np.arange(100, 300), views=range(3), epochs=2)
    run_rules(case)
    shards = {tuple(key.split("/c/")[1].split("/")[:2]) for key in asked if "/c/" in key}
    assert shards == {(str(view), str(shard)) for view in (0, 1) for shard in (1, 2)}


def test_a_part_of_a_store(tmp_path: Path) -> None:
    store(tmp_path / "whole", shown=(LABELS + 1) % CLASSES)
    pull_store(str(tmp_path / "whole"), tmp_path / "part", (3, 6))
    from kdcache_stores import open_store

    with open_store(tmp_path / "part") as part:
        assert rules(taught(part)) == ["class-order"]
        assert taught(part).sample.views == (3, 4, 5)


def test_pairs_are_judged_by_their_weak_views(tmp_path: Path) -> None:
    logits = teacher_logits(LABELS)
    logits[1::2] = teacher_logits((LABELS + 1) % CLASSES)[1::2]
    pairs = write(tmp_path / "s", logits, LABELS, augmentation="weak+strong")
    case = taught(pairs, method="mlkd")
    assert case.sample.views == (0, 2, 4, 6)
    assert rules(case) == []

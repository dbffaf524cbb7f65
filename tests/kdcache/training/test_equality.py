"""Cached equals online: targets, first step, and the drift of whole trainings beside a control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import CachedViews, Training, dump, load_dataset, load_teacher
from kdcache.augment.specs import make_augmentation
from kdcache.bench.equality import OBJECTIVES, drift, first_step
from kdcache.bench.training_bench import bench_train
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.table import METHODS
from kdcache.runs import read_metrics
from kdcache.teachers.teacher import Teacher
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train
from kdcache.views.plan import ViewPlan
from tests.conftest import Trained

FLOAT32 = 1e-5  # of the largest logit: rounding of float32 sums in another order


@pytest.fixture(scope="module")
def stores(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Float32 stores of the digits' teacher: single views, and pairs of a weak and a strong one."""
    dataset = load_dataset("digits", "train")
    plan = ViewPlan(dataset, make_augmentation("weak+strong", dataset), seed=0)
    pairs = tmp_path_factory.mktemp("stores") / "pairs.zarr"
    dump(plan, [(digits_teacher(trained), pairs)], views=4, encoding="float32")
    return {False: trained.store, True: pairs}


def digits_teacher(trained: Trained) -> Teacher:
    return load_teacher(str(trained.teacher), classes=10, channels=1, size=8)


def test_every_method_is_covered() -> None:
    covered = {(config.method, bool(config.standardize)) for config in OBJECTIVES.values()}
    assert covered == {(name, False) for name in METHODS} | {
        (name, True) for name, method in METHODS.items() if method.standardized
    }


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_first_step_is_the_live_one(
    trained: Trained, stores: dict[bool, Path], name: str
) -> None:
    config = OBJECTIVES[name]
    pairs, read = config.record.pairs, config.record.needs_teacher
    with CachedViews(
        load_dataset("digits"), [stores[pairs]], 60, pairs=pairs, fields=("logits",) if read else ()
    ) as views:
        found = first_step(views, digits_teacher(trained), "resnet8", config)
    assert found["target"] <= FLOAT32 * found["target_scale"]
    assert found["loss"] <= 1e-5
    assert found["gradient"] <= 1e-4


def check_drift(found: dict[str, float]) -> None:
    """Not more than live against live, or than rounding where those are equal bit for bit."""
    assert found["cached"] <= max(2 * found["control"], 1e-5), found
    assert found["cached_loss"] <= max(2 * found["control_loss"], 1e-5), found


@pytest.mark.parametrize("name", [
    name if name in ("kd+std", "mlkd") else pytest.param(name, marks=pytest.mark.slow)
    for name in OBJECTIVES
])  # fmt: skip
def test_two_epochs_drift_no_more_than_live_against_live(
    trained: Trained, stores: dict[bool, Path], tmp_path: Path, name: str
) -> None:
    training = Training(
        dataset="digits",
        model="resnet8",
        objective=OBJECTIVES[name],
        optimization=Optimization(epochs=2, batch_size=32),
        stores=(str(stores[OBJECTIVES[name].record.pairs]),),
        train_samples=128,
    )
    check_drift(drift(training, str(trained.teacher), tmp_path))


def test_a_store_of_all_views_at_random_is_online_with_fresh_crops(
    trained: Trained, tmp_path: Path
) -> None:
    """The exhaustive plan with schedule random draws each sample's view uniformly from all there are."""
    dataset = load_dataset("digits", "train").subset(np.arange(40))
    plan = ViewPlan(dataset, make_augmentation("exhaustive", dataset), seed=0)
    assert plan.views is not None
    path = tmp_path / "all.zarr"
    dump(plan, [(digits_teacher(trained), path)], views=plan.views, encoding="float32")
    epochs = 200
    with CachedViews(dataset, [path], 40, schedule="random", seed=5) as views:
        batches = [next(views.epoch(epoch)) for epoch in range(epochs)]
    assert views.window == plan.views
    counts = np.zeros((40, plan.views), int)
    for batch in batches:
        counts[batch.rows, batch.views.numpy()] += 1
    # Chi-squared over the views, of all samples together: mean V - 1, variance 2 (V - 1).
    expected = 40 * epochs / plan.views
    chi2 = ((counts.sum(0) - expected) ** 2 / expected).sum()
    assert abs(chi2 - (plan.views - 1)) < 5 * np.sqrt(2 * (plan.views - 1))
    assert (counts > 0).sum(1).min() > 0.9 * min(plan.views, epochs) * (1 - np.exp(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd+std", "dkd", "mlkd+std", "ctkd"])
def test_real_images(real_data: Path, tmp_path: Path, name: str) -> None:
    """CIFAR-100 images and a teacher trained on some of them."""
    whole = f"arrays:{real_data / 'cifar100.npz'}"
    teacher = train(
        Training(dataset=whole, model="resnet8", train_samples=2000, objective=OBJECTIVES["ce"],
                 optimization=Optimization(epochs=1)), tmp_path / "teacher",
    )  # fmt: skip
    small = load_dataset(whole, "train").subset(np.arange(256))
    model = load_teacher(str(teacher.path), classes=100, channels=3, size=32)
    pairs = OBJECTIVES[name].record.pairs
    plan = ViewPlan(small, make_augmentation("weak+strong" if pairs else "pad-crop-flip", small), 0)
    dump(plan, [(model, tmp_path / "store.zarr")], views=2, encoding="float32")
    with CachedViews(small, [tmp_path / "store.zarr"], 60, pairs=pairs) as views:
        found = first_step(views, model, "resnet8", OBJECTIVES[name])
    assert found["target"] <= FLOAT32 * found["target_scale"]
    assert found["loss"] <= 1e-5
    assert found["gradient"] <= 1e-3


def test_self_distillation_in_three_commands(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    """Generation k's student is the teacher of the store of generation k + 1."""
    common = ("--dataset", "digits", "--device", "cpu", "-q")
    first, store, second = (tmp_path / name for name in ("born-1", "born-1.zarr", "born-2"))
    student = ("--student", "resnet8", "--method", "kd", "--train-samples", 400, "--epochs", 4,
               "--batch-size", 32)  # fmt: skip
    for command in (
        ("train-student", "--store", trained.store, *student, "--out", first),
        ("dump-teacher", "--teacher", first, "--views", 2, "--encoding", "float32", "--out", store),
        ("train-student", "--store", store, *student, "--out", second),
    ):
        done = kdcache(*command, *common)
        assert done.code == 0, done.err
    model = load_teacher(str(first), classes=10, channels=1, size=8)
    with CachedViews(load_dataset("digits"), [store], 64) as views:
        batch = next(views.epoch(0))
        torch.testing.assert_close(
            batch.teachers[0]["logits"], model.logits(batch.images), rtol=0, atol=1e-4
        )
        assert views.stores[0].teacher.digest == model.to_store().digest
    assert len(read_metrics(second)) == 4


def test_the_price_has_its_parts(trained: Trained) -> None:
    training = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="kd"),
        optimization=Optimization(epochs=10, batch_size=32), stores=(str(trained.store),),
        train_samples=64,
    )  # fmt: skip
    found = bench_train(training, str(trained.teacher), rounds=2)
    assert all(len(found[way]["seconds"]) == 2 for way in ("ce", "cached", "online"))
    assert found["macs"]["student"] == found["macs"]["teacher"] > 0
    assert found["online_over_ce_by_macs"] == pytest.approx(4 / 3)
    ratios = np.array(found["cached"]["seconds"]) / np.array(found["ce"]["seconds"])
    assert found["cached_over_ce"]["median"] == pytest.approx(np.median(ratios))
    assert 0 < found["cached"]["data_wait"] < 1

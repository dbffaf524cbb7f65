"""Cached equals online: targets, first step, and the drift of whole trainings beside a control."""

from __future__ import annotations

from dataclasses import replace
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
from kdcache.training.assembly import held_by, on_features, read_fields, shapes_of_model
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared, train
from kdcache.views.plan import ViewPlan
from kdcache_stores import open_store
from tests.conftest import Trained

FLOAT32 = 1e-5  # of the largest logit: rounding of float32 sums in another order


FIELDS = ("logits", "pooled", "last", "attention", "stages", "stages:pre")


@pytest.fixture(scope="module")
def stores(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 stores of the digits' teacher: logits, pairs of a weak and a strong view, and all fields."""
    dataset, folder = load_dataset("digits", "train"), tmp_path_factory.mktemp("stores")
    plan = ViewPlan(dataset, make_augmentation("weak+strong", dataset), seed=0)
    dump(plan, [(digits_teacher(trained), folder / "pairs")], views=4, encoding="float32")
    dump_fields(trained, folder / "fields")
    return {"logits": trained.store, "pairs": folder / "pairs", "fields": folder / "fields"}


def dump_fields(trained: Trained, path: Path, encoding: str = "float32", **changes: Any) -> None:
    """Two views of 128 samples, every field in an encoding."""
    dataset = load_dataset("digits", "train").subset(np.arange(128))
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    teacher = replace(digits_teacher(trained, FIELDS), **changes)
    encodings = dict.fromkeys(teacher.fields, encoding)
    if encoding.startswith("channels"):  # of fields that are no logits
        encodings["logits"] = "float16"
    dump(plan, [(teacher, path)], views=2, encoding=encodings)


def digits_teacher(trained: Trained, fields: tuple[str, ...] = ("logits",)) -> Teacher:
    return load_teacher(str(trained.teacher), classes=10, channels=1, size=8, fields=fields)


def kind(config: ObjectiveConfig) -> str:
    """Which of the stores a loss reads."""
    if config.record.pairs:
        return "pairs"
    return "fields" if on_features(config) else "logits"


def fields_of(config: ObjectiveConfig, store: Path) -> tuple[str, ...]:
    if not config.needs_teacher:
        return ()
    with open_store(store) as opened:
        shapes = shapes_of_model("resnet8", 10, (1, 8, 8), config)
        return read_fields(config, shapes, held_by([opened]))


def test_every_method_is_covered() -> None:
    covered = {(config.method, bool(config.standardize)) for config in OBJECTIVES.values()}
    assert covered == {(name, False) for name in METHODS if name not in ("ofd", "dml")} | {
        (name, True) for name, method in METHODS.items() if method.standardized
    }


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_first_step_is_the_live_one(
    trained: Trained, stores: dict[str, Path], name: str
) -> None:
    config = OBJECTIVES[name]
    store, pairs = stores[kind(config)], config.record.pairs
    fields = fields_of(config, store)
    teacher = digits_teacher(trained, fields or ("logits",))
    with CachedViews(
        load_dataset("digits"), [store], 60, pairs=pairs, fields=fields, subset=True
    ) as views:
        found = first_step(views, teacher, "resnet8", config)
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
    trained: Trained, stores: dict[str, Path], tmp_path: Path, name: str
) -> None:
    store = stores[kind(OBJECTIVES[name])]
    training = Training(
        dataset="digits",
        model="resnet8",
        objective=OBJECTIVES[name],
        optimization=Optimization(epochs=2, batch_size=32),
        stores=(str(store),),
        train_samples=None if store == stores["fields"] else 128,
        subset=True,
    )
    check_drift(drift(training, str(trained.teacher), tmp_path))


FEATURES = [name for name, config in OBJECTIVES.items() if on_features(config)]


@pytest.fixture(scope="module")
def singly(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of a teacher that forwards one image at a time, whatever the batch, by their encoding."""
    folder = tmp_path_factory.mktemp("singly")
    for encoding in ("float32", "float16", "channels:0.05"):
        dump_fields(trained, folder / encoding, encoding, batch_size=1)
    return {path.name: path for path in folder.iterdir()}


def live_and_cached(
    trained: Trained, stores: dict[str, Path], name: str, folder: Path
) -> dict[str, tuple[list[float], torch.Tensor]]:
    """Losses of each epoch and final weights: live, and from the store of each encoding."""
    results = {}
    for way, store in [("live", stores["float32"]), *stores.items()]:
        training = Training(
            dataset="digits",
            model="resnet8",
            objective=OBJECTIVES[name],
            optimization=Optimization(epochs=2, batch_size=32),
            stores=(str(store),),
            online=(str(trained.teacher),) if way == "live" else (),
            subset=True,
        )
        with prepared(training, folder / way) as loop:
            loop.teachers = [replace(teacher, batch_size=1) for teacher in loop.teachers]
            (run,) = loop.run()
            learner = loop.courses[0].learner
            parameters = [*learner.model.parameters(), *learner.objective.parameters()]
            weights = torch.cat([p.detach().flatten() for p in parameters])
        results[way] = [record["train_loss"] for record in run.metrics()], weights
    return results


@pytest.mark.parametrize("name", FEATURES)
def test_from_float32_fields_two_epochs_are_the_live_ones_bit_for_bit(
    trained: Trained, singly: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """With a teacher whose outputs do not depend on the batch, nothing is left that could differ."""
    exact = {"float32": singly["float32"]}
    ways = live_and_cached(trained, exact, name, tmp_path)
    assert ways["float32"][0] == ways["live"][0]
    assert torch.equal(ways["float32"][1], ways["live"][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_from_coded_fields_the_loss_is_near_the_live_one(
    trained: Trained, singly: dict[str, Path], tmp_path: Path, name: str
) -> None:
    ways = live_and_cached(trained, singly, name, tmp_path)
    live, _ = ways["live"]
    assert ways["float16"][0][0] == pytest.approx(live[0], rel=5e-3)
    # Trainings at these rates carry any rounding of the first epoch on into the second.
    assert ways["float16"][0] == pytest.approx(live, rel=5e-2)
    assert ways["channels:0.05"][0] == pytest.approx(live, rel=5e-2)


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

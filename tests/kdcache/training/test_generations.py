"""Born-again networks: one run a generation, a store between them, and their ensemble."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import Training, load_dataset
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import load_run_model, read_config, read_summary
from kdcache.training.generations import ENSEMBLE, born_again
from kdcache.training.optim import Optimization
from kdcache_stores import UsageError, open_store
from tests.conftest import Result, Trained


def training(trained: Trained) -> Training:
    return Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="ban"),
        optimization=Optimization(epochs=2, batch_size=32), stores=(str(trained.store),),
        views=2, train_samples=400, threads=1,
    )  # fmt: skip


def probabilities(run: Path) -> np.ndarray:
    model, test = load_run_model(run), load_dataset("digits", "test")
    images = torch.stack([torch.as_tensor(test.decode(row)) for row in range(len(test))])
    with torch.no_grad():
        return np.asarray(model.module(model.preprocessing(images)).double().softmax(1))


def test_each_generation_learns_from_the_one_before(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "ban"
    first, second = born_again(training(trained), out, 2)
    assert [g.run for g in (first, second)] == [out / "generation-1", out / "generation-2"]
    with open_store(out / "generation-1.zarr") as store, open_store(trained.store) as given:
        assert store.plan.digest == given.plan.digest
        assert store.view_range == range(2)
        assert store.fields["logits"].encoding == given.fields["logits"].encoding
        assert read_config(second.run)["stores"][0]["digest"] == store.digest
    assert [read_config(g.run)["training"]["seed"] for g in (first, second)] == [0, 1]
    labels = load_dataset("digits", "test").labels
    alone = [probabilities(g.run) for g in (first, second)]
    for g, p, total in zip((first, second), alone, np.cumsum(alone, 0), strict=True):
        assert g.top1 == pytest.approx((p.argmax(1) == labels).mean())
        assert g.top1 == pytest.approx(read_summary(g.run)["last_top1"])
        assert g.ensemble_top1 == pytest.approx((total.argmax(1) == labels).mean())
    assert json.loads((out / ENSEMBLE).read_text()) == [g.to_dict() for g in (first, second)]
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != ENSEMBLE}
    assert born_again(training(trained), out, 2) == [first, second]  # nothing is done again
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_generations_on_the_command_line(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    done: Result = kdcache(
        "train-student", "--store", trained.store, "--dataset", "digits", "--student", "resnet8",
        "--method", "ban", "--generations", 1, "--epochs", 1, "--train-samples", 200, "--device",
        "cpu", "--json", "-q", "--out", tmp_path / "ban",
    )  # fmt: skip
    assert done.code == 0, done.err
    (only,) = done.json
    assert only["run"] == "generation-1"
    assert only["top1"] == only["ensemble_top1"]


def test_what_has_no_generations_is_refused(trained: Trained, tmp_path: Path) -> None:
    base = training(trained)
    for changed, message in (
        (replace(base, stores=(), online=("resnet8",)), "learns from a store"),
        (
            replace(base, objective=ObjectiveConfig(method="rkd")),
            "a generation is dumped as logits",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            born_again(changed, tmp_path / "out", 2)
    with pytest.raises(UsageError, match="1 generation at least"):
        born_again(base, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()

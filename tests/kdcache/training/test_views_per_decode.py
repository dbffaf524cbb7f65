"""Several views of an image decoded once: what a pass shows, what it counts as, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import SGD

from kdcache import (
    CachedViews,
    Training,
    dump,
    load_dataset,
    load_teacher,
    make_augmentation,
    train,
)
from kdcache.runs import read_config, read_metrics, read_summary
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared
from kdcache.views.plan import ViewPlan
from kdcache_stores import MismatchError, UsageError, open_store
from tests.conftest import Result, Trained
from tests.kdcache.training.job import training


def kd(trained: Trained, **options: Any) -> dict[str, Any]:
    options.setdefault("optimization", {"epochs": 4, "batch_size": 16, "lr": 0.02})
    options.setdefault("stores", [str(trained.store)])
    return {"objective": {"method": "kd"}, "views_per_decode": 2} | options


def test_a_pass_shows_the_views_of_its_epochs_with_their_logits(trained: Trained) -> None:
    dataset = load_dataset("digits")
    with (
        open_store(trained.store) as store,
        CachedViews(dataset, store, 12, views=3, rows=np.arange(50), views_per_decode=2) as views,
    ):
        assert len(views) == 9
        for number, expected in enumerate([{0, 1}, {2, 0}, {1, 2}, {0, 1}]):
            pairs = []
            for images, labels, _, rows in (batches := list(views.epoch(number))):
                assert len(images) == len(labels) == len(rows)
                assert np.array_equal(rows[::2], rows[1::2]), "views of a sample lie side by side"
            for batch in batches:
                pairs += zip(batch.rows.tolist(), batch.views.tolist(), strict=True)
                for row, view, logits in zip(
                    batch.rows, batch.views, batch.teachers[0]["logits"], strict=True
                ):
                    assert np.array_equal(store.read(int(view), [row])[0], logits.numpy())
                assert torch.equal(batch.images, views.plan.images(batch.rows, batch.views.numpy()))
            assert sorted(pairs) == [(row, view) for row in range(50) for view in sorted(expected)]
        later = [batch.rows.tolist() for batch in views.epoch(1, 4)]
        assert later == [batch.rows.tolist() for batch in views.epoch(1)][4:]


def test_parts_are_those_of_the_ranks(trained: Trained) -> None:
    dataset, whole = load_dataset("digits"), []
    parts: list[list[Any]] = []
    for part in ((0, 1), (0, 2), (1, 2)):
        with CachedViews(
            dataset, trained.store, 10, rows=np.arange(31), views_per_decode=2, part=part
        ) as views:
            parts.append([
                (b.total, list(zip(b.rows.tolist(), b.views.tolist(), strict=True)))
                for b in views.epoch(3)
            ])  # fmt: skip
    whole, *halves = parts
    for (total, rows), (_, first), (_, second) in zip(whole, *halves, strict=True):
        assert rows == first + second
        assert (total, len(first)) == (len(rows), len(rows) // 2)


def test_passes_count_as_epochs(trained: Trained, tmp_path: Path) -> None:
    how = training(kd(trained, eval_every=3, optimization={"epochs": 8, "batch_size": 16}))
    run = train(how, tmp_path / "run")
    records = read_metrics(run.path)
    assert [record["epoch"] for record in records] == [2, 4, 6, 8]
    assert [record["epoch"] for record in records if "test_top1" in record] == [4, 6, 8]
    rates = [record["lr"] for record in records]  # a tenth after epochs 5, 6 and 7
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.0005])
    summary, config = read_summary(run.path), read_config(run.path)
    assert (summary["epochs"], summary["views_per_decode"]) == (8, 2)
    seconds = float(np.median([record["seconds"] for record in records]))
    assert summary["seconds_per_epoch"] == pytest.approx(seconds / 2)
    assert config["data"]["views_per_decode"] == 2


def test_the_rate_falls_where_the_epochs_end() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = Optimization(epochs=8, lr=1.0, warmup_epochs=1).make_scheduler(optimizer, 4 * 7)
    rates = []
    for _ in range(28):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # an epoch is 3.5 steps
    assert [sum(rate > limit for rate in rates[4:]) for limit in (0.5, 0.05, 0.005)] == [13, 17, 20]


class _StopAfter(Unwatched):
    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def step(self, epoch: int, done: int, total: int) -> None:
        if epoch == self.at and done == 2:
            raise KeyboardInterrupt


def test_a_run_cut_in_the_middle_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    how = training(kd(trained, optimization={"epochs": 6, "batch_size": 16, "lr": 0.02}))
    whole = train(how, tmp_path / "whole")
    for epoch in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            train(how, tmp_path / "cut", _StopAfter(epoch))
    assert [record["epoch"] for record in read_metrics(tmp_path / "cut")] == [2, 4]
    with pytest.raises(MismatchError, match=r"data\.views_per_decode was 2, now None"):
        train(replace(how, views_per_decode=1), tmp_path / "cut")
    cut = train(how, tmp_path / "cut")
    weights = [(run.path / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]
    assert [r["train_loss"] for r in read_metrics(whole.path)] == [
        r["train_loss"] for r in read_metrics(cut.path)
    ]


def test_from_float32_it_is_online_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    """With a teacher whose outputs do not depend on the batch, nothing is left that could differ."""
    dataset = load_dataset("digits", "train").subset(np.arange(60))
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), seed=0)
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    dump(plan, [(replace(teacher, batch_size=1), tmp_path / "store")], 4, encoding="float32")
    results = {}
    for way in ("cached", "online"):
        options = kd(trained, stores=[str(tmp_path / "store")], train_samples=None, subset=True)
        online = [str(trained.teacher)] if way == "online" else []
        with prepared(training(options | {"online": online}), tmp_path / way) as loop:
            loop.teachers = [replace(teacher, batch_size=1) for teacher in loop.teachers]
            (run,) = loop.run()
        losses = [record["train_loss"] for record in run.metrics()]
        summary = run.summary() or {}
        results[way] = losses, (run.path / "model.safetensors").read_bytes()
        assert summary["teacher_forwards"] == (60 * 4 if way == "online" else 0)
    assert results["cached"] == results["online"]


def test_the_iterator_goes_on_in_a_pass(trained: Trained) -> None:
    dataset = load_dataset("digits")

    def views(each: int) -> CachedViews:
        return CachedViews(dataset, trained.store, 12, rows=np.arange(50), views_per_decode=each)

    with views(2) as first, views(2) as second, views(1) as other:
        expected = [b.rows.tolist() for b in first.epoch(0)]
        batches = iter(first)
        for _ in range(4):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        assert [b.rows.tolist() for b in second] == expected[4:]
        with pytest.raises(MismatchError, match="views_per_decode 2, here it is None"):
            other.load_state_dict(state)
        with pytest.raises(MismatchError, match="views_per_decode None, here it is 2"):
            first.load_state_dict(other.state_dict())


@pytest.mark.parametrize(("options", "words"), [
    ({"optimization": {"epochs": 5, "batch_size": 16}}, "--epochs 5 is no multiple of it; use --epochs 6"),
    ({"optimization": {"epochs": 4, "batch_size": 15}}, "15 is no multiple of 2; use --batch-size 16"),
    ({"schedule": "random"}, "draws one view of each sample; use --schedule epoch"),
    ({"views": 1}, "1 views are trained on"),
    ({"objective": {"method": "ps-kd"}}, "ps-kd remembers one row of each sample"),
], ids=["epochs", "batch", "random", "views", "remembers"])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    trained: Trained, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        train(training(kd(trained, **options)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_are_refused(trained: Trained) -> None:
    with pytest.raises(UsageError, match="share one decoded image already"):
        CachedViews(load_dataset("digits"), trained.store, 8, pairs=True, views_per_decode=2)


def test_the_command_trains_with_it(
    trained: Trained, tmp_path: Path, kdcache: Callable[..., Result]
) -> None:
    done = kdcache(
        "train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd", "--store",
        trained.store, "--views-per-decode", 2, "--epochs", 2, "--train-samples", 64, "--device", "cpu",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (done.json["epochs"], done.json["views_per_decode"]) == (2, 2)


class _Processes(Unwatched):
    """The workers that are alive at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[set[int | None]] = []

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self.seen.append({process.pid for process in multiprocessing.active_children()})


def test_workers_live_as_long_as_the_training(tmp_path: Path) -> None:
    """One for the training images and one for the test images, not one an epoch."""
    for number in range(12):
        for split in ("train", "val"):
            file = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (20 * number, 0, 0)).save(file)
    how = Training(
        dataset=f"folder:{tmp_path / 'images'}",
        model="tests.kdcache.training.networks:plain",
        augment="resized-crop-flip:size=8",
        optimization=Optimization(epochs=6, batch_size=8),
        views_per_decode=2,
        workers=1,
    )
    watch, before = _Processes(), {p.pid for p in multiprocessing.active_children()}
    train(how, tmp_path / "run", watch)
    assert len(set.union(*watch.seen) - before) == 2
    assert [len(seen - before) for seen in watch.seen] == [2, 2, 2]
    assert {p.pid for p in multiprocessing.active_children()} <= before

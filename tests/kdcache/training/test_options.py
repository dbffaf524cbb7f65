"""Every option of a training, exercised: what it must change, and what it must not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcache import CachedViews, ViewPlan, dump, load_dataset, load_teacher, train
from kdcache.augment.specs import make_augmentation
from kdcache.data.choice import choose
from kdcache.runs import load_run_model, read_config, read_metrics, read_summary
from kdcache.training.observer import Unwatched
from kdcache.views import cached as cached_module
from kdcache.views.window import views_that_fit
from kdcache_stores import MismatchError, TrainingError, UsageError, open_store
from tests.conftest import Result, Trained
from tests.kdcache.training.job import training
from tests.kdcache.training.test_ranks import ROOT

FACTORY = "tests.kdcache.training.networks"


def kd(trained: Trained, **options: Any) -> dict[str, Any]:
    options.setdefault("optimization", {"epochs": 2, "batch_size": 16})
    return {"stores": [str(trained.store)], "objective": {"method": "kd"}} | options


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize("options", [
    {"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True, "model": "resnet8"},
    {"optimization": {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "lr": 1e-3,
                      "lr_schedule": "cosine", "warmup_epochs": 0.5}},
    {"optimization": {"epochs": 2, "batch_size": 16, "lr_schedule": "one-cycle", "nesterov": True}},
], ids=["bf16", "fp16", "channels-last", "adamw-cosine-warmup", "one-cycle-nesterov"])  # fmt: skip
def test_it_learns(trained: Trained, tmp_path: Path, options: dict[str, Any]) -> None:
    run = train(training(kd(trained, **options)), tmp_path / "run")
    first, last = (record["train_loss"] for record in read_metrics(run.path))
    assert last < first


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_losses(trained: Trained, tmp_path: Path) -> None:
    runs = [
        train(training(kd(trained, compile=flag)), tmp_path / str(flag)) for flag in (True, False)
    ]
    losses = [[r["train_loss"] for r in read_metrics(run.path)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert weights(runs[0].path).keys() == weights(runs[1].path).keys()


def test_clip_bounds_the_step(trained: Trained, tmp_path: Path) -> None:
    """One step of SGD without momentum and decay moves the weights by lr times the clipped norm."""
    step = {"epochs": 1, "batch_size": 50, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0,
            "lr_schedule": "constant"}  # fmt: skip
    still = train(training(kd(trained, optimization=step | {"lr": 0.0})), tmp_path / "still")
    moved = train(training(kd(trained, optimization=step | {"clip": 1e-2})), tmp_path / "clip")
    start, end = weights(still.path), weights(moved.path)
    norm = torch.sqrt(sum(((end[n] - start[n]).double() ** 2).sum() for n in start))
    assert norm.item() == pytest.approx(1e-2, rel=1e-3)


def test_ema_is_the_average_that_it_says(trained: Trained, tmp_path: Path) -> None:
    """One step with decay d: the saved weights are d of the first copy, which is the state itself."""
    two = {"epochs": 2, "batch_size": 50, "lr": 0.5, "momentum": 0.0, "lr_schedule": "constant"}
    one = two | {"epochs": 1}
    first = weights(train(training(kd(trained, optimization=one)), tmp_path / "1").path)
    last = weights(train(training(kd(trained, optimization=two)), tmp_path / "2").path)
    mean = weights(train(training(kd(trained, optimization=two, ema=0.75)), tmp_path / "e").path)
    for name in first:
        torch.testing.assert_close(mean[name], 0.75 * first[name] + 0.25 * last[name])


def test_dropout_repeats_after_a_resume(trained: Trained, tmp_path: Path) -> None:
    options = kd(trained, model=f"{FACTORY}:with_dropout")
    whole = train(training(options), tmp_path / "whole")

    class Stop(Unwatched):
        def step(self, epoch: int, done: int, total: int) -> None:
            if (epoch, done) == (2, 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(training(options), tmp_path / "cut", Stop())
    torch.manual_seed(99)
    cut = train(training(options), tmp_path / "cut")
    first, second = ((run.path / "model.safetensors").read_bytes() for run in (whole, cut))
    assert first == second


def test_killed_at_any_time_it_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    """SIGKILL in the first epoch, and in a later one while a checkpoint is being written."""
    options = kd(trained, optimization={"epochs": 30, "batch_size": 10})
    whole = train(training(options), tmp_path / "whole")
    cut = tmp_path / "cut"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "stores", "cli"))
    command = [
        sys.executable,
        "-m",
        "tests.kdcache.training.job",
        json.dumps([[str(cut), options | {"checkpoint_every": "1"}]]),
    ]
    kills = 0
    for wait_for in (lambda: (cut / "config.toml").exists(),
                     lambda: len(read_metrics(cut)) >= 12 and any(cut.glob(".*.tmp"))):  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
        while process.poll() is None and not wait_for():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1  # a quick machine may end before the second
    train(training(options), cut)
    assert (cut / "model.safetensors").read_bytes() == (
        whole.path / "model.safetensors"
    ).read_bytes()
    losses = [[r["train_loss"] for r in read_metrics(p)] for p in (cut, whole.path)]
    assert losses[0] == losses[1]
    assert not list(cut.glob(".*.tmp"))


def test_a_checkpoint_refuses_other_stores(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    options = kd(trained)
    train(training(options), tmp_path / "run")
    other = tmp_path / "other.zarr"
    done: Result = kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher,
                           "--views", 2, "--out", other, "--device", "cpu", "-q")  # fmt: skip
    assert done.code == 0, done.err
    with pytest.raises(MismatchError, match="another configuration"):
        train(training(options | {"stores": [str(other)]}), tmp_path / "run")
    moved = tmp_path / "moved.zarr"
    moved.symlink_to(trained.store)
    train(training(options | {"stores": [str(moved)]}), tmp_path / "run")  # the same, elsewhere


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(
    trained: Trained, tmp_path: Path
) -> None:
    options = kd(trained, optimization={"epochs": 3, "batch_size": 16, "lr": 1e30})
    with pytest.raises(TrainingError, match=r"epoch 1 .* first at step \d.*none yet"):
        train(training(options), tmp_path / "run")


def test_the_random_schedule_says_when_views_do_not_fit(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = []

    class Notes(Unwatched):
        def note(self, text: str) -> None:
            if not text.startswith("warning: "):  # two epochs are few, which is said too
                notes.append(text)

    options = kd(trained, schedule="random")
    run = train(training(options), tmp_path / "all", Notes())
    assert (notes, read_config(run.path)["data"]["resident_views"]) == ([], 4)
    monkeypatch.setattr(cached_module, "views_that_fit", lambda *args: 3)
    run = train(training(options), tmp_path / "few", Notes())
    assert notes[0].startswith("2 of 4 views are in memory at a time")
    assert read_config(run.path)["data"]["resident_views"] == 2
    assert read_summary(run.path)["resident_views"] == 2
    # More memory at the resume changes nothing: the window is the run's.
    (run.path / "summary.json").unlink()
    monkeypatch.undo()
    train(training(options), tmp_path / "few")


def test_ranks_agree_on_the_window(trained: Trained, tmp_path: Path) -> None:
    """Ranks on one machine share its memory; where a run began is what counts at its resume."""
    with open_store(trained.store) as store:
        alone = views_that_fit([{"logits": store}], 1000, torch.device("cpu"))
        assert (
            1 <= views_that_fit([{"logits": store}], 1000, torch.device("cpu"), sharers=4) <= alone
        )
        assert views_that_fit([{"logits": store}], 10**15, torch.device("cpu")) == 1


def test_held_out_samples_are_not_mixed_in(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    """A store whose mixes bring them in is refused before anything is written; its remedies work."""
    dataset = load_dataset("digits", "train")
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    kept, held = choose(dataset, 60, 0.2, 0)
    for name, rows in (("all", np.union1d(kept, held)), ("kept", kept)):
        plan = ViewPlan(dataset.subset(rows), make_augmentation("mixup", dataset), 0)
        dump(plan, [(teacher, tmp_path / name)], 2, encoding="float32")
    student = ("train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
               "--epochs", 1, "--batch-size", 20, "--device", "cpu", "--threads", 1, "-q")  # fmt: skip
    samples, split = ("--train-samples", 60), ("--val-split", 0.2)
    for command in (
        (*student, "--out", tmp_path / "no", "--store", tmp_path / "all"),
        (
            *student,
            "--out",
            tmp_path / "no",
            "--store",
            tmp_path / "all",
            "--online",
            trained.teacher,
        ),
        ("check", tmp_path / "all", "--dataset", "digits"),
    ):
        refused = kdcache(*command, *samples, *split)
        assert refused.code == 1, refused.err
        assert "of the 48 images that mixup mixes into view 0" in " ".join(refused.err.split())
        assert not (tmp_path / "no").exists()
    for name, flags in {
        "whole": ("--store", tmp_path / "all"),
        "chosen": (*split, "--store", tmp_path / "kept"),
        "online": (*split, "--online", trained.teacher, "--augment", "mixup"),
    }.items():
        done = kdcache(*student, "--out", tmp_path / f"run-{name}", *samples, *flags)
        assert done.code == 0, done.err


def test_mixed_images_bring_both_labels(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    """mixup from the store: the teacher saw the mixed image, and the student's CE takes both labels."""
    store = tmp_path / "mix.zarr"
    done: Result = kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher,
                           "--views", 2, "--augment", "mixup", "--encoding", "float32", "--out", store,
                           "--device", "cpu", "-q")  # fmt: skip
    assert done.code == 0, done.err
    teacher = load_run_model(trained.teacher)
    dataset = load_dataset("digits", "train")
    with CachedViews(dataset, [store], batch_size=64, seed=1) as views:
        batch = next(views.epoch(1))
    assert batch.mix is not None
    partner, share = batch.mix
    assert ((share >= 0) & (share <= 1)).all()
    assert (partner != batch.labels).any()
    with torch.inference_mode():
        live = teacher.module(teacher.preprocessing(batch.images))
    torch.testing.assert_close(batch.teachers[0]["logits"], live, rtol=0, atol=1e-4)
    for method in ("kd", "dkd"):
        options = kd(
            trained, stores=[str(store)], objective={"method": method}, train_samples=None,
            optimization={"epochs": 1, "batch_size": 64},
        )  # fmt: skip
        run = train(training(options), tmp_path / method)
        assert np.isfinite(read_metrics(run.path)[-1]["train_loss"])


def test_tensorboard_holds_what_metrics_hold(trained: Trained, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(training(kd(trained)), tmp_path / "run", tensorboard=True)
    read = events.EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    written = [(event.step, event.value) for event in read.Scalars("test/top1")]
    expected = [(r["epoch"], pytest.approx(r["test_top1"])) for r in read_metrics(run.path)]
    assert written == expected


def test_tensorboard_absent_is_said(trained: Trained, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=r"kdcache\[tensorboard\]"):
        train(training(kd(trained)), tmp_path / "run", tensorboard=True)


def test_a_strangers_run_starts_nobodys_code(trained: Trained, tmp_path: Path) -> None:
    run = train(training(kd(trained)), tmp_path / "run")
    config = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(config.replace(":plain", ":explosive"))
    with pytest.raises(UsageError, match="--allow-code"):
        load_run_model(run.path)
    with pytest.raises(
        UsageError, match="raised AssertionError: imported and called without leave"
    ):
        load_run_model(run.path, allow_code=True)

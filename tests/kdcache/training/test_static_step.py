"""The static step computes what the eager one defines, step by step; where it cannot, that is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Training, load_dataset, load_teacher, train
from kdcache.augment.specs import make_augmentation
from kdcache.dumping.dump import dump
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.noise import Noise
from kdcache.runs import read_metrics, read_summary
from kdcache.training.learning.learner import Losses
from kdcache.training.learning.static_step import Function, StaticStep
from kdcache.training.observer import Unwatched
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared, prepared_together
from kdcache.views.plan import ViewPlan
from tests.conftest import Trained

PLAIN = "tests.kdcache.training.networks:plain"
OBJECTIVES = {
    "ce": ObjectiveConfig(method="ce"),
    "kd": ObjectiveConfig(method="kd"),
    "kd+std+noise": ObjectiveConfig(
        method="kd", standardize="unbiased", noise=Noise.parse("gaussian:0.1,linear,copies=2")
    ),
    "dkd": ObjectiveConfig(method="dkd"),
    "ctkd": ObjectiveConfig(method="ctkd"),
    "dist": ObjectiveConfig(method="dist"),
    "permuted": ObjectiveConfig(method="kd", ablation="non-target-permuted"),
}


def training(trained: Trained, **changes: Any) -> Training:
    base = Training(
        dataset="digits",
        model="resnet8",
        objective=OBJECTIVES["kd"],
        optimization=Optimization(epochs=3, batch_size=16),
        stores=(str(trained.store),),
        train_samples=72,  # four batches and a smaller one
    )
    return replace(base, **changes)


def as_it_is(function: Function) -> Function:
    return function


def steps(
    how: Training, out: Path, compile: Callable[[Function], Function] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """The records of all epochs, and the weights after each step."""
    weights = []

    class Weights(Unwatched):
        def step(self, epoch: int, done: int, total: int) -> None:
            state = loop.courses[0].learner.model.state_dict()
            weights.append({name: value.clone() for name, value in state.items()})

    with prepared(how, out, Weights()) as loop:
        learner = loop.courses[0].learner
        if compile is not None:
            learner.static = StaticStep(learner, pytest.fail, compile)
        loop.run()
    records = read_metrics(out)
    times = {"seconds", "data_wait_seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in times} for r in records], weights


def equal(how: Training, folder: Path) -> None:
    eager, static = (
        steps(how, folder / name, compile) for name, compile in (("e", None), ("s", as_it_is))
    )
    assert len(eager[1]) == len(static[1]) == 15
    for number, (one, other) in enumerate(zip(eager[1], static[1], strict=True)):
        for name in one:
            assert torch.equal(one[name], other[name]), (number, name)
    assert eager[0] == static[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_static_step_is_the_eager_one(trained: Trained, tmp_path: Path, name: str) -> None:
    equal(training(trained, objective=OBJECTIVES[name]), tmp_path)


@pytest.mark.parametrize("changes", [
    {"precision": "bf16", "model": PLAIN}, {"channels_last": True}, {"ema": 0.9},
    {"optimization": Optimization(epochs=3, batch_size=16, lr_schedule="cosine", warmup_epochs=0.5,
                                  nesterov=True, clip=0.5)},
    {"optimization": Optimization(epochs=3, batch_size=16, optimizer="adamw", lr=1e-3)},
    {"optimization": Optimization(epochs=3, batch_size=16, lr_schedule="one-cycle")},
], ids=["bf16", "channels-last", "ema", "cosine-clip", "adamw", "one-cycle"])  # fmt: skip
def test_with_options_too(trained: Trained, tmp_path: Path, changes: dict[str, Any]) -> None:
    equal(training(trained, **changes), tmp_path)


def test_with_mixed_images_and_pairs_too(trained: Trained, tmp_path: Path) -> None:
    dataset = load_dataset("digits", "train")
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    for spec, method in (("mixup", "dkd"), ("weak+strong", "mlkd")):
        store = tmp_path / f"{method}.zarr"
        plan = ViewPlan(dataset.subset(list(range(72))), make_augmentation(spec, dataset), 0)
        dump(plan, [(teacher, store)], 2, encoding="float32")
        how = training(trained, stores=(str(store),), train_samples=None, subset=True)
        equal(replace(how, objective=ObjectiveConfig(method=method)), tmp_path / method)


@pytest.mark.slow
def test_with_features_too(trained: Trained, tmp_path: Path) -> None:
    fields = ("pooled", "last", "attention", "stages", "stages:pre")
    dataset = load_dataset("digits", "train").subset(list(range(72)))
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8, fields=fields)
    plan = ViewPlan(dataset, make_augmentation("pad-crop-flip", dataset), 0)
    dump(plan, [(teacher, tmp_path / "fields")], 2)
    stores = (str(tmp_path / "fields"),)
    how = training(trained, stores=stores, train_samples=None, subset=True)
    for method in ("rkd", "at", "simkd", "cat-kd", "fitnet", "reviewkd"):
        equal(replace(how, objective=ObjectiveConfig(method=method)), tmp_path / method)


def test_a_static_run_resumes_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    """Also where an eager run began it: both write the same checkpoints."""
    how = training(trained, objective=OBJECTIVES["kd+std+noise"])
    whole, _ = steps(how, tmp_path / "whole", as_it_is)

    class Stop(Unwatched):
        def step(self, epoch: int, done: int, total: int) -> None:
            if (epoch, done) == (2, 3):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(how, tmp_path / "cut", Stop())
    cut, _ = steps(how, tmp_path / "cut", as_it_is)
    assert whole == cut
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


class Notes(Unwatched):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if text.startswith("--graph"):
            self.notes.append(text)


@pytest.mark.parametrize(("changes", "why"), [
    ({"precision": "fp16", "model": PLAIN}, "fp16"),
    ({"objective": ObjectiveConfig(method="kd", combine="random")}, "drawn at each step"),
    ({"model": "tests.kdcache.training.networks:with_dropout"}, "its layers draw"),
    ({"objective": ObjectiveConfig(method="ps-kd")}, "remembers something of each sample"),
])  # fmt: skip
def test_what_cannot_be_static_is_said_once(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    usual = train(training(trained, **changes), tmp_path / "usual")
    notes = Notes()
    run = train(training(trained, graph=True, **changes), tmp_path / "run", notes)
    assert len(notes.notes) == 1
    assert why in notes.notes[0]
    summary = read_summary(run.path)
    assert summary["graph"] is False
    assert why in summary["graph_not_used"]
    weights = [(r.path / "model.safetensors").read_bytes() for r in (usual, run)]
    assert weights[0] == weights[1]


def test_what_cannot_be_compiled_is_trained_as_if_nothing_had_been_tried(
    trained: Trained, tmp_path: Path
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def fails(function: Function) -> Function:
        def half_way(*inputs: Any) -> Losses:
            function(*inputs)  # what it has changed before it fails is undone
            raise BackendCompilerFailed(fails, RuntimeError("no compiler here"), None)

        return half_way

    how = training(trained, objective=OBJECTIVES["ctkd"], ema=0.9)
    usual, _ = steps(how, tmp_path / "usual", None)
    notes = Notes()
    with prepared(how, tmp_path / "run", notes) as loop:
        learner = loop.courses[0].learner
        learner.static = StaticStep(learner, notes.note, fails)
        loop.run()
    assert ["no compiler here" in note for note in notes.notes] == [True]
    for one, other in zip(usual, read_metrics(tmp_path / "run"), strict=True):
        assert one == {name: other[name] for name in one}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd+std+noise", "ce", "dkd", "ctkd"])
def test_it_is_traced_once(trained: Trained, tmp_path: Path, name: str) -> None:
    """Epochs, learning rates and noise come and go; what was compiled stays, in few parts."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()

    def compile(function: Function) -> Function:
        compiled: Function = torch.compile(function, backend=counter, dynamic=False)
        return compiled

    how = training(trained, objective=OBJECTIVES[name])
    eager, traced = (steps(how, tmp_path / str(i), c) for i, c in enumerate((None, compile)))
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(eager[0], traced[0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_many_students_are_compiled_each(trained: Trained, tmp_path: Path) -> None:
    """A compiler that has seen eight variants of one function compiles no more of it."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def compile(function: Function) -> Function:
        compiled: Function = torch.compile(function, backend=counter, dynamic=False)
        return compiled

    how = [training(trained, model=PLAIN, seed=seed, data_seed=0) for seed in range(10)]
    with prepared_together(how, [tmp_path / str(t.seed) for t in how]) as loop:
        for course in loop.courses:
            course.learner.static = StaticStep(course.learner, pytest.fail, compile)
        loop.train_epoch(0)
    assert counter.frame_count == 10


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(trained: Trained, tmp_path: Path) -> None:
    how = training(trained, objective=OBJECTIVES["kd"])
    eager = train(how, tmp_path / "eager")
    run = train(replace(how, graph=True), tmp_path / "graph")
    assert read_summary(run.path)["graph"] is True
    losses = [[r["train_loss"] for r in read_metrics(r.path)] for r in (eager, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

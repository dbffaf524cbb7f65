"""The captured step on a GPU: the losses of the eager one up to rounding, and no wait for the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.noise import Noise
from kdcache.runs import read_config, read_metrics, read_summary
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared, train_together
from kdcache.training.tuning import tuned
from tests.conftest import Trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
NOISE = Noise.parse("gaussian:0.1,linear")
OBJECTIVES = {
    "ce": ObjectiveConfig(method="ce"),
    "kd+std+noise": ObjectiveConfig(method="kd", standardize="unbiased", noise=NOISE),
    "dkd": ObjectiveConfig(method="dkd"),
    "ctkd": ObjectiveConfig(method="ctkd"),
}


def training(trained: Trained, name: str = "ce", **changes: object) -> Training:
    base = Training(
        dataset="digits",
        model="resnet8",
        objective=OBJECTIVES[name],
        optimization=Optimization(epochs=3, batch_size=64, lr=0.01),
        stores=(str(trained.store),),
        device="cuda",
        graph=True,
    )
    return replace(base, **changes)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "channels_last": True}])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_captured_step_is_the_eager_one(
    trained: Trained, tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    how = training(trained, name, **changes)
    eager = train(replace(how, graph=False), tmp_path / "eager")
    captured = train(how, tmp_path / "captured")
    assert read_summary(captured.path)["graph"] is True
    losses = [[r["train_loss"] for r in read_metrics(run.path)] for run in (eager, captured)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_the_first_steps_are_the_same(trained: Trained, tmp_path: Path) -> None:
    """Before rounding has grown: the losses of the first steps, and the momentum that they leave."""
    first = {}
    for graph in (False, True):
        how = training(trained, "kd+std+noise", graph=graph, tf32=False)
        with prepared(how, tmp_path / str(graph)) as loop:
            learner = loop.courses[0].learner
            learner.begin_epoch(0)
            for index, batch in zip(range(6), loop.views.epoch(0), strict=False):
                learner.learn(batch, 0, index)
            momentum = [s["momentum_buffer"].norm() for s in learner.optimizer.state.values()]
            first[graph] = learner.losses.losses[:6].clone(), torch.stack(momentum)
            assert (learner.static is not None) is graph
    torch.testing.assert_close(first[True][0], first[False][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first[True][1], first[False][1], rtol=2e-2, atol=1e-3)


def test_a_captured_step_does_not_wait_for_the_device(trained: Trained, tmp_path: Path) -> None:
    with prepared(training(trained, "kd+std+noise"), tmp_path / "run") as loop:
        loop.train_epoch(0)
        learner = loop.courses[0].learner
        learner.begin_epoch(1)
        batches = [batch for batch, _ in zip(loop.views.epoch(1), range(4), strict=False)]
        learner.learn(batches[0], 1, 0)
        learner.learn(batches[1], 1, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index, batch in enumerate(batches[2:], start=2):
                learner.learn(batch, 1, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_students_side_by_side_learn(trained: Trained, tmp_path: Path) -> None:
    how = [training(trained, name, seed=seed, data_seed=0) for seed, name in enumerate(OBJECTIVES)]
    for run in train_together(how, [tmp_path / name for name in OBJECTIVES]):
        first, *_, last = (record["train_loss"] for record in read_metrics(run.path))
        assert last < first
        assert read_summary(run.path)["graph"] is True


def test_the_run_says_what_computed_it(trained: Trained, tmp_path: Path) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    how = training(trained, graph=False, tf32=False)
    said = read_config(train(how, tmp_path / "run").path)["computing"]
    assert (said["tf32_convolutions"], said["cudnn_benchmark"]) == (False, True)
    assert said["gpu"] == torch.cuda.get_device_name()
    with tuned(how):
        assert (cudnn.benchmark, cudnn.allow_tf32) == (True, False)
    assert (cudnn.benchmark, cudnn.allow_tf32) == before

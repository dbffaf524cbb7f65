"""FitNet, OFD and ReviewKD against their published forms, and trained with a teacher in the loop."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache import Training, load_dataset, load_teacher, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.fitnet import Regressor, fitnet
from kdcache.methods.features.ofd import OFD, margins, ofd
from kdcache.methods.features.reviewkd import Fusion, ReviewKD, reviewkd
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train_together
from kdcache_stores.errors import DataError, UsageError
from tests.conftest import Trained


def array(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


# -- FitNet ------------------------------------------------------------------------------------------
def test_fitnet_is_its_formula() -> None:
    s, t = array(0, 3, 4, 5, 5), array(1, 3, 4, 5, 5)
    np.testing.assert_allclose(fitnet(s, t), ((s - t).numpy() ** 2).reshape(3, -1).mean(1))
    with pytest.raises(DataError, match="maps of one shape"):
        fitnet(s, t[:, :2])
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fitnet(s, t), (s,))


@pytest.mark.parametrize(
    ("own", "its", "kind"),
    [(8, 8, (nn.Conv2d, (1, 1))), (16, 8, (nn.Conv2d, (3, 3))), (8, 16, (nn.ConvTranspose2d, (4, 4))),
     (8, 7, (nn.Conv2d, (2, 2)))],
)  # fmt: skip
def test_the_regressor_is_the_published_one(own: int, its: int, kind: tuple[Any, Any]) -> None:
    regressor = Regressor((3, own, own), (5, its, its))
    assert (type(regressor.conv), regressor.conv.kernel_size) == kind  # type: ignore[comparison-overlap]
    out = regressor(torch.randn(2, 3, own, own))
    assert out.shape == (2, 5, its, its)
    assert out.min() == 0
    with pytest.raises(UsageError, match="no regressor from a map 4 high to one 16 high"):
        Regressor((3, 4, 4), (5, 16, 16))


def test_fitnet_in_an_objective() -> None:
    torch.manual_seed(0)
    shapes = {"logits": (4,), "stage_1": (2, 8, 8), "stage_2": (3, 4, 4)}
    objective = Objective(ObjectiveConfig(method="fitnet"), Nets(shapes, {"stage_2": (5, 4, 4)}))
    student = {name: array(i, 3, *shape).float() for i, (name, shape) in enumerate(shapes.items())}
    target = array(9, 3, 5, 4, 4).float()
    loss, parts = objective(student, [{"stage_2": target}], torch.arange(3))
    regressor = objective.loss.regressor  # type: ignore[union-attr]
    hidden = F.relu(F.batch_norm(
        F.conv2d(student["stage_2"], regressor.conv.weight, regressor.conv.bias), None, None,  # type: ignore[union-attr, arg-type]
        regressor.norm.weight, regressor.norm.bias, True,  # type: ignore[union-attr, arg-type]
    ))  # fmt: skip
    torch.testing.assert_close(parts["kd"], F.mse_loss(hidden, target))
    torch.testing.assert_close(loss, parts["ce"] + 100 * parts["kd"])


# -- OFD ---------------------------------------------------------------------------------------------
def test_margins_of_known_batch_norms() -> None:
    assert margins(torch.ones(1), torch.zeros(1)).item() == pytest.approx(-0.79788456, rel=1e-6)
    rng, normal = np.random.default_rng(0), NormalDist()
    s, m = rng.normal(size=50), 2 * rng.normal(size=50)
    expected = []
    for a, b in zip(np.abs(s), m, strict=True):
        if normal.cdf(-b / a) > 0.001:
            peak = math.exp(-((b / a) ** 2) / 2) / math.sqrt(2 * math.pi)
            expected.append(b - a * peak / normal.cdf(-b / a))
        else:
            expected.append(-3 * a)
    np.testing.assert_allclose(margins(torch.tensor(s), torch.tensor(m)), expected, rtol=1e-9)
    assert -3.0 in margins(torch.ones(2), torch.tensor([0.0, 5.0])).tolist()
    # It is the mean of what is negative.
    draws = rng.normal(0.5, 1.3, 400_000)
    exact = margins(torch.tensor([1.3]), torch.tensor([0.5])).item()
    assert draws[draws < 0].mean() == pytest.approx(exact, abs=0.01)


def published(s: np.ndarray, t: np.ndarray, margin: np.ndarray) -> float:
    """The three cases of the published code."""
    m = margin[None, :, None, None]
    loss = (
        (s - m) ** 2 * ((s > m) & (t <= m))
        + (s - t) ** 2 * ((s > t) & (t > m) & (t <= 0))
        + (s - t) ** 2 * (t > 0)
    )
    return float(np.abs(loss).mean(0).sum())


def test_ofd_is_its_formula() -> None:
    s, t, margin = array(0, 4, 3, 5, 5), array(1, 4, 3, 5, 5), -array(2, 3).abs()
    expected = published(s.numpy(), t.numpy(), margin.numpy())
    assert ofd(s, t, margin).mean().item() == pytest.approx(expected)
    small = s[:1, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ofd(s, t[:1, :, :2, :2], margin), (small,))


def test_ofd_weighs_the_last_stages_of_both_networks() -> None:
    torch.manual_seed(0)
    own = {"logits": (4,), "stage_1_pre": (2, 4, 4), "stage_2_pre": (3, 2, 2)}
    its = {"stage_1_pre": (4, 8, 8), "stage_2_pre": (5, 4, 4), "stage_3_pre": (6, 4, 4)}
    norms = {name: (array(7, shape[0]), array(8, shape[0])) for name, shape in its.items()}
    config = ObjectiveConfig(method="ofd").resolved()
    read = OFD.reads(config, own, its)
    assert read == ("stage_2_pre", "stage_3_pre")
    objective = Objective(config, Nets(own, {n: its[n] for n in read}, norms=norms))
    student = {name: array(i, 3, *shape).float() for i, (name, shape) in enumerate(own.items())}
    teacher = {name: array(i + 5, 3, *its[name]).float() for i, name in enumerate(read)}
    _, parts = objective(student, [teacher], torch.arange(3))
    expected = 0.0
    for i, (a, b) in enumerate((("stage_1_pre", "stage_2_pre"), ("stage_2_pre", "stage_3_pre"))):
        conv, norm = objective.loss.connectors[i]  # type: ignore[union-attr, index, misc]
        mapped = F.batch_norm(
            F.conv2d(student[a], conv.weight), None, None, norm.weight, norm.bias, True
        )
        target = F.adaptive_avg_pool2d(teacher[b], mapped.shape[2:])
        margin = margins(*norms[b]).numpy()
        expected += published(mapped.detach().numpy(), target.numpy(), margin) / 2 ** (1 - i)
    assert parts["kd"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UsageError, match="which a store does not keep: run it in the loop"):
        Objective(config, Nets(own, {n: its[n] for n in read}))


# -- ReviewKD ----------------------------------------------------------------------------------------
def hcl(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The published loss, by torch's own means over the batch."""
    total = torch.zeros(()).double()
    for s, t in zip(students, teachers, strict=True):
        loss, weights = F.mse_loss(s, t), 1.0
        for k, side in enumerate(side for side in (4, 2, 1) if side < s.shape[2]):
            weight = 0.5 ** (k + 1)
            pooled = [F.adaptive_avg_pool2d(m, side) for m in (s, t)]
            loss, weights = loss + weight * F.mse_loss(*pooled), weights + weight
        total = total + loss / weights
    return total


def test_reviewkd_is_its_formula() -> None:
    shapes = [(2, 8, 8), (3, 4, 4), (4, 2, 2), (5, 1, 1)]
    s, t = ([array(i + k, 3, *shape) for i, shape in enumerate(shapes)] for k in (0, 10))
    torch.testing.assert_close(reviewkd(s, t).mean(), hcl(s, t))
    small = [m[:1].clone().requires_grad_() for m in s[2:]]
    aims = [m[:1] for m in t[2:]]
    assert torch.autograd.gradcheck(lambda *m: reviewkd(m, aims), small)


def test_the_student_before_its_relu() -> None:
    own = {"logits": (4,), "stage_1_pre": (2, 8, 8), "stage_2_pre": (600, 4, 4), "pooled": (600,)}
    its = {"stage_1_pre": (5, 8, 8), "stage_2_pre": (7, 4, 4), "pooled": (9,)}
    config = ObjectiveConfig(method="reviewkd", options={"relu": "before", "middle": 256})
    assert config.student_fields == ("stages:pre", "pooled")
    assert ReviewKD.reads(config.resolved(), own, its) == tuple(its)
    loss = Objective(config, Nets(own, its)).loss
    assert isinstance(loss, ReviewKD)
    assert [fusion.narrow[0].out_channels for fusion in loss.fusions] == [256] * 3  # type: ignore[union-attr, index]


def test_a_fusion_is_the_published_one() -> None:
    torch.manual_seed(0)
    fusion = Fusion(3, 4, 5, fuse=True).eval().double()
    x, deeper = array(0, 2, 3, 4, 4), array(1, 2, 4, 2, 2)
    out, following = fusion(x, deeper, 8)
    own = fusion.narrow(x)
    up = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert fusion.gate is not None
    z = torch.sigmoid(fusion.gate(torch.cat([own, up], 1)))
    fused = own * z[:, 0:1] + up * z[:, 1:2]
    fused = fused.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(following, fused)
    torch.testing.assert_close(out, fusion.widen(fused))


def test_reviewkd_goes_from_the_deepest_level_up_with_a_warm_up() -> None:
    torch.manual_seed(0)
    own = {"logits": (4,), "stage_1": (2, 8, 8), "stage_2": (3, 4, 4), "pooled": (6,)}
    its = {"stage_1_pre": (5, 8, 8), "stage_2_pre": (7, 8, 8), "pooled": (9,)}
    config = ObjectiveConfig(method="reviewkd").resolved()
    assert set(ReviewKD.reads(config, own, its)) == set(its)
    objective = Objective(config, Nets(own, its))
    student = {name: array(i, 3, *shape).float() for i, (name, shape) in enumerate(own.items())}
    teacher = {name: array(i + 5, 3, *shape).float() for i, (name, shape) in enumerate(its.items())}
    _, parts = objective(student, [teacher], torch.arange(3), Step(epoch=4))
    loss = objective.loss
    assert isinstance(loss, ReviewKD)
    pooled, deep = loss.fusions[2](student["pooled"][:, :, None, None], None, 1)
    second, deep = loss.fusions[1](student["stage_2"], deep, 8)
    first, _ = loss.fusions[0](student["stage_1"], deep, 8)
    targets = [teacher["stage_1_pre"], teacher["stage_2_pre"], teacher["pooled"][:, :, None, None]]
    expected = 5 / 20 * hcl([first, second, pooled], targets).item()
    assert parts["kd"].item() == pytest.approx(expected, rel=1e-5)
    assert parts["kd_weighted"].item() == pytest.approx(5 * expected, rel=1e-5)
    with pytest.raises(UsageError, match="the student has 1, the teacher 2"):
        ReviewKD.reads(config, {"logits": (4,), "stage_1": (2, 8, 8), "pooled": (6,)}, its)


# -- in the loop -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "options"), [
    ("fitnet", {}), ("ofd", {}), ("ofd", {"statistics": "batch"}), ("reviewkd", {}),
    ("reviewkd", {"relu": "before", "middle": 8}),
])  # fmt: skip
def test_a_teacher_in_the_loop_whose_store_proves_it(
    trained: Trained, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    training = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method=method, options=options),
        stores=(str(trained.store),), online=(str(trained.teacher),), train_samples=100,
        optimization=Optimization(epochs=2, batch_size=50, lr=0.01),
    )  # fmt: skip
    run = train(training, tmp_path / "run")
    first, second = (record["train_kd"] for record in run.metrics())
    if method != "reviewkd":  # whose term grows with its warm-up
        assert second < first
    summary = run.summary()
    assert summary is not None
    assert summary["teacher_forwards"] == 200


def test_the_statistics_of_a_batch_leave_no_trace(trained: Trained) -> None:
    """As published: the teacher's batch norms as in training mode; what it was trained to stays."""
    running = load_teacher(
        str(trained.teacher), classes=10, channels=1, size=8, fields=("logits", "stage_1_pre")
    )
    batch = replace(running, by_batch=True)
    images = torch.as_tensor(load_dataset("digits", "test").images[:16])
    before = copy.deepcopy(running.module.state_dict())
    own, by_batch = running(images), batch(images)
    training = copy.deepcopy(running.module).train()
    torch.testing.assert_close(by_batch["logits"], training(running.preprocessing(images)))
    assert (own["stage_1_pre"] - by_batch["stage_1_pre"]).abs().max() > 0.01
    assert not any(module.training for module in running.module.modules())
    for name, values in running.module.state_dict().items():
        assert torch.equal(values, before[name])
    assert torch.equal(running(images)["logits"], own["logits"])
    assert batch.to_store().digest == running.to_store().digest


def test_students_side_by_side_have_one_kind_of_teacher(trained: Trained, tmp_path: Path) -> None:
    base = Training(dataset="digits", model="resnet8", online=(str(trained.teacher),), data_seed=0)
    how = [
        replace(base, objective=ObjectiveConfig(method="ofd", options={"statistics": kind}))
        for kind in ("running", "batch")
    ]
    with pytest.raises(
        UsageError, match="batch norm of the teacher by each batch is False in training 1"
    ):
        train_together(how, [tmp_path / "a", tmp_path / "b"])


def test_without_the_teacher_the_weight_of_what_is_missing_is_named(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    def err(method: str) -> str:
        done = kdcache("train-student", "--store", trained.store, "--dataset", "digits", "--student",
                       "resnet8", "--method", method, "--out", tmp_path / "run")  # fmt: skip
        assert done.code == 2
        return " ".join(done.err.split())

    assert (
        "fitnet reads stage:2 of the teacher, and its stores hold logits. As float16 that is 1,024"
        in (err("fitnet"))
    )
    assert "--online TEACHER" in err("reviewkd")
    assert "ofd needs more of its teacher than a store holds: give --online TEACHER" in err("ofd")

"""SimKD: its loss, its projector, and a student that is whole wherever it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.deploying.deploy import export
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.simkd import SimKD, simkd, with_projector
from kdcache.methods.features.target_fields import choose_last
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.models.projected import Projected
from kdcache.models.taps import tapped
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.runs import RunModel, load_run_model, read_summary
from kdcache.teachers.load import load_teacher
from kdcache_stores import open_store
from kdcache_stores.errors import DataError, UsageError
from tests.conftest import Result, Trained


def maps(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((3, *shape)))


def test_simkd_is_its_formula() -> None:
    s, t = maps(0, 5, 4, 4), maps(1, 5, 4, 4)
    expected = ((s.numpy() - t.numpy()) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(simkd(s, t), expected)
    assert torch.autograd.gradcheck(lambda s: simkd(s, t), (s.requires_grad_(),))
    with pytest.raises(DataError, match="maps of one shape"):
        simkd(s, maps(1, 5, 2, 2))


def nets(student: tuple[int, ...], **held: tuple[int, ...]) -> Nets:
    head = maps(2, 6)[:, :6].float(), maps(3, 1)[:, 0].float()
    return Nets({"logits": (3,), "last": student}, held, head)


def projected(name: str = "resnet8", **held: tuple[int, ...]) -> tuple[nn.Module, Nets]:
    torch.manual_seed(0)
    network = build_model(name, 3, 3, 16)
    with torch.no_grad():
        last = tapped(network.eval(), ("last",))(torch.zeros(1, 3, 16, 16))["last"]
    known = nets(tuple(last.shape[1:]), **held)
    return with_projector(network, known, {"factor": 2}), known


class PublishedProjector(nn.Module):
    """The projector as its authors wrote it, and their forward, from the student's last map."""

    def __init__(self, s: int, t: int) -> None:
        super().__init__()
        self.transfer = nn.Sequential(
            nn.Conv2d(s, t // 2, 1, bias=False), nn.BatchNorm2d(t // 2), nn.ReLU(),
            nn.Conv2d(t // 2, t // 2, 3, padding=1, bias=False), nn.BatchNorm2d(t // 2), nn.ReLU(),
            nn.Conv2d(t // 2, t, 1, bias=False), nn.BatchNorm2d(t), nn.ReLU(),
        )  # fmt: skip

    def forward(self, feat_s: Tensor, feat_t: Tensor, classifier: nn.Linear) -> tuple[Tensor, ...]:
        s_h, t_h = feat_s.shape[2], feat_t.shape[2]
        source = F.adaptive_avg_pool2d(feat_s, t_h) if s_h > t_h else feat_s
        target = feat_t if s_h > t_h else F.adaptive_avg_pool2d(feat_t, s_h)
        projection = self.transfer(source)
        return projection, target, classifier(F.adaptive_avg_pool2d(projection, 1).flatten(1))


@pytest.mark.parametrize(("field", "side"), [("last", 4), ("last", 8), ("last_4", 4), ("last", 2)])
def test_loss_and_logits_are_the_published_ones(field: str, side: int) -> None:
    """The student's map is 4 x 4, the teacher's as large, larger, averaged to 4, or smaller."""
    network, known = projected(**{field: (6, side, side)})
    assert isinstance(network, Projected)
    network.train()
    other = PublishedProjector(64, 6)
    other.transfer.load_state_dict(
        dict(zip(other.transfer.state_dict(), network.projector.state_dict().values(), strict=True))
    )
    x, target = torch.randn(3, 3, 16, 16), maps(4, 6, side, side).float()
    torch.manual_seed(1)
    plain = build_model("resnet8", 3, 3, 16).train()
    plain.load_state_dict(network.source.network.state_dict())
    feature = tapped(plain, ("last",))(x)["last"]
    projection, aim, logits = other(feature, target, network.head)
    outputs = tapped(network, ("last",))(x)
    torch.testing.assert_close(outputs["logits"], logits)
    objective = Objective(ObjectiveConfig(method="simkd"), known)
    loss, parts = objective(outputs, [{field: target}], torch.arange(3))
    torch.testing.assert_close(parts["kd"], F.mse_loss(projection, aim))
    torch.testing.assert_close(loss, F.mse_loss(projection, aim))  # no cross-entropy
    loss.backward()
    for name, parameter in network.named_parameters():
        heads = name.startswith("classifier") or name.endswith(
            ("network.fc.weight", "network.fc.bias")
        )
        assert (parameter.grad is None) == heads, name


def test_which_field_is_read() -> None:
    config = ObjectiveConfig(method="simkd").resolved()
    student = {"logits": (3,), "last": (64, 4, 4)}
    for held, name in (
        ({"last": (6, 8, 8), "last_4": (6, 4, 4)}, "last_4"),
        ({"last": (6, 8, 8), "last_2": (6, 2, 2)}, "last"),
        ({"last": (6, 2, 2)}, "last"),
        ({"last_8": (6, 8, 8)}, "last_8"),
    ):
        assert SimKD.reads(config, student, held) == (name,)
    message = r"simkd needs .* at 4 x 4, .* are pooled, last@2\..*--fields last@4, 192 bytes a view"
    with pytest.raises(UsageError, match=message):
        choose_last({"pooled": (6,), "last_2": (6, 2, 2)}, 4, "simkd")
    with pytest.raises(
        UsageError, match=r"needs .* at 4 x 4"
    ):  # 7 x 7 does not average exactly to 4 x 4
        choose_last({"last": (6, 7, 7)}, 4, "simkd")
    with pytest.raises(UsageError, match="predicts with the teacher's last layer"):
        with_projector(build_model("resnet8", 3), Nets(student, {"last": (6, 4, 4)}), {"factor": 2})


def test_a_student_is_trained_evaluated_exported_and_dumped_with_projector_and_head(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    last, run, store = tmp_path / "last", tmp_path / "run", tmp_path / "again"
    common = ("--dataset", "digits", "--device", "cpu", "-q")
    for command in (
        ("dump-teacher", "--teacher", trained.teacher, "--views", 1, "--fields", "last", "--out", last),
        ("train-student", "--store", last, "--student", "resnet8", "--method", "simkd", "--epochs", 1,
         "--train-samples", 100, "--out", run),
        ("dump-teacher", "--teacher", run, "--views", 1, "--fields", "logits,pooled,last@2",
         "--encoding", "float32", "--encoding", "pooled=float32", "--encoding", "last@2=float32",
         "--allow-untrained", "--out", store),
    ):  # fmt: skip
        done: Result = kdcache(*command, *common)
        assert done.code == 0, done.err
    model = load_run_model(run)
    assert isinstance(model.module, Projected)
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8, fields=("pooled",))
    assert teacher.head is not None
    assert torch.equal(model.module.head.weight, teacher.head[0])  # the teacher's, to the end
    evaluated = kdcache("evaluate", run, "--json", *common[:4])
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["top1"] == pytest.approx(read_summary(run)["last_top1"])
    with open_store(store) as opened:
        logits, pooled, two = (opened.read(0, field=f) for f in ("logits", "pooled", "last_2"))
        assert opened.head is not None
        weight, bias = opened.head
        np.testing.assert_allclose(pooled @ weight.T + bias, logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(two.mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)
        assert weight.shape == (10, 64)
    result = export(model, "safetensors", tmp_path / "net.safetensors")
    assert result["max_difference"] < 1e-4


@pytest.mark.slow
def test_a_projected_network_is_exported_as_a_program(tmp_path: Path) -> None:
    network, _ = projected(last=(6, 4, 4))
    spec = {"name": "resnet8", "classes": 3, "channels": 3, "size": 16, "projector": network.spec}
    normal = Preprocessing((0.4,) * 3, (0.3,) * 3)
    model = RunModel(network.eval(), normal, {"model": spec}, tmp_path)
    assert export(model, "torch-export", tmp_path / "net.pt2")["max_difference"] < 1e-4

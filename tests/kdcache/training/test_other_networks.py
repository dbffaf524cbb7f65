"""Methods on features between networks of other libraries, of different shapes; weights are random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.nets import Nets
from kdcache.methods.step import Step
from kdcache.models.taps import as_fields, expanded, tapped
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import assembled, read_fields, student_shapes
from kdcache_stores import UsageError

CLASSES, COUNT = 7, 4
EVERY = ("pooled", "last", "attention")


def teacher(spec: str, size: int, *fields: str) -> Teacher:
    torch.manual_seed(0)
    normal = Preprocessing((0.4,) * 3, (0.3,) * 3)
    return load_teacher(spec, classes=CLASSES, size=size, preprocessing=normal, allow_untrained=True,
                        fields=("logits", *fields))  # fmt: skip


def one_step(method: str, student: nn.Module, taught: Teacher, size: int) -> dict[str, Tensor]:
    """The parts of the loss of a step, whose gradient reaches what is trained."""
    options = {"negatives": 5} if method == "crd" else {}
    config = ObjectiveConfig(method=method, options=options)
    views = torch.randint(256, (COUNT, 3, size, size), dtype=torch.uint8)
    images = taught.preprocessing(views)
    shapes = student_shapes(student, config, images.shape[1:])
    fields = read_fields(config, shapes, taught.shapes)
    keys, labels = torch.arange(COUNT), torch.arange(COUNT)
    nets = Nets(shapes, {f: taught.shapes[f] for f in fields}, taught.head, keys, labels)
    network, objective = assembled(student, config, nets)
    given = as_fields(tapped(network.train(), objective.student_fields)(images))
    loss, parts = objective(given, [taught(views)], labels, Step(keys=keys))
    loss.backward()
    first = next(p for p in network.parameters() if p.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert loss.isfinite()
    return parts


def vit() -> nn.Module:
    return VisionTransformer(64, 16, 1, 2, 16, 32, num_classes=CLASSES)


@pytest.mark.parametrize("method", ["rkd", "crd"])
def test_a_vit_learns_from_a_resnet_by_pooled_vectors(method: str) -> None:
    """Of 16 and 512 numbers: RKD compares relations, CRD has a linear map for each."""
    one_step(method, vit(), teacher("torchvision:resnet18", 64, "pooled"), 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rkd", "crd", "at", "simkd", "cat-kd"])
def test_torchvision_s_networks_teach_each_other(method: str) -> None:
    student = build_model("torchvision:mobilenet_v2", CLASSES, 3, 64)
    one_step(method, student, teacher("torchvision:resnet34", 64, *EVERY), 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rkd", "crd", "at", "simkd", "cat-kd"])
def test_timm_s_resnet_152_teaches_a_resnet_50(method: str) -> None:
    pytest.importorskip("timm")
    student = build_model("timm:resnet50", CLASSES, 3, 64)
    one_step(method, student, teacher("timm:resnet152", 64, *EVERY), 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rkd", "crd"])
def test_timm_s_vit_teaches_a_mobilevit(method: str) -> None:
    pytest.importorskip("timm")
    student = build_model("timm:mobilevit_xxs", CLASSES, 3, 224)
    one_step(method, student, teacher("timm:vit_tiny_patch16_224", 224, "pooled"), 224)


def test_what_has_no_such_layer_is_refused_and_says_why() -> None:
    network, images = vit().eval(), torch.zeros(2, 3, 64, 64)
    with pytest.raises(
        UsageError, match="has no field last: its head does not see the mean of a map"
    ):
        tapped(network, ("last",))(images)
    with pytest.raises(UsageError, match="nothing of it is known as its stages"):
        expanded(network, ("attention",), images)
    resnet = teacher("torchvision:resnet18", 64, "pooled")
    with pytest.raises(UsageError, match="its head does not see the mean of a map"):
        one_step("simkd", vit(), resnet, 64)
    student = build_model("torchvision:resnet18", CLASSES, 3, 64)
    with pytest.raises(UsageError, match=r"cat-kd needs .* fields of its store are logits, pooled"):
        one_step("cat-kd", student, resnet, 64)

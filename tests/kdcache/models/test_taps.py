"""Taps: pooled is what the head sees, in every family; a user's module gives what it likes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from kdcache.models.taps import head_of, tapped
from kdcache.models.weights import tensor_digest
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.load import load_teacher
from kdcache.teachers.posterior import mc_dropout
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import DataError, MismatchError, UsageError

BOTH = ("logits", "pooled")
FAMILIES = ("resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "mobilenetv1", "ShuffleV1",
            "ShuffleV2")  # fmt: skip


@torch.no_grad()
def check_taps(network: nn.Module, images: Tensor) -> None:
    network.eval()
    head = head_of(network)
    assert head is not None
    outputs = tapped(network, BOTH)(images)
    assert outputs["pooled"].shape == (len(images), head.in_features)
    assert torch.equal(outputs["logits"], network(images))
    assert torch.equal(head(outputs["pooled"]), outputs["logits"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    check_taps(build_model(name, 7, 3, 32), torch.randn(2, 3, 32, 32))


def small_vit() -> nn.Module:
    return VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=7,
    )


@pytest.mark.parametrize(
    "make",
    [
        small_vit,
        lambda: tv.resnet18(num_classes=7),
        lambda: tv.mobilenet_v3_small(num_classes=7),
        lambda: tv.shufflenet_v2_x0_5(num_classes=7),
        lambda: tv.efficientnet_b0(num_classes=7),
        lambda: tv.densenet.DenseNet(8, (2, 2), 16, num_classes=7),
        lambda: tv.convnext.ConvNeXt([tv.convnext.CNBlockConfig(8, None, 2)], num_classes=7),
    ],
    ids=["vit", "resnet", "mobilenet", "shufflenet", "efficientnet", "densenet", "convnext"],
)
def test_torchvision(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    check_taps(make(), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto",
     "efficientnet_b0", "densenet121", "mixer_s32_224"],
)  # fmt: skip
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=7)
    side = network.default_cfg["input_size"][-1] if network.default_cfg["fixed_input_size"] else 64
    check_taps(network, torch.randn(2, 3, side, side))


def test_networks_without_a_linear_head_say_what_they_have() -> None:
    with pytest.raises(UsageError, match=r"SqueezeNet has no field pooled.*It has logits alone"):
        tapped(tv.squeezenet1_1(num_classes=7).eval(), BOTH)
    with pytest.raises(UsageError, match=r"CifarResNet has no field tokens: it has logits, pooled"):
        tapped(build_model("resnet8", 7).eval(), ("logits", "tokens"))


# -- teachers ------------------------------------------------------------------------------------
def views(count: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def load(spec: str, **changes: object) -> Teacher:
    normal = Preprocessing((0.4,) * 3, (0.3,) * 3)
    settings: dict[str, object] = {
        "classes": 7, "preprocessing": normal, "allow_untrained": True, "fields": BOTH
    }  # fmt: skip
    return load_teacher(spec, **(settings | changes))  # type: ignore[arg-type]


def logits_of(teacher: Teacher, outputs: dict[str, Tensor]) -> Tensor:
    assert teacher.head is not None
    weight, bias = teacher.head
    return outputs["pooled"] @ weight.T + bias


@pytest.mark.parametrize("spec", ["resnet8", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"channels_last": True}, {"class_map": (6, 0, 2, 1, 3, 5, 4)}]
)  # fmt: skip
def test_a_teacher_s_fields_are_its_head_s_input_and_output(
    spec: str, changes: dict[str, object]
) -> None:
    torch.manual_seed(0)
    teacher = load(spec, **changes)
    outputs = teacher(views())
    assert set(outputs) == set(teacher.fields) == set(BOTH)
    assert {name: tuple(rows.shape[1:]) for name, rows in outputs.items()} == teacher.shapes
    assert all(rows.dtype == torch.float32 for rows in outputs.values())
    tolerance = 2e-2 if "precision" in changes else 1e-5
    torch.testing.assert_close(
        logits_of(teacher, outputs), outputs["logits"], rtol=tolerance, atol=tolerance
    )


def test_fields_change_no_logits_and_no_digest() -> None:
    torch.manual_seed(0)
    both = load("resnet8")
    alone = Teacher("resnet8", both.module, both.preprocessing, 7, both.weights_sha256)
    assert torch.equal(both.logits(views()), alone.logits(views()))
    assert both.to_store().digest == alone.to_store().digest
    assert alone.head is None


@pytest.mark.parametrize("name", ["wrn_16_2_dropout", "torchvision:mobilenet_v3_small"])
def test_a_posterior_sample_s_pooled_is_its_head_s_input(name: str) -> None:
    torch.manual_seed(0)
    sample = mc_dropout(load(name), seed=1)
    outputs = sample(views())
    torch.testing.assert_close(logits_of(sample, outputs), outputs["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs["logits"], sample.module(sample.preprocessing(views())))
    torch.testing.assert_close(sample(views()[:2])["pooled"], outputs["pooled"][:2])


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["resnet8", "torchvision:mobilenet_v3_small"])
def test_compiled_teachers_give_the_same_fields(spec: str) -> None:
    torch.manual_seed(0)
    plain = load(spec)
    compiled = Teacher(spec, plain.module, plain.preprocessing, 7, "", compile=True, fields=BOTH)
    for count in (4, 3):
        for name, rows in plain(views(count)).items():
            torch.testing.assert_close(compiled(views(count))[name], rows, rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    """A user's module: logits from the mean of (T, D) token states."""

    def __init__(
        self, spoil: Callable[[dict[str, object]], object] = lambda outputs: outputs
    ) -> None:
        super().__init__()
        self.states = nn.Linear(4 * 4 * 3, 8)
        self.head = nn.Linear(8, 7)
        self.spoil = spoil

    def forward(self, images: Tensor) -> object:
        patches = nn.functional.unfold(images, 4, stride=4)
        tokens = self.states(patches.transpose(1, 2))
        pooled = tokens.mean(1)
        return self.spoil({"logits": self.head(pooled), "pooled": pooled, "tokens": tokens})


def user(spoil: Callable[[dict[str, object]], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
         fields: tuple[str, ...] = ("logits", "tokens")) -> Teacher:  # fmt: skip
    """The module as a user's factory gives it."""
    import sys
    from types import ModuleType

    own = ModuleType("own_tokens")
    own.make = lambda: Tokens(spoil)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_tokens", own)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return load("own_tokens:make", fields=fields)


def test_a_user_s_mapping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = user(lambda outputs: outputs, monkeypatch, tmp_path, ("logits", "tokens", "pooled"))
    assert teacher.shapes == {"logits": (7,), "tokens": (64, 8), "pooled": (8,)}
    outputs = teacher(views())
    torch.testing.assert_close(outputs["tokens"].mean(1), outputs["pooled"])
    torch.testing.assert_close(logits_of(teacher, outputs), outputs["logits"])
    small = Teacher(
        "own", teacher.module, teacher.preprocessing, 7, tensor_digest({}), batch_size=3
    )
    assert set(small(views())) == {"logits"}
    torch.testing.assert_close(small.logits(views()), outputs["logits"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: {"tokens": o["tokens"]}, r"gives tokens, not logits"),
        (lambda o: {"logits": o["logits"]}, r"gives logits, not tokens"),
        (lambda o: o | {"tokens": list(o["tokens"])}, r"tokens comes as rows of differing length"),
        (
            lambda o: o | {"tokens": torch.nested.as_nested_tensor([o["tokens"][0][:2], o["tokens"][1]])},
            r"tokens comes as rows of differing length",
        ),
        (lambda o: o | {"tokens": o["tokens"].transpose(0, 1)}, r"a row for each of B = 3 views"),
        (lambda o: o | {"tokens": o["tokens"].sum()}, r"expected tokens \(B, \.\.\.\)"),
        (lambda o: o | {"tokens": "text"}, r"found str"),
        (lambda o: (o["logits"],), r"expected logits \(B, K\) or a mapping .*, found tuple"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_mappings_that_are_no_rows_are_refused(
    spoil: Callable[[dict[str, Tensor]], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=message):
        user(spoil, monkeypatch, tmp_path)


def test_a_shape_that_changes_with_the_batch_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Padded to the longest row of its batch: two batches need not agree."""
    teacher = user(
        lambda o: o | {"tokens": o["tokens"][:, : len(o["tokens"])]}, monkeypatch, tmp_path
    )
    assert teacher(views(3))["tokens"].shape == (3, 3, 8)
    with pytest.raises(
        MismatchError, match=r"rows of tokens of shape \(4, 8\) here and of \(3, 8\)"
    ):
        teacher(views(4))


def test_pooled_is_what_the_head_sees_or_has_another_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shifted(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return outputs | {"pooled": outputs["pooled"] + 1}

    with pytest.raises(DataError, match="gives other logits than itself"):
        user(shifted, monkeypatch, tmp_path, BOTH)


def test_pooled_alone() -> None:
    torch.manual_seed(0)
    teacher = load("resnet8", fields=("pooled",))
    assert set(teacher(views())) == {"pooled"}
    torch.testing.assert_close(logits_of(teacher, teacher(views())), teacher.logits(views()))


def test_fields_are_named_once() -> None:
    for fields in ((), ("logits", "logits")):
        with pytest.raises(UsageError, match="each once"):
            load("resnet8", fields=fields)

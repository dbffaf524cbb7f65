"""Structure of the zoo: parameter counts, published names, sizes and channels."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from kdcache.models.network import Network
from kdcache.models.zoo import _FAMILIES, MODELS, build_model
from kdcache_stores.errors import UnknownName, UsageError

# At 100 classes, 3 channels, 32 pixels: counted on the published definitions.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "ResNet18": 11_220_132,
    "ResNet50": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_4": 2_772_020,
    "wrn_28_2": 1_479_220,
    "wrn_28_4": 5_872_180,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "wrn_40_4": 8_972_340,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
}


def parameters(name: str, classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, classes).parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mobilenetv1"])
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert parameters(name, 100) == PARAMETERS[name.removesuffix("_dropout")]


def test_mobilenetv1_is_the_published_one_of_imagenet() -> None:
    assert parameters("mobilenetv1", 1000) == 4_231_976


# One of each family.
FAMILIES = ["resnet8", "resnet8x4", "ResNet18", "ResNet50", "wrn_16_2", "wrn_16_2_dropout", "vgg8"]
FAMILIES += ["MobileNetV2", "mobilenetv1", "ShuffleV1", "ShuffleV2"]


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 64), (3, 96), (4, 33)])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_channels_and_size(name: str, channels: int, size: int) -> None:
    with torch.device("meta"):  # shapes alone: no arithmetic, so every net and size is cheap
        net = build_model(name, classes=7, channels=channels, size=size)
        views = torch.empty(2, channels, size, size)
    assert net.eval()(views).shape == (2, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_head_of_the_pooled_last_stage(name: str) -> None:
    torch.manual_seed(0)
    net = build_model(name, classes=5, channels=1, size=8).eval()
    assert isinstance(net, Network)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        stages = net.stages(x)
        pooled = net.pooled(net.last(stages))
        assert pooled.shape == (2, net.head.in_features)
        torch.testing.assert_close(net.head(pooled), net(x))
    assert all(m.ndim == 4 and m.shape[0] == 2 for stage in stages for m in stage)
    assert net.head.out_features == 5


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet20", ["conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "fc.bias"]),
        ("resnet20", ["layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean"]),
        ("resnet8x4", ["layer1.0.downsample.0.weight"]),
        ("wrn_16_2", ["block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.bias"]),
        ("wrn_40_1", ["conv1.weight", "block2.layer.5.conv2.weight", "bn1.weight", "fc.weight"]),
        ("vgg8", ["block0.0.bias", "block4.1.running_mean", "classifier.weight"]),
        ("vgg13", ["block0.3.weight", "block0.4.running_var", "block4.3.bias"]),
        ("MobileNetV2", ["conv1.0.weight", "conv1.1.bias", "conv2.0.weight"]),
        ("MobileNetV2", ["blocks.6.0.conv.6.weight", "blocks.1.1.conv.7.bias"]),
        ("MobileNetV2", ["classifier.0.weight"]),
        ("ShuffleV1", ["conv1.weight", "layer1.0.conv3.weight", "layer3.3.bn3.bias"]),
        ("ShuffleV1", ["linear.weight"]),
        ("ShuffleV2", ["layer1.0.conv5.weight", "layer1.0.bn5.bias", "layer2.7.conv3.weight"]),
        ("ShuffleV2", ["conv2.weight", "bn2.bias", "linear.bias"]),
        ("mobilenetv1", ["model.0.0.weight", "model.13.3.weight", "model.13.4.bias", "fc.weight"]),
        ("ResNet18", ["layer2.0.shortcut.0.weight", "layer4.1.bn2.weight", "linear.weight"]),
        ("ResNet50", ["layer1.0.shortcut.1.weight", "layer3.5.conv3.weight", "linear.bias"]),
    ],
)
def test_published_state_dict_names(name: str, names: list[str]) -> None:
    with torch.device("meta"):
        state = build_model(name, classes=100).state_dict()
    assert [n for n in names if n not in state] == []


def test_identity_shortcuts_have_no_parameters() -> None:
    names = build_model("resnet14", classes=10).state_dict()
    assert not any(n.startswith("layer1.0.downsample") for n in names)


# Channels and side of each stage's map and the length of the pooled vector, at 32 pixels.
STAGES = {
    "resnet56": ([(16, 32), (16, 32), (32, 16), (64, 8)], 64),
    "resnet32x4": ([(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "ResNet50": ([(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
    "wrn_40_2": ([(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "vgg13": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "MobileNetV2": ([(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "ShuffleV1": ([(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "ShuffleV2": ([(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
    "mobilenetv1": ([(32, 16), (128, 8), (256, 4), (512, 2), (1024, 1)], 1024),
}


@pytest.mark.parametrize("name", STAGES)
def test_stage_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        net = build_model(name, classes=10)
        assert isinstance(net, Network)
        stages = net.eval().stages(torch.empty(1, 3, 32, 32))
    maps, pooled = STAGES[name]
    assert [(s.after.shape[1], s.after.shape[2]) for s in stages] == maps
    assert [s.before.shape for s in stages] == [s.after.shape for s in stages]
    assert net.head.in_features == pooled


def test_vgg_of_64_pixels_is_halved_once_more() -> None:
    with torch.device("meta"):
        net = build_model("vgg8", classes=10, size=64)
        assert isinstance(net, Network)
        sides = [s.after.shape[2] for s in net.stages(torch.empty(1, 3, 64, 64))]
    assert sides == [64, 32, 16, 8, 4]


def test_convolutions_start_kaiming_normal_fan_out() -> None:
    torch.manual_seed(0)
    net = build_model("resnet8x4", classes=10)
    conv = net.get_submodule("layer3.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


def test_initial_weights_follow_torch_seed() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(7)
        nets.append(build_model("resnet8", classes=10))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_name_lists_the_zoo_and_the_closest() -> None:
    with pytest.raises(UnknownName, match=r"unknown model 'resnet21'; did you mean 'resnet2?.*20"):
        build_model("resnet21", classes=10)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="8x8 pixels or more, found 4x4"):
        build_model("resnet8", classes=10, channels=1, size=4)
    with pytest.raises(UsageError, match="0 classes"):
        build_model("resnet8", classes=0)


def test_the_zoo_names_whom_its_families_have() -> None:
    for home, names in _FAMILIES.items():
        module, _, family = home.partition(":")
        assert names == tuple(getattr(import_module(module), family))
    assert len(MODELS) == sum(map(len, _FAMILIES.values()))

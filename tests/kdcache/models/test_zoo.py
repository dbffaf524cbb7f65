"""Structure of the zoo: parameter counts, published names, sizes and channels."""

from __future__ import annotations

import pytest
import torch
from kdcache_stores.errors import UnknownName, UsageError
from torch import nn

from kdcache.models import MODELS, build_model
from kdcache.models.network import Network

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
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        net = build_model(name, classes=100, channels=3, size=32)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64), (3, 96), (4, 33)]
)
@pytest.mark.parametrize("name", MODELS)
def test_any_channels_and_size(name: str, channels: int, size: int) -> None:
    with torch.device("meta"):  # shapes alone: no arithmetic, so every net and size is cheap
        net = build_model(name, classes=7, channels=channels, size=size)
        views = torch.empty(2, channels, size, size)
    assert net.eval()(views).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_head_of_the_pooled_last_stage(name: str) -> None:
    torch.manual_seed(0)
    net = build_model(name, classes=5, channels=1, size=8).eval()
    assert isinstance(net, Network)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        stages = net.stages(x)
        pooled = net.pooled(stages[-1])
        assert pooled.shape == (2, net.head.in_features)
        torch.testing.assert_close(net.head(pooled), net(x))
    assert all(s.ndim == 4 and s.shape[0] == 2 for s in stages)
    assert net.head.out_features == 5


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet20", ["conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "fc.bias"]),
        ("resnet20", ["layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean"]),
        ("resnet8x4", ["layer1.0.downsample.0.weight"]),
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


def test_stage_sizes_of_a_cifar_resnet() -> None:
    net = build_model("resnet8", classes=10)
    assert isinstance(net, Network)
    shapes = [tuple(s.shape[1:]) for s in net.stages(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


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

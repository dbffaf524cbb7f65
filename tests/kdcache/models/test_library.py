"""Other people's models: torchvision, timm, a user's factory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import nn

from kdcache.models.library import pretrained_timm, pretrained_torchvision
from kdcache.models.zoo import build_model
from kdcache_stores.errors import DataError, UnknownName, UsageError


def test_torchvision_classifiers_by_name() -> None:
    with torch.device("meta"):
        net = build_model("torchvision:resnet34", classes=1000)
        assert sum(p.numel() for p in net.parameters()) == 21_797_672
        assert net.eval()(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        other = build_model("torchvision:mobilenet_v3_small", classes=7)
        assert other.eval()(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_bare_names_are_the_zoo_s() -> None:
    with pytest.raises(UsageError, match=r"torchvision's: torchvision:resnet18.*ResNet18"):
        build_model("resnet18", classes=10)
    with torch.device("meta"):
        small = build_model("ResNet18", classes=10).state_dict()
        large = build_model("torchvision:resnet18", classes=10).state_dict()
    assert small["conv1.weight"].shape[2:] == (3, 3)
    assert large["conv1.weight"].shape[2:] == (7, 7)


def test_torchvision_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'resnet34'"):
        build_model("torchvision:resnet33", classes=10)
    with pytest.raises(UsageError, match="takes 3 channels, found 1"):
        build_model("torchvision:resnet18", classes=10, channels=1)
    with pytest.raises(UnknownName, match=r"unknown weights of torchvision:resnet34 'V1'.*DEFAULT"):
        pretrained_torchvision("resnet34", "V1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch hub cache that holds a file for squeezenet1_1's weights, so nothing is fetched."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / Path(tv.SqueezeNet1_1_Weights.DEFAULT.url).name


def test_torchvision_s_own_weights_and_preprocessing(hub: Path) -> None:
    torch.manual_seed(0)
    state = tv.squeezenet1_1().state_dict()
    torch.save(state, hub)
    for entry in ("IMAGENET1K_V1", "DEFAULT"):
        loaded = pretrained_torchvision("squeezenet1_1", entry)
        assert all(torch.equal(t, state[n]) for n, t in loaded.module.state_dict().items())
    assert loaded.preprocessing.to_dict() == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "size": 224,
        "interpolation": "bilinear",
        "antialias": True,
    }


def test_a_cached_file_with_code_in_it_is_refused(hub: Path) -> None:
    torch.save(tv.squeezenet1_1(), hub)
    with pytest.raises(DataError, match=r"squeezenet1_1-\S+pth: it holds pickled code"):
        pretrained_torchvision("squeezenet1_1", "DEFAULT")


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'kdcache\[timm\]'"):
        build_model("timm:resnet18", classes=10)


def test_timm_models() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    net = build_model("timm:resnet10t", classes=7, channels=1).eval()
    assert net(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    with pytest.raises(UnknownName, match="timm model 'resnet19'"):
        build_model("timm:resnet19", classes=7)
    with pytest.raises(UnknownName, match=r"weights of timm:resnet10t 'x'.*c3_in1k"):
        pretrained_timm("resnet10t", "x")


FACTORY = """
import torch

def full(classes, channels, size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size**2, classes))

def usual(num_classes=1000):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))

def bare():
    return torch.nn.Flatten()

def wrong(classes):
    return classes
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_factory_in_the_working_directory(factories: str) -> None:
    net = build_model(f"{factories}:full", classes=4, channels=1, size=8)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert isinstance(build_model(f"{factories}:bare", classes=4), nn.Flatten)
    usual = build_model(
        f"{factories}:usual", classes=4, channels=1, size=8
    )  # as most libraries call it
    assert usual(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_factory_refusals(factories: str) -> None:
    with pytest.raises(UsageError, match="has no function 'absent'"):
        build_model(f"{factories}:absent", classes=4)
    with pytest.raises(DataError, match=r"expected an nn\.Module, found int"):
        build_model(f"{factories}:wrong", classes=4)
    with pytest.raises(UsageError, match=r"a module networks .*, named without \.py: networks"):
        build_model("networks.py:own", 10)
    with pytest.raises(UsageError, match=r"No module named 'nowhere'.*torchvision:NAME"):
        build_model("nowhere:net", classes=4)

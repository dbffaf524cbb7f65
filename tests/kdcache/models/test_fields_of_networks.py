"""Fields of feature maps: their names, what they hold, and what follows exactly from what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.fields.maps import attention, attention_at, attention_heights, averaged
from kdcache.fields.spelling import FIELDS, needs_head, spelled, stored_name, tap_of
from kdcache.models.network import Network
from kdcache.models.taps import expanded, head_of, tapped
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.load import load_teacher
from kdcache_stores.errors import DataError, UsageError

ZOO = ("resnet8", "resnet8x4", "ResNet18", "wrn_16_1", "wrn_16_2", "vgg8", "MobileNetV2",
       "mobilenetv1", "ShuffleV1", "ShuffleV2")  # fmt: skip


def images(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def fresh(name: str) -> Network:
    torch.manual_seed(0)
    network = build_model(name, 7, 3, 32)
    assert isinstance(network, Network)
    for module in network.modules():  # not all 0 and 1, which would hide a norm that is left out
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr, operator]
    return network.eval()


# -- names -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spelling", "name"),
    [("logits", "logits"), ("last", "last"), ("last@4", "last_4"), ("last_4", "last_4"),
     ("attention", "attention"), ("attention@16", "attention_16"), ("stage:2", "stage_2"),
     ("stage:2:pre", "stage_2_pre"), ("stage_2_pre", "stage_2_pre"), ("tokens", "tokens"),
     ("last_hidden", "last_hidden")],
)  # fmt: skip
def test_spellings_and_stored_names(spelling: str, name: str) -> None:
    assert stored_name(spelling) == name
    assert stored_name(spelled(name)) == name


@pytest.mark.parametrize("spelling", ["stage", "stage:pre", "last@0"])
def test_names_of_nothing_are_refused(spelling: str) -> None:
    with pytest.raises(UsageError, match=r"number of the stage|1 x 1"):
        stored_name(spelling)


def test_the_list_names_what_taps_know() -> None:
    for spelling in FIELDS:
        tap = tap_of(spelling.replace("R", "4").replace("N", "2"))
        assert tap is not None
    heads = {spelling for spelling in ("logits", "pooled", "last", "last_4", "attention_8", "stage_1")
             if needs_head(spelling)}  # fmt: skip
    assert heads == {"pooled", "last", "last_4"}


# -- what they hold ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_the_last_map_pools_to_pooled_and_to_logits(name: str) -> None:
    network, x = fresh(name), images()
    fields = tapped(network, ("pooled", "last", "cam"))(x)
    assert torch.equal(fields["logits"], network(x))
    assert torch.equal(averaged(fields["last"], 1).flatten(1), fields["pooled"])
    torch.testing.assert_close(
        fields["cam"].mean((2, 3)) + network.head.bias, fields["logits"], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_on_8_x_8_maps_last_4_averages_exactly_to_less() -> None:
    network, x = fresh("resnet8x4"), images()
    fields = tapped(network, ("pooled", "last_4", "last_2"))(x)
    four = fields["last_4"]
    assert four.shape == (2, 256, 4, 4)
    torch.testing.assert_close(averaged(four, 2), fields["last_2"])
    torch.testing.assert_close(four.mean((2, 3)), fields["pooled"])
    torch.testing.assert_close(network.head(four.mean((2, 3))), fields["logits"])


@torch.no_grad()
def test_at_7_x_7_windows_overlap_so_that_each_size_is_another_field() -> None:
    last = torch.randn(2, 5, 7, 7)
    assert (averaged(averaged(last, 4), 2) - averaged(last, 2)).abs().max() > 1e-2
    assert (averaged(last, 4).mean((2, 3)) - last.mean((2, 3))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_stages_before_and_after_their_relu(name: str) -> None:
    network, x = fresh(name), images()
    stages = network.stages(x)
    count = len(stages)
    names = [f"stage_{i}{end}" for i in range(count) for end in ("", "_pre")]
    fields = tapped(network, names)(x)
    for i in range(count):
        after, before = fields[f"stage_{i}"], fields[f"stage_{i}_pre"]
        if name.startswith("wrn"):
            norm = network.get_submodule("bn1" if i == count - 1 else f"block{i + 1}.layer.0.bn1")
            assert torch.equal(before, norm(after))
        elif name == "MobileNetV2" and i > 0:
            assert torch.equal(before, after)  # a stage ends without a ReLU
        else:
            assert torch.equal(F.relu(before), after)
            assert before.min() < 0


def test_a_tapped_network_in_training_is_the_network_itself() -> None:
    """Batch norms see each batch once, also where a stage is looked at before its ReLU."""
    for name in ("wrn_16_2", "ShuffleV2", "MobileNetV2"):
        plain, other = fresh(name).train(), fresh(name).train()
        taps = tapped(other, ("stage_1_pre", "last"))
        assert torch.equal(plain(images()), taps(images())["logits"])
        for (key, a), b in zip(
            plain.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), key


# -- attention ---------------------------------------------------------------------------------------
def published(features: np.ndarray, height: int) -> np.ndarray:
    """AT as published, in float64: averaged, squared, the mean over channels, unit length."""
    b, c, h, _ = features.shape
    k = h // height
    small = features.reshape(b, c, height, k, height, k).mean((3, 5))
    maps = (small**2).mean(1).reshape(b, -1)
    return maps / np.linalg.norm(maps, axis=1, keepdims=True)


@torch.no_grad()
def test_the_pyramid_holds_every_stage_at_every_size_as_at_would_make_it() -> None:
    network, x = fresh("resnet8x4"), images()
    names = expanded(network, ("attention",), x)
    assert names == tuple(f"attention_{height}" for height in (32, 16, 8, 4, 2))
    fields = tapped(network, names)(x)
    stages = [stage.after.double().numpy() for stage in network.stages(x)[1:]]
    for height, count in ((32, 1), (16, 2), (8, 3), (4, 3), (2, 3)):
        held = fields[f"attention_{height}"]
        assert held.shape == (2, count, height, height)
        for i in range(count):
            aim = published(stages[i], height).reshape(2, height, height)
            np.testing.assert_allclose(held[:, i].numpy(), aim, rtol=2e-5, atol=1e-7)
    floats = sum(fields[name][0].numel() for name in names)
    assert 1.25 < 2 * floats / 2688 < 1.35


def test_averaging_a_finished_map_is_another_thing() -> None:
    features = torch.randn(4, 16, 8, 8).relu()
    whole = F.normalize(averaged(attention(features)[:, None], 4).flatten(1))
    right = attention_at([features], 4)[:, 0].flatten(1)
    assert 0.005 < ((whole - right).norm() / right.norm()).item() < 0.2


def test_heights_halve_while_they_can() -> None:
    assert attention_heights([32, 16, 8]) == [32, 16, 8, 4, 2]
    assert attention_heights([56, 28, 14, 7]) == [56, 28, 14, 7]


# -- other networks ----------------------------------------------------------------------------------
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: tv.resnet18(num_classes=7),
    "mobilenet": lambda: tv.mobilenet_v2(num_classes=7),
    "shufflenet": lambda: tv.shufflenet_v2_x0_5(num_classes=7),
    "densenet": lambda: tv.densenet.DenseNet(8, (2, 2), 16, num_classes=7),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "resnet" else pytest.param(name, marks=pytest.mark.slow)
        for name in TORCHVISION
    ],
)
@torch.no_grad()
def test_torchvision_has_maps(name: str) -> None:
    torch.manual_seed(0)
    network, x = TORCHVISION[name]().eval(), images(64)
    names = expanded(network, ("stages", "attention"), x)
    fields = tapped(network, ("pooled", "last", *names))(x)
    torch.testing.assert_close(fields["last"].mean((2, 3)), fields["pooled"])
    assert torch.equal(fields["logits"], network(x))
    heights = [fields[name].shape[2] for name in names if name.startswith("stage")]
    assert heights == sorted(set(heights), reverse=True)
    assert len(heights) >= 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_timm_has_maps(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).eval()
    x = images(224 if "vit" in name else 64)
    names = expanded(network, ("stages",), x)
    fields = tapped(network, ("pooled", *names))(x)
    torch.testing.assert_close(fields["logits"], network(x))
    assert all(fields[name].ndim == 4 for name in names)
    if "vit" in name:
        with pytest.raises(UsageError, match="head does not see the mean of a map"):
            tapped(network, ("last",))(x)
    else:
        head = head_of(network)
        assert head is not None
        last = tapped(network, ("last",))(x)["last"]
        if name == "resnet18":
            torch.testing.assert_close(head(last.mean((2, 3))), fields["logits"])


def test_what_a_network_lacks_is_refused_and_what_it_has_is_named() -> None:
    resnet = fresh("resnet8")
    for field, message in (
        ("stage_4", "has no field stage:4: its stages are 0 to 3"),
        ("last_9", "has no field last@9: its last map has 8x8"),
        ("attention_64", "has no field attention@64: its stages are 32, 16, 8 high"),
        ("tokens", "has no field tokens: it has logits, pooled, last"),
    ):
        with pytest.raises(UsageError, match=message):
            tapped(resnet, (field,))(images())
    with pytest.raises(UsageError, match=r"stage:N:pre.*zoo"):
        tapped(tv.resnet18(num_classes=7).eval(), ("stage_1_pre",))


# -- teachers ----------------------------------------------------------------------------------------
def load(spec: str, *fields: str, size: int = 32) -> object:
    torch.manual_seed(0)
    normal = Preprocessing((0.4,) * 3, (0.3,) * 3)
    return load_teacher(spec, classes=7, size=size, preprocessing=normal, allow_untrained=True,
                        fields=fields)  # fmt: skip


def test_a_teacher_takes_spellings_and_gives_stored_names() -> None:
    teacher = load("resnet8x4", "logits", "last@4", "attention", "stage:2:pre")
    assert teacher.fields == ("logits", "last_4", "attention_32", "attention_16", "attention_8",  # type: ignore[attr-defined]
                              "attention_4", "attention_2", "stage_2_pre")  # fmt: skip
    assert teacher.shapes["last_4"] == (256, 4, 4)  # type: ignore[attr-defined]
    assert teacher.shapes["attention_16"] == (2, 16, 16)  # type: ignore[attr-defined]
    assert teacher.head[0].shape == (7, 256)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="each once"):
        load("resnet8x4", "last@4", "last_4")
    with pytest.raises(UsageError, match="its last map has 8x8"):
        load("resnet8x4", "last@9")


@pytest.mark.slow
def test_a_last_map_that_the_head_does_not_average_is_refused() -> None:
    with pytest.raises((DataError, UsageError), match="last"):
        load("torchvision:convnext_tiny", "logits", "last", size=64)

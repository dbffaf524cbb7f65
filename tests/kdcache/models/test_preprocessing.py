"""Normalisation, channels and size between a view and a model."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from kdcache.preprocessing import PREPROCESSINGS, Preprocessing, slow_precision
from kdcache_stores.errors import DataError, UnknownName, UsageError

CIFAR = PREPROCESSINGS["cifar100"]


def views(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def test_normalises_as_torchvision_does() -> None:
    x = views(4, 3, 32, 32)
    expected = F.normalize(F.to_dtype(x, torch.float32, scale=True), list(CIFAR.mean), [*CIFAR.std])
    torch.testing.assert_close(CIFAR(x), expected, rtol=0, atol=1e-6)


def test_views_are_left_as_they_were() -> None:
    x = views(2, 3, 8, 8)
    before = x.clone()
    CIFAR(x)
    assert torch.equal(x, before)


def test_grey_views_are_repeated_for_a_model_of_three_channels() -> None:
    x = views(2, 1, 8, 8)
    assert torch.equal(CIFAR(x), CIFAR(x.expand(2, 3, 8, 8)))


def test_grey_views_are_resized_and_repeated() -> None:
    pre = Preprocessing(CIFAR.mean, CIFAR.std, size=16)
    x = views(2, 1, 8, 8)
    torch.testing.assert_close(pre(x), pre(x.expand(2, 3, 8, 8)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [8, 48])
def test_resizes_as_torchvision_does(interpolation: str, size: int) -> None:
    pre = Preprocessing((0.0,) * 3, (1.0,) * 3, size, interpolation)
    x = views(2, 3, 24, 20)
    expected = F.resize(
        F.to_dtype(x, torch.float32, scale=True),
        [size, size],
        interpolation=F.InterpolationMode(interpolation),
        antialias=True,
    ).clamp(0, 1)
    torch.testing.assert_close(pre(x), expected)


def test_a_view_of_the_right_size_is_not_resampled() -> None:
    x = views(2, 3, 16, 16)
    assert torch.equal(Preprocessing(CIFAR.mean, CIFAR.std, 16, "bicubic")(x), CIFAR(x))


def test_usable_for_training_after_inference_mode() -> None:
    pre = Preprocessing((0.25,), (0.75,))
    with torch.inference_mode():
        pre(views(1, 1, 4, 4))
    scale = torch.ones(1, requires_grad=True)
    (pre(views(1, 1, 4, 4)) * scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), views(1, 2, 4, 4)],
    ids=["float", "2-dim", "2-channels"],
)
def test_other_views_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"uint8 views \(B, C, H, W\)|takes 3 channel"):
        CIFAR(bad)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 2)), min_size=1, max_size=4),
    st.none() | st.integers(1, 512),
    st.sampled_from(["bilinear", "bicubic", "nearest"]),
    st.booleans(),
)
def test_survives_json(
    stats: list[tuple[float, float]], size: int | None, interpolation: str, antialias: bool
) -> None:
    mean, std = zip(*stats, strict=True)
    pre = Preprocessing(mean, std, size, interpolation, antialias)
    assert Preprocessing.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre


def test_from_dict_names_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="gamma"):
        Preprocessing.from_dict({"mean": [0.5], "std": [0.5], "gamma": 2})
    with pytest.raises(UsageError, match=r"missing.*std"):
        Preprocessing.from_dict({"mean": [0.5]})


@pytest.mark.parametrize(
    ("mean", "std", "size", "interpolation", "error"),
    [
        ((0.5,), (0.5, 0.5), None, "bilinear", UsageError),
        ((), (), None, "bilinear", UsageError),
        ((0.5,), (0.0,), None, "bilinear", UsageError),
        ((0.5,), (0.5,), 0, "bilinear", UsageError),
        ((0.5,), (0.5,), 8, "bilinaer", UnknownName),
    ],
)
def test_nonsense_is_refused(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: int | None,
    interpolation: str,
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        Preprocessing(mean, std, size, interpolation)


def test_measured_statistics() -> None:
    x = views(50, 3, 8, 8)
    pre = Preprocessing.measured(x)
    pixels = x.double() / 255
    assert pre.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert pre.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    assert pre.size is None


def test_constant_images_have_no_statistics() -> None:
    with pytest.raises(DataError, match="constant"):
        Preprocessing.measured(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))


def test_one_image_is_a_batch_of_one() -> None:
    image = views(1, 3, 4, 4)
    assert torch.equal(CIFAR(image[0]), CIFAR(image)[0])


def test_a_precision_that_the_processor_has_not_is_spoken_of() -> None:
    cpu, x86 = torch.device("cpu"), {"architecture": "x86_64", "avx512_bf16": False}
    (text,) = slow_precision(cpu, "bf16", x86)
    assert text.startswith("--precision bf16: this processor has none of avx512_bf16, amx_bf16")
    assert len(slow_precision(cpu, "fp16", x86 | {"amx_bf16": True})) == 1
    for device, precision, has in (
        (cpu, "float32", x86),
        (cpu, "bf16", x86 | {"avx512_bf16": True}),
        (cpu, "bf16", x86 | {"amx_bf16": True}),
        (cpu, "fp16", x86 | {"amx_fp16": True}),
        (cpu, "bf16", {"architecture": "arm64"}),
        (torch.device("cuda"), "bf16", x86),
    ):
        assert slow_precision(device, precision, has) == []
    here = torch.cpu.get_capabilities()
    assert slow_precision(cpu, "bf16") == slow_precision(cpu, "bf16", here)

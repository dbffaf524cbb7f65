"""The same views on a GPU as on the CPU; run by `pytest -m gpu`."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import ResidentDataset, index_keys
from kdcache.philox import key_words, noise, philox4x32
from kdcache.views.plan import ViewPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_words_are_bit_equal_and_normals_nearly() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (4, 1000), dtype=np.int64)
    on_cpu = philox4x32(list(words), (1, 2))
    on_gpu = philox4x32(list(torch.from_numpy(words).cuda()), (1, 2))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_array_equal(a, b.cpu().numpy())
    keys = key_words([hashlib.sha256(bytes([i])).digest() for i in range(50)])
    key, view = torch.from_numpy(keys), torch.arange(50)
    for distribution, tolerance in (("uniform", 0), ("gaussian", 1e-5), ("laplace", 1e-5)):
        cpu = noise(distribution, key, view, 100, 3, "epoch", 1)
        gpu = noise(distribution, key.cuda(), view.cuda(), 100, 3, "epoch", 1)
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("spec", "tolerance"),
    [
        ("none", 0),
        ("pad-crop-flip", 0),
        ("pad-crop-flip:mode=reflect", 0),
        ("exhaustive", 0),
        ("pad-crop-flip+erase+cutout", 0),
        ("pad-crop-flip+cutmix", 0),
        ("pad-crop-flip+mixup", 1),
        ("resized-crop-flip", 1),
        ("rand-augment:ops=1", 1),
        ("color-jitter:hue=0", 2),  # three roundings in a row, each scaled by the next factor
    ],
)
def test_views_on_the_gpu(spec: str, tolerance: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator)
    dataset = ResidentDataset(
        "random",
        "train",
        images=images,
        keys=index_keys("train", range(200), 200),
        labels=np.arange(200) % 7,
        classes=7,
    )
    plan = ViewPlan(dataset, make_augmentation(spec, dataset), seed=2)
    rows, views = np.arange(200), np.arange(200) % 5
    (cpu,), (gpu,) = plan.stream([(rows, views)]), plan.stream([(rows, views)], "cuda")
    assert gpu.images.is_cuda
    assert gpu.labels.is_cuda
    difference = (cpu.images.int() - gpu.images.cpu().int()).abs()
    assert int(difference.max()) <= tolerance

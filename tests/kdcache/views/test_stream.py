"""ViewPlan.stream: the same pixels for every batch size, order, worker count and rank."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from kdcache.augment.specs import from_description, make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.views.batches import make_batches
from kdcache.views.plan import ViewPlan
from kdcache_stores.errors import UsageError

SPECS = [
    "none",
    "pad-crop-flip:flip=true",
    "exhaustive",
    "resized-crop-flip:size=8",
    "center-crop:size=6,resize=8",
    "rand-augment",
    "rand-augment:magnitude=-1,space=fixmatch,ops=3",
    "color-jitter",
    "erase:p=0.8",
    "cutout",
    "mixup:alpha=0.4",
    "pad-crop-flip+cutmix",
    "weak+strong",
    "pad-crop-flip+rand-augment+erase",
]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(60))


def digests(plan: ViewPlan, batches: list, **options: object) -> dict[tuple[int, int], str]:
    """SHA-256 of the pixels (and of the label mix) of every (row, view) that comes out."""
    found = {}
    for batch in plan.stream(batches, **options):  # type: ignore[arg-type]
        for i, (row, view) in enumerate(zip(batch.rows, batch.views, strict=True)):
            extra = (
                b"" if batch.mix is None else b"".join(m[i].numpy().tobytes() for m in batch.mix)
            )
            found[int(row), int(view)] = hashlib.sha256(
                batch.images[i].numpy().tobytes() + extra
            ).hexdigest()
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_pixels_depend_on_key_and_view_alone(digits: Dataset, spec: str) -> None:
    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=5)
    order = np.arange(len(digits))
    views = order % 3
    reference = digests(plan, make_batches(order, views, 64))
    shuffled = np.random.default_rng(0).permutation(len(digits))
    for batch_size in (1, 7, 60):
        assert digests(plan, make_batches(shuffled, views[shuffled], batch_size)) == reference
    ranks = [digests(plan, make_batches(order[i::3], views[i::3], 8)) for i in range(3)]
    assert {**ranks[0], **ranks[1], **ranks[2]} == reference
    other = ViewPlan(digits, make_augmentation(spec, digits), seed=6)
    same = digests(other, make_batches(order, views, 64)) == reference
    assert same == (spec in ("none", "center-crop:size=6,resize=8"))


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_survives_the_store(digits: Dataset, spec: str) -> None:
    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=5)
    again = ViewPlan.from_store(plan.to_store(), digits)
    assert again.to_store().digest == plan.to_store().digest
    assert from_description(plan.augmentation.describe()).describe() == plan.augmentation.describe()
    rows = np.arange(10)
    assert torch.equal(plan.images(rows, 1), again.images(rows, 1))


def test_batches_carry_what_they_say(digits: Dataset) -> None:
    plan = ViewPlan(digits, make_augmentation("none", digits), seed=0)
    (batch,) = plan.stream([(np.array([3, 1, 3]), 4)])
    assert batch.rows.tolist() == [3, 1, 3]
    assert batch.views.tolist() == [4, 4, 4]
    assert batch.labels.tolist() == digits.labels[[3, 1, 3]].tolist()
    assert batch.labels.dtype == torch.int64
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[0], digits.decode(3))
    assert batch.mix is None


def test_batches_need_a_size() -> None:
    batches = make_batches(np.array([5, 2, 9]), 8, batch_size=2)
    assert [(rows.tolist(), views.tolist()) for rows, views in batches] == [
        ([5, 2], [8, 8]),
        ([9], [8]),
    ]
    with pytest.raises(UsageError, match="at least 1, found 0"):
        make_batches(np.arange(3), 0, batch_size=0)


@pytest.mark.parametrize(
    ("rows", "views", "message"),
    [
        ([], 0, "at least one row"),
        ([60], 0, "rows must be in"),
        ([-1], 0, "rows must be in"),
        ([0], -1, "views must be in"),
    ],
)
def test_bad_requests(digits: Dataset, rows: list[int], views: int, message: str) -> None:
    plan = ViewPlan(digits, make_augmentation("none", digits), seed=0)
    with pytest.raises(UsageError, match=message):
        plan.images(rows, views)

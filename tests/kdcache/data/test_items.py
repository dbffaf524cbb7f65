"""Items that are no images: how they are read, proven, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kdcache import CachedDataset, CachedViews, ViewSampler
from kdcache.augment.augmentation import Identity
from kdcache.augment.crops import PadCropFlip
from kdcache.augment.specs import default_augmentation
from kdcache.data.dataset import Dataset, ResidentDataset
from kdcache.data.foreign import MapDataset
from kdcache.data.item import Item
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.models.weights import tensor_digest
from kdcache.models.zoo import build_model
from kdcache.preprocessing import inputs_from_dict, normalisation
from kdcache.teachers.teacher import Teacher
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, MismatchError, Plan, UsageError, open_store
from kdcache_stores.errors import FormatError

LABELS = np.arange(24) % 3
KINDS: dict[str, torch.Tensor] = {
    "features": torch.randn(24, 5, generator=torch.Generator().manual_seed(0)),
    "ids": torch.arange(24 * 4).reshape(24, 4) * 7 % 30,
    "spectrograms": torch.rand(24, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 1,
}


def resident(items: torch.Tensor) -> Dataset:
    return ResidentDataset("own", "train", images=items, keys=[f"k{i}" for i in range(len(items))],
                           labels=LABELS[: len(items)], classes=3)  # fmt: skip


def mapped(source: Any) -> MapDataset:
    keys = [f"k{i}" for i in range(len(source))]
    return MapDataset(
        "own", "train", source=source, keys=keys, labels=LABELS[: len(source)], classes=3
    )


def teacher_of(items: torch.Tensor) -> Teacher:
    torch.manual_seed(0)
    size = items[0].numel()
    first = nn.Linear(size, 3) if items.dtype == torch.float32 else nn.EmbeddingBag(30, 3)
    module = nn.Sequential(nn.Flatten(), first).eval().requires_grad_(False)
    return Teacher("own", module, Item.of(items), 3, tensor_digest(module.state_dict()))


def dumped(dataset: Dataset, items: torch.Tensor, path: Path) -> Path:
    plan = ViewPlan(dataset, Identity(), seed=0)
    dump(plan, [(teacher_of(items), path)], views=1, encoding="float32", batch_size=7)
    return path


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept", "remark"),
    [
        (np.ones((4, 6), np.float64), torch.float32, "float32 items of shape 6"),
        (np.ones((4, 6), np.float16), torch.float32, "float32 items of shape 6"),
        (np.ones((4, 6), bool), torch.float32, "float32 items of shape 6"),
        (np.ones((4, 6), np.int16), torch.int64, "int64 items of shape 6"),
        (np.ones((4, 6), np.uint32), torch.int64, "int64 items of shape 6"),
        (np.full((4, 3, 8, 8), 0.5, np.float32), torch.float32, "If they are pictures"),
        (np.full((4, 5, 8, 8), 7, np.int64), torch.int64, "int64 items of shape 5x8x8"),
        (np.full((4, 8, 8, 3), 7, np.int64), torch.uint8, "taken as uint8 images"),
        (np.full((4, 8, 8, 1), 7, np.float64), torch.uint8, "taken as uint8 images"),
        (np.ones((4, 8, 8), np.uint8), torch.uint8, None),
    ],
)
def test_what_the_rows_of_an_array_are(
    given: np.ndarray, kept: torch.dtype, remark: str | None, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", x_train=given, y_train=np.arange(4) % 2)
    data = load_dataset(f"arrays:{tmp_path / 'a.npz'}")
    assert data.images is not None
    assert data.images.dtype == kept
    assert (data.item is None) == (kept == torch.uint8) == (data.image_shape is not None)
    assert len(data) + len(load_dataset(f"arrays:{tmp_path / 'a.npz'}", "test")) == 4
    assert remark is None or sum(remark in text for text in data.remarks) == 1
    if data.item is not None:
        assert data.images.shape[1:] == data.item.shape == given.shape[1:]
        assert normalisation(data) is data.item
        assert default_augmentation(data) == "none"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones(4, np.float32), "a row of numbers for each sample"),
        (np.ones((4, 0), np.float32), "a row of numbers for each sample"),
        (np.ones((4, 6), np.uint8), "Features are float32, token ids int64"),
        (np.array([[0, 1.0], [2, np.nan], [0, 0], [0, 0]]), r"hold nan at \[1, 1\]"),
        (np.array([[0, 1.0], [2, 1e300], [0, 0], [0, 0]]), r"hold 1e\+300 at \[1, 1\]"),
        (np.full((4, 2), 2**63, np.uint64), "must be below"),
        (np.full((4, 2), "text"), "float32 features or int64 token ids"),
        (np.array([[1], [1, 2], [3], [4]], dtype=object), "rows of differing length"),
    ],
)
def test_rows_that_are_neither(given: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=given, y_train=np.arange(4) % 2)
    with pytest.raises(DataError, match=message):
        load_dataset(f"arrays:{tmp_path / 'a.npz'}")


def test_items_of_an_object_have_one_dtype_and_shape() -> None:
    values = [torch.zeros(4), np.zeros(4), torch.zeros(5), torch.zeros(4, dtype=torch.int32)]
    data = mapped([*values, torch.zeros(1, 8, 8, dtype=torch.uint8), torch.tensor(3.0), "text"])
    assert data.item == Item("float32", (4,))
    assert data.subset([3, 1]).decode(1).dtype == torch.float32
    for row, found in [
        (2, "shape 5"),
        (3, "int64 items"),
        (4, "an image"),
        (5, "found torch"),
        (6, "str"),
    ]:
        with pytest.raises(DataError, match=found):
            data.decode(row)
    assert data.common_shape() is None


# -- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["resident", "mapped"])
def test_items_are_dumped_proven_and_read(kind: str, where: str, tmp_path: Path) -> None:
    items = KINDS[kind]
    dataset = resident(items) if where == "resident" else mapped(list(items))
    with open_store(dumped(dataset, items, tmp_path / "t.zarr")) as store:
        assert store.header.format == (1, 1)
        assert store.plan.item == Item.of(items).to_dict()
        assert replay.check(ViewPlan.from_store(store.plan, dataset), store).status == "identical"
        expected = teacher_of(items)(items)["logits"]
        with CachedViews(dataset, store, 10) as views:
            for images, labels, (teacher,), rows in views.epoch(0):
                assert torch.equal(images, items[rows])
                assert torch.equal(labels, torch.from_numpy(LABELS[rows]))
                torch.testing.assert_close(teacher["logits"], expected[rows])
        data = CachedDataset(dataset, store)
        for batch in DataLoader(data, 10, sampler=ViewSampler(data)):
            assert torch.equal(batch["item"], items[batch["row"]])
            assert batch["item"].dtype == items.dtype
            torch.testing.assert_close(batch["logits"], expected[batch["row"]])


@pytest.mark.parametrize(
    ("kind", "change", "status"),
    [
        ("features", lambda x: x * (1 + 1e-6), "equivalent"),
        ("features", lambda x: x + 1, None),
        ("features", lambda x: x.roll(1, 0), None),
        ("ids", lambda x: x + 1, None),
        ("ids", lambda x: x.float(), None),
        ("ids", lambda x: x.unflatten(1, (2, 2)), None),
        ("spectrograms", lambda x: x * (1 + 1e-6), "equivalent"),
        ("spectrograms", lambda x: x[:, :, :, :3], None),
        ("spectrograms", lambda x: (x * 100).byte(), None),
    ],
)
def test_other_items_are_noticed(
    kind: str, change: Any, status: str | None, tmp_path: Path
) -> None:
    items = KINDS[kind]
    path = dumped(resident(items), items, tmp_path / "t.zarr")
    other = resident(change(items))
    with open_store(path) as store:
        if status is None:
            with pytest.raises(MismatchError, match="that the teacher saw"):
                replay.check(ViewPlan.from_store(store.plan, other), store)
        else:
            result = replay.check(ViewPlan.from_store(store.plan, other), store)
            assert result.status == status
            assert "of their largest value" in str(result)


def test_a_changed_value_among_zeros_is_noticed(tmp_path: Path) -> None:
    """Of a bag of words the few values that a probe keeps are zeros as a rule."""
    items = torch.zeros(24, 1000)
    items[:, 3] = 1
    path = dumped(resident(items), items, tmp_path / "t.zarr")
    items[:, 4] = 1
    with open_store(path) as store, pytest.raises(MismatchError, match="at most 0"):
        replay.check(ViewPlan.from_store(store.plan, resident(items)), store)


def test_items_have_no_augmentation() -> None:
    with pytest.raises(UsageError, match="pad-crop-flip augments images"):
        ViewPlan(resident(KINDS["spectrograms"]), PadCropFlip(padding=1), seed=0)


# -- networks -------------------------------------------------------------------------------------


def test_networks_for_items() -> None:
    item = Item("float32", (2, 16, 20))
    assert build_model("resnet8", 3, item=item)(item.examples(2)).shape == (2, 3)
    for name in ("resnet8", "torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(UsageError, match="name a function of your own"):
            build_model(name, 3, item=Item("int64", (2, 16, 20)))
    assert inputs_from_dict(item.to_dict()) == item
    assert item(item.examples(1)[0]).shape == item.shape
    for other in (item.examples(2).double(), item.examples(2)[:, :1]):
        with pytest.raises(DataError, match="the network takes float32 items"):
            item(other)


def test_random_ids_are_ids_of_the_embedding() -> None:
    item = Item("int64", (100,))
    ids = item.examples(4, nn.Sequential(nn.Embedding(9, 2), nn.Embedding(20, 2)))
    assert ids.min() == 0
    assert ids.max() == 8
    assert not item.examples(4).any()


# -- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [
    {}, {"dtype": "float32"}, {"dtype": "float32", "shape": []}, {"dtype": 3, "shape": [2]},
    {"dtype": "float32", "shape": [0]}, {"dtype": "float32", "shape": [True]},
    {"dtype": "float32", "shape": [2], "more": 1}, [2],
])  # fmt: skip
def test_a_plan_of_no_proper_item_is_refused(item: Any) -> None:
    plan = Plan("own", "train", 3, "0" * 64, {"name": "none"}, 0)
    assert "item" not in plan.to_dict()
    with pytest.raises(FormatError):
        Plan.from_dict(plan.to_dict() | {"item": item}, "plan")
    if isinstance(item, dict):
        with pytest.raises(UsageError, match=r"Plan\.item"):
            replace(plan, item=item)

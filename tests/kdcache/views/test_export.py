"""The parameter table: enough to make every view again without kdcache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.views.export import parameter_batches, write_parameters
from kdcache.views.plan import ViewPlan


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(30))


def test_views_can_be_made_from_the_table_alone(digits: Dataset, tmp_path: Path) -> None:
    spec = "pad-crop-flip:padding=2,flip=true+erase:p=0.7,fill=9+cutmix"
    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=2)
    path = tmp_path / "views.parquet"
    assert write_parameters(plan, range(3), path) == 90
    assert not path.with_name("views.parquet.part").exists()
    rows = pq.read_table(path).to_pylist()
    table = {(row["view"], row["row"]): row for row in rows}
    assert digits.images is not None

    def base(row: dict) -> torch.Tensor:
        image = F.pad(digits.decode(row["row"]), [2])
        top, left = row["pad-crop-flip.top"], row["pad-crop-flip.left"]
        image = image[:, top : top + 8, left : left + 8]
        image = image.flip(2) if row["pad-crop-flip.flip"] else image.clone()
        box = (row[f"erase.{name}"] for name in ("top", "left", "height", "width"))
        top, left, height, width = box
        image[:, top : top + height, left : left + width] = 9
        return image

    for (view, index), row in table.items():
        expected = base(row)
        partner = table[view, row["partner"]]
        assert partner["key"] == row["partner_key"]
        box = (row[f"box_{name}"] for name in ("top", "left", "height", "width"))
        top, left, height, width = box
        inside = (slice(None), slice(top, top + height), slice(left, left + width))
        expected[inside] = base(partner)[inside]
        assert torch.equal(plan.images([index], view)[0], expected)
        assert row["lambda"] == pytest.approx(1 - height * width / 64)
    plan_of_table = json.loads(pq.read_schema(path).metadata[b"kdcache.plan"])
    assert plan_of_table["digest"] == plan.to_store().digest
    assert plan_of_table["augmentation"] == plan.augmentation.describe()


def table_of(plan: ViewPlan, views: Iterable[int]) -> pa.Table:
    return pa.Table.from_batches(parameter_batches(plan, views))


def test_unused_parameters_are_null(digits: Dataset) -> None:
    plan = ViewPlan(digits, make_augmentation("weak+strong", digits), seed=2)
    table = table_of(plan, [0, 1])
    weak, strong = table.slice(0, 30).to_pydict(), table.slice(30, 30).to_pydict()
    assert weak["strong"] == [False] * 30
    assert None not in weak["weak.top"]
    assert weak["strong.rand-augment.op_0"] == [None] * 30
    assert strong["weak.top"] == [None] * 30
    assert None not in strong["strong.rand-augment.op_0"]
    assert table["key"].to_pylist()[:2] == digits.keys[:2]


def test_files_are_measured_by_their_headers(folder: Path) -> None:
    dataset = load_dataset(f"folder:{folder}")
    plan = ViewPlan(dataset, make_augmentation("resized-crop-flip:size=16", dataset), seed=2)
    table = table_of(plan, [5]).to_pylist()
    for row in table:
        image = dataset.decode(row["row"])
        box = (row[name] for name in ("top", "left", "height", "width"))
        expected = F.resized_crop(image, *box, [16, 16], antialias=True)
        expected = expected.flip(2) if row["flip"] else expected
        assert torch.equal(plan.images([row["row"]], 5)[0], expected)


def test_the_table_comes_in_pieces(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ViewPlan(digits, make_augmentation("exhaustive", digits), seed=2)
    whole = table_of(plan, range(9))
    monkeypatch.setattr("kdcache.views.export._ROWS", 7)
    assert table_of(plan, range(9)).equals(whole)
    assert np.array_equal(np.unique(whole["view"]), np.arange(9))

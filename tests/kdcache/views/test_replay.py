"""The replay proof: identical, equivalent, or refused with the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdcache.augment.crops import ResizedCropFlip
from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.folder import FolderDataset
from kdcache.data.loading import load_dataset
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import FieldSpec, Store, StoredTeacher, StoreWriter, open_store
from kdcache_stores.errors import MismatchError, StoreError

VIEWS = 3


def dump(plan: ViewPlan, path: Path, probed: bool = True) -> Store:
    """A sealed store of the plan: its probes are real, its logits are 0."""
    store_plan = plan.to_store()
    classes = store_plan.classes
    with StoreWriter(
        path,
        plan=store_plan,
        teacher=StoredTeacher("none", "00" * 32, {}, "float32", classes),
        samples=plan.samples,
        views=VIEWS,
        fields={"logits": FieldSpec(shape=(classes,), encoding="float32")},
        config={},
        provenance={"versions": replay.versions()},
    ) as writer:
        for shard in writer.pending():
            rows = replay.probe_rows(plan, shard.view)
            rows = rows[(rows >= shard.start) & (rows < shard.stop)]
            probes = []
            for row in rows if probed else []:
                image = plan.images([row], shard.view)
                probes += replay.measure([row], shard.view, image)
            logits = np.zeros((shard.stop - shard.start, classes), dtype=np.float32)
            writer.write(shard, {"logits": logits}, probes=probes)
        writer.seal()
    return open_store(path)


@pytest.fixture
def digits() -> Dataset:
    return load_dataset("digits").subset(range(100))


@pytest.fixture
def plan(folder: Path) -> ViewPlan:
    dataset = load_dataset(f"folder:{folder}")
    return ViewPlan(dataset, make_augmentation("resized-crop-flip:size=32", dataset), seed=4)


def again(plan: ViewPlan, **changes: Any) -> ViewPlan:
    """The plan, put together anew, with changes."""
    dataset = changes.get("dataset", plan.dataset)
    return ViewPlan(
        dataset, changes.get("augmentation", plan.augmentation), changes.get("seed", plan.seed)
    )


@pytest.mark.parametrize("spec", ["exhaustive", "pad-crop-flip+mixup", "weak+strong"])
def test_identical_in_memory(digits: Dataset, spec: str, tmp_path: Path) -> None:
    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=4)
    with dump(plan, tmp_path / "store") as store:
        result = replay.check(ViewPlan.from_store(store.plan, digits), store)
    assert result.status == "identical"
    assert result.checked == result.identical == 24
    assert "identical" in str(result)


@pytest.mark.parametrize("spec", ["rand-augment:magnitude=-1", "color-jitter", "weak+strong"])
def test_probes_of_single_images_are_identical_in_batches(
    digits: Dataset, spec: str, tmp_path: Path
) -> None:
    """A store that was dumped image by image, as from files, replays from memory."""
    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=4)
    one_by_one = ViewPlan(digits, plan.augmentation, seed=4)
    one_by_one.stream = lambda batches, *_: (
        one_by_one._render(*one_by_one._pairs(*b)) for b in batches
    )  # type: ignore[method-assign]
    with dump(one_by_one, tmp_path / "store") as store:
        assert replay.check(plan, store).status == "identical"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_resized_at_once_are_equivalent(digits: Dataset, mode: str, tmp_path: Path) -> None:
    """What a GPU makes of images in memory, against a store that was probed one by one."""
    spec = f"resized-crop-flip:size=24,interpolation={mode}"

    class AtOnce(ResizedCropFlip):
        apply = ResizedCropFlip.apply_at_once

    plan = ViewPlan(digits, make_augmentation(spec, digits), seed=4)
    with dump(plan, tmp_path / "store") as store:
        at_once = AtOnce(24, flip=digits.flip, interpolation=mode)
        result = replay.check(again(plan, augmentation=at_once), store)
    assert result.max_difference <= 1


def test_identical_from_files(plan: ViewPlan, tmp_path: Path) -> None:
    with dump(plan, tmp_path / "store") as store:
        assert replay.check(again(plan), store).status == "identical"


def test_probes_are_spread(digits: Dataset) -> None:
    plan = ViewPlan(digits, make_augmentation("none", digits), seed=4)
    found = [replay.probe_rows(plan, view) for view in range(4)]
    for rows in found:
        assert len(set(rows.tolist())) == 8
        assert (np.diff(rows) > 0).all()
        assert set(np.diff(rows).tolist()) <= {12, 13, 88, 87}
    assert len({tuple(rows) for rows in found}) > 1
    few = ViewPlan(digits.subset(range(3)), plan.augmentation, seed=4)
    assert replay.probe_rows(few, 0).tolist() == [0, 1, 2]


def refused(plan: ViewPlan, store: Store) -> str:
    with pytest.raises(MismatchError) as caught:
        replay.check(plan, store)
    return str(caught.value)


def test_another_seed_is_refused(plan: ViewPlan, tmp_path: Path) -> None:
    with dump(plan, tmp_path / "store") as store:
        message = refused(again(plan, seed=5), store)
    assert "seed: 4 then, 5 now" in message


def test_a_changed_crop_is_refused(plan: ViewPlan, tmp_path: Path) -> None:
    other = make_augmentation("resized-crop-flip:size=32,scale=0.1/1", plan.dataset)
    with dump(plan, tmp_path / "store") as store:
        message = refused(again(plan, augmentation=other), store)
    assert "augmentation: " in message
    assert "'scale': [0.1, 1.0]" in message


def test_another_size_is_refused(plan: ViewPlan, tmp_path: Path) -> None:
    other = make_augmentation("resized-crop-flip:size=24", plan.dataset)
    with dump(plan, tmp_path / "store") as store:
        message = refused(again(plan, augmentation=other), store)
    assert "'size': 24" in message


Resize = Callable[[torch.Tensor, list[int]], torch.Tensor]


def resize_by(monkeypatch: pytest.MonkeyPatch, resize: Resize) -> None:
    """Make the resize another one, as a change of the library would, without a change of the
    plan.
    """

    def apply_one(self: ResizedCropFlip, image: torch.Tensor, parameters: Any) -> torch.Tensor:
        box = [int(parameters[name]) for name in ("top", "left", "height", "width")]
        result = resize(F.crop(image, *box), [self.size, self.size])
        return F.horizontal_flip(result) if parameters["flip"] else result

    monkeypatch.setattr(ResizedCropFlip, "apply_one", apply_one)


@pytest.mark.parametrize(
    ("mode", "antialias"),
    [
        (InterpolationMode.BICUBIC, True),
        (InterpolationMode.NEAREST, True),
        (InterpolationMode.BILINEAR, False),
    ],
)
def test_a_changed_resize_is_refused(
    plan: ViewPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: InterpolationMode,
    antialias: bool,
) -> None:
    with dump(plan, tmp_path / "store") as store:
        resize_by(monkeypatch, lambda image, size: F.resize(image, size, mode, antialias=antialias))
        message = refused(plan, store)
    assert "dataset: " in message
    assert "tolerance 0.5 and 4" in message


def test_another_rounding_is_equivalent_and_said(
    plan: ViewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resizing in float32, as devices without the 8-bit path do, differs by 1 here and there."""
    with dump(plan, tmp_path / "store") as store:
        resize_by(
            monkeypatch,
            lambda image, size: F.resize(image.float(), size, antialias=True).round().byte(),
        )
        monkeypatch.setattr(torch, "__version__", "99.0")
        result = replay.check(plan, store)
    assert result.status == "equivalent"
    assert result.identical < result.checked
    assert result.max_difference == 1
    assert 0 < result.mean_difference < 0.5
    assert any(change.startswith("torch: ") and "99.0" in change for change in result.changes)
    assert "equivalent; changed since: torch" in str(result)


def test_a_changed_library_is_named(
    plan: ViewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dump(plan, tmp_path / "store") as store:
        resize_by(monkeypatch, lambda image, size: F.resize(image, size, InterpolationMode.NEAREST))
        monkeypatch.setattr(replay.torchvision, "__version__", "99.0")
        assert "version: torchvision: " in refused(plan, store)


@pytest.mark.parametrize("quality", [98, 90, 75])
def test_reencoded_files_are_refused(plan: ViewPlan, tmp_path: Path, quality: int) -> None:
    with dump(plan, tmp_path / "store") as store:
        assert isinstance(plan.dataset, FolderDataset)
        for path in plan.dataset.folder.rglob("*.jpg"):
            with Image.open(path) as image:
                image.convert("RGB").save(path, quality=quality)
        message = refused(again(plan), store)
    assert "re-encoded" in message


def test_one_changed_file_is_named(plan: ViewPlan, tmp_path: Path) -> None:
    with dump(plan, tmp_path / "store") as store:
        row = int(store.probes[0].row)
        assert isinstance(plan.dataset, FolderDataset)
        key = plan.dataset.keys[row]
        Image.new("RGB", (60, 60), (9, 200, 30)).save(plan.dataset.folder / key)
        message = refused(again(plan), store)
    assert f"these images were changed, re-encoded or replaced: ['{key}'" in message


def test_a_shifted_dataset_is_refused(digits: Dataset, tmp_path: Path) -> None:
    """The same keys and labels, but every image belongs to its neighbour."""
    plan = ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=4)
    with dump(plan, tmp_path / "store") as store:
        shifted = digits.subset(range(len(digits)))
        assert digits.images is not None
        shifted.images = digits.images.roll(1, 0)
        other = ViewPlan.from_store(store.plan, shifted)
        assert "shifted rows" in refused(other, store)


def test_a_store_without_probes(digits: Dataset, tmp_path: Path) -> None:
    plan = ViewPlan(digits, make_augmentation("none", digits), seed=4)
    with (
        dump(plan, tmp_path / "store", probed=False) as store,
        pytest.raises(StoreError, match="holds no probes"),
    ):
        replay.check(plan, store)


def test_a_part_of_the_dataset_checks_its_part(plan: ViewPlan, tmp_path: Path) -> None:
    with dump(plan, tmp_path / "store") as store:
        some = plan.dataset.subset(range(5))
        part = ViewPlan.from_store(store.plan, some, samples=plan.samples, partial=True)
        result = replay.check(part, store)
    assert result.status == "identical"
    assert result.checked == sum(probe.row < 5 for probe in store.probes)

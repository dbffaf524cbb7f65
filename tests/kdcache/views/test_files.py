"""Views of image files: workers, start methods, several views per decode, bad files, real
photographs.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from kdcache.augment.custom import Custom
from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset, without_bad_images
from kdcache.data.loading import load_dataset
from kdcache.views.batches import make_batches
from kdcache.views.cached import CachedViews
from kdcache.views.plan import ViewPlan
from kdcache_stores import Samples
from kdcache_stores.errors import DataError, MismatchError, UsageError

SPEC = "resized-crop-flip:size=24"


def plan_of(folder: Path, spec: str = SPEC, seed: int = 1) -> ViewPlan:
    dataset = load_dataset(f"folder:{folder}")
    return ViewPlan(dataset, make_augmentation(spec, dataset), seed)


def digests(plan: ViewPlan, batches: list, **options: object) -> dict[tuple[str, int], str]:
    found = {}
    for batch in plan.stream(batches, **options):  # type: ignore[arg-type]
        for row, view, image in zip(batch.rows, batch.views, batch.images, strict=True):
            digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
            found[plan.samples.keys[row], int(view)] = digest
    return found


@pytest.mark.parametrize("spec", [SPEC, "resized-crop-flip:size=24+erase:p=1+cutmix"])
def test_workers_batch_sizes_orders_ranks_and_resumption(folder: Path, spec: str) -> None:
    plan = plan_of(folder, spec)
    order = np.arange(len(plan))
    reference = digests(plan, make_batches(order, 3, 5))
    shuffled = np.random.default_rng(0).permutation(order)
    for workers in (0, 1, 2):
        assert digests(plan, make_batches(shuffled, 3, 4), workers=workers) == reference
    ranks = [digests(plan, make_batches(order[i::2], 3, 3)) for i in range(2)]
    assert {**ranks[0], **ranks[1]} == reference
    rest = digests(plan_of(folder, spec), make_batches(order, 3, 5)[1:])
    assert rest == {key: reference[key] for key in rest}
    assert len(set(reference.values())) == len(plan)
    assert not set(
        digests(plan_of(folder, spec, seed=2), make_batches(order, 3, 5)).values()
    ) & set(reference.values())


def test_a_plan_can_be_pickled_for_workers_that_do_not_fork(folder: Path) -> None:
    plan = plan_of(folder)
    batches = make_batches(np.arange(6), 0, 3)
    assert digests(pickle.loads(pickle.dumps(plan)), batches) == digests(plan, batches)


def test_several_views_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(folder)
    decoded = []
    decode = plan.dataset.decode
    monkeypatch.setattr(plan.dataset, "decode", lambda row: decoded.append(row) or decode(row))
    with CachedViews(plan.dataset, [], 8, plan=plan, views_per_decode=4) as views:
        several, shown = {}, []
        for batch in views.epoch(1):
            shown.append(batch.rows.tolist())
            for row, view, image in zip(batch.rows, batch.views, batch.images, strict=True):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                several[plan.samples.keys[row], int(view)] = digest
    assert [len(set(rows)) for rows in shown] == [2] * 6
    assert sorted(decoded) == list(range(12))
    decoded.clear()
    single = {}
    for view in range(4, 8):
        single |= digests(plan, make_batches(np.arange(12), view, 8))
    assert several == single


def test_a_user_pipeline_runs_in_workers(folder: Path) -> None:
    dataset = load_dataset(f"folder:{folder}")
    plan = ViewPlan(dataset, Custom("tests:crop", _Jitter()), seed=1)
    batches = make_batches(np.arange(5), 0, 1)
    assert digests(plan, batches, workers=2) == digests(plan, batches)
    resident = load_dataset("digits").subset(range(20))
    plan = ViewPlan(resident, Custom("tests:crop", _Jitter()), seed=1)
    batches = make_batches(np.arange(20), 0, 6)
    assert digests(plan, batches, workers=2) == digests(plan, batches)


class _Jitter:
    """A pipeline that draws from torch's generator."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.randint(0, 2, image.shape, dtype=torch.uint8)


class _Slow(_Jitter):
    """Draws twice, and lets other threads run between."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        first = super().__call__(image)
        time.sleep(0.001)
        return super().__call__(first)


def test_threads_do_not_share_the_draws_of_a_user_pipeline() -> None:
    resident = load_dataset("digits").subset(range(20))
    plan = ViewPlan(resident, Custom("tests:slow", _Slow()), seed=1)
    batches = [make_batches(np.arange(20), view, 6) for view in range(4)]
    alone = [digests(plan, one) for one in batches]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda one: digests(plan, one), batches)) == alone


def test_images_of_several_sizes_need_a_size(folder: Path) -> None:
    plan = plan_of(folder, "none")
    with pytest.raises(DataError, match=r"differ in shape.*Use resized-crop-flip"):
        plan.images(np.arange(6), 0)
    assert plan.images([0], 0).shape[0] == 1


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    broken = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"this is no image",
        "header": b"\xff\xd8\xff\xe0" + b"\x00" * 200,
    }[how]
    path.write_bytes(broken)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated"),
        ("empty", r"empty \(0 bytes\)"),
        ("text", "no image that Pillow can read"),
        ("header", "cannot be decoded|no image"),
    ],
)
def test_a_bad_file_fails_with_its_key(folder: Path, how: str, message: str, workers: int) -> None:
    damage(folder / "train" / "bee" / "2.jpg", how)
    plan = plan_of(folder)
    with pytest.raises(
        DataError, match=rf"image 'bee/2.jpg' of folder:images \(row 8\).*{message}"
    ):
        digests(plan, make_batches(np.arange(len(plan)), 0, 4), workers=workers)


def test_a_file_that_vanished(folder: Path) -> None:
    plan = plan_of(folder)
    (folder / "train" / "ant" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"'ant/0.jpg'.*there is no such file"):
        plan.images([0], 0)


def test_bad_files_can_be_skipped_in_both_stages(folder: Path) -> None:
    whole = digests(plan_of(folder), make_batches(np.arange(12), 0, 4))
    damage(folder / "train" / "ant" / "1.jpg", "truncated")
    damage(folder / "train" / "bee" / "5.jpg", "empty")
    teacher = load_dataset(f"folder:{folder}", skip_bad=True, workers=1)
    assert list(teacher.skipped) == ["ant/1.jpg", "bee/5.jpg"]
    plan = ViewPlan(teacher, make_augmentation(SPEC, teacher), 1)
    store = plan.to_store()
    assert store.notes["skipped"] == teacher.skipped
    # The student need not skip anything itself: it looks up the plan's samples by key.
    student = load_dataset(f"folder:{folder}")
    again = ViewPlan.from_store(store, student, samples=plan.samples)
    assert again.dataset_rows.tolist() != list(range(len(again)))
    found = digests(again, make_batches(np.arange(10), 0, 4))
    assert found == {key: whole[key] for key in whole if key[0] not in teacher.skipped}
    # A file that is bad only here is missing here, and that is said.
    damage(folder / "train" / "ant" / "2.jpg", "empty")
    student = without_bad_images(load_dataset(f"folder:{folder}"))
    with pytest.raises(
        MismatchError, match=r"1 of the plan's 10 samples are missing.*'ant/2.jpg'.*1 of"
    ):
        ViewPlan.from_store(store, student, samples=plan.samples)


def test_nothing_but_bad_files(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        damage(path, "empty")
    with pytest.raises(DataError, match=r"no image of folder:images \(train\) can be decoded"):
        load_dataset(f"folder:{folder}", skip_bad=True)


def test_kinds_of_files(tmp_path: Path) -> None:
    """Grey, CMYK, transparent, palette and turned images all become upright RGB."""
    for name in ("val", "train/a", "train/b"):
        (tmp_path / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    colour.save(tmp_path / "train" / "a" / "rgb.png")
    colour.convert("L").save(tmp_path / "train" / "a" / "grey.png")
    colour.convert("CMYK").save(tmp_path / "train" / "a" / "cmyk.jpg", quality=95)
    rgba = colour.convert("RGBA")
    rgba.putalpha(40)
    rgba.save(tmp_path / "train" / "b" / "rgba.png")
    colour.quantize(200).save(tmp_path / "train" / "b" / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    colour.save(tmp_path / "train" / "b" / "turned.png", exif=exif)
    dataset = load_dataset(f"folder:{tmp_path}")
    images = {key: dataset.decode(row) for row, key in enumerate(dataset.keys)}
    plain = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(images["a/rgb.png"], plain)
    assert torch.equal(images["b/rgba.png"], plain)
    assert torch.equal(images["b/turned.png"], torch.rot90(plain, -1, (1, 2)))
    grey = images["a/grey.png"]
    assert torch.equal(grey[0], grey[1])
    assert grey.shape == images["a/cmyk.jpg"].shape == images["b/palette.png"].shape == (3, 20, 30)
    for row, key in enumerate(dataset.keys):
        assert dataset.size(row) == tuple(images[key].shape[1:])


def test_the_plan_finds_its_samples_in_another_folder(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder)
    rows = make_batches(np.arange(12), 0, 12)
    reference = digests(plan, rows)
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    shutil.copy(more / "train" / "ant" / "0.jpg", more / "train" / "ant" / "00 another.jpg")
    dataset = load_dataset(f"folder:{more}")
    with pytest.raises(MismatchError, match="other samples, another order or other labels"):
        ViewPlan.from_store(plan.to_store(), dataset)
    again = ViewPlan.from_store(plan.to_store(), dataset, samples=plan.samples)
    assert again.dataset_rows.tolist() != list(range(len(again)))
    assert again.to_store().digest == plan.to_store().digest
    assert digests(again, rows) == reference
    hashed = ViewPlan.from_store(plan.to_store(), dataset, samples=plan.samples.hash_keys())
    assert list(digests(hashed, rows).values()) == list(reference.values())
    os.remove(more / "train" / "bee" / "3.jpg")
    lacking = load_dataset(f"folder:{more}")
    with pytest.raises(MismatchError, match=r"1 of the plan's 12 samples are missing.*bee/3.jpg"):
        ViewPlan.from_store(plan.to_store(), lacking, samples=plan.samples)
    part = ViewPlan.from_store(plan.to_store(), lacking, samples=plan.samples, partial=True)
    here = [row for row in range(12) if part.has(row)]
    assert len(here) == 11
    assert digests(part, make_batches(np.array(here), 0, 12)).items() <= reference.items()
    with pytest.raises(
        MismatchError, match=r"not in this part of folder:more, the first: \['bee/3"
    ):
        part.images([9], 0)


def test_a_partner_that_is_not_there_is_refused(folder: Path) -> None:
    plan = plan_of(folder, SPEC + "+mixup")
    some = plan.dataset.subset(range(4))
    part = ViewPlan(some, plan.augmentation, 1, samples=plan.samples, partial=True)
    outside = [view for view in range(9) if plan.parameters([0], view)[0]["partner"][0] >= 4]
    inside = [view for view in range(9) if view not in outside]
    for view in inside[:1]:
        assert torch.equal(part.images([0], view), plan.images([0], view))
    with pytest.raises(MismatchError, match="samples or mix partners"):
        part.images([0], outside[0])


def test_other_labels_are_refused(folder: Path) -> None:
    plan = plan_of(folder)
    labels = plan.samples.labels.copy()
    labels[[2, 7]] = labels[[7, 2]]
    with pytest.raises(
        MismatchError, match=r"2 samples.*another label.*'ant/2.jpg' with 0 here and 1"
    ):
        ViewPlan(plan.dataset, plan.augmentation, 1, samples=Samples(plan.samples.keys, labels))


def test_the_augmentation_must_be_the_stores(folder: Path) -> None:
    plan = plan_of(folder)
    other = make_augmentation("resized-crop-flip:size=20", plan.dataset)
    with pytest.raises(MismatchError, match="the store was made with the augmentation"):
        ViewPlan.from_store(plan.to_store(), plan.dataset, augmentation=other)
    mine = Custom("tests:crop", _Jitter())
    custom = ViewPlan(plan.dataset, mine, 1)
    with pytest.raises(UsageError, match="name the augmentation yourself"):
        ViewPlan.from_store(custom.to_store(), plan.dataset)
    again = ViewPlan.from_store(custom.to_store(), plan.dataset, augmentation=mine)
    assert torch.equal(again.images([1], 0), custom.images([1], 0))


def test_a_dataset_smaller_than_a_batch(folder: Path) -> None:
    plan = plan_of(folder)
    (batch,) = plan.stream(make_batches(np.arange(len(plan)), 0, 1000))
    assert len(batch) == len(plan)


def test_photographs(real_data: Path) -> None:
    """On real JPEG files, some of them grey: what torchvision makes of the drawn parameters."""
    dataset: Dataset = load_dataset(f"folder:{real_data / 'imagenette-small'}", "test")
    assert (len(dataset), dataset.classes) == (500, 10)
    plan = ViewPlan(dataset, make_augmentation("resized-crop-flip", dataset), seed=3)
    rows = np.arange(0, 500, 25)
    (batch,) = plan.stream([(rows, 7)], workers=1)
    drawn, _ = plan.parameters(rows, 7)
    for i, row in enumerate(rows):
        with Image.open(dataset.folder / dataset.keys[row]) as file:  # type: ignore[attr-defined]
            image = F.pil_to_tensor(file.convert("RGB"))
        box = [int(drawn[name][i]) for name in ("top", "left", "height", "width")]
        expected = F.resized_crop(image, *box, [224, 224], antialias=True)
        if drawn["flip"][i]:
            expected = F.horizontal_flip(expected)
        assert torch.equal(batch.images[i], expected)


class _Process:
    """A pipeline that writes the number of its process into the image."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.full_like(image, os.getpid() % 251)


def test_processes_stay_from_stream_to_stream() -> None:
    """And end with the plan; a stream that is left early does not disturb the next."""
    resident = load_dataset("digits").subset(range(20))
    plan = ViewPlan(resident, Custom("tests:process", _Process()), seed=1)
    batches = [*make_batches(np.arange(20), 0, 2)]

    def made(plan: ViewPlan, count: int) -> tuple[list[int], list[list[int]]]:
        taken = list(itertools.islice(plan.stream(batches, workers=2), count))
        return [int(batch.images[0, 0, 0, 0]) for batch in taken], [list(b.rows) for b in taken]

    first, _ = made(plan, 10)
    assert len(set(first)) == 2
    assert made(plan, 3)[1] == [[0, 1], [2, 3], [4, 5]]
    again, rows = made(plan, 10)
    assert set(again) == set(first)
    assert rows == [list(rows) for rows, _ in batches]
    processes = multiprocessing.active_children()
    del plan
    assert len(multiprocessing.active_children()) == len(processes) - 2


def test_streams_side_by_side_with_processes() -> None:
    resident = load_dataset("digits").subset(range(20))
    plan = ViewPlan(resident, Custom("tests:crop", _Jitter()), seed=1)
    batches = [make_batches(np.arange(20), view, 6) for view in range(2)]
    alone = [digests(plan, one) for one in batches]
    streams = [plan.stream(one, workers=1) for one in batches]
    pairs = list(zip(*streams, strict=True))
    for number, found in enumerate(alone):
        images = torch.cat([pair[number].images for pair in pairs])
        live = torch.cat([batch.images for batch in plan.stream(batches[number])])
        assert torch.equal(images, live)
        assert len(found) == len(images)


def test_a_stream_takes_its_batches_as_it_goes() -> None:
    """A dump's list of batches may be longer than the memory."""
    resident = load_dataset("digits").subset(range(20))
    plan = ViewPlan(resident, Custom("tests:crop", _Jitter()), seed=1)
    taken = 0

    def endless() -> Iterator[tuple[np.ndarray, int]]:
        nonlocal taken
        while True:
            taken += 1
            yield np.arange(4), taken

    # Images in memory are drawn for some thousands of views at a time.
    for workers, most in ((0, 8192 // 4), (1, 10)):
        taken = 0
        stream = plan.stream(endless(), workers=workers)
        assert [int(next(stream).views[0]) for _ in range(3)] == [1, 2, 3]
        assert taken <= most


def test_a_stream_leaves_the_random_state_alone(folder: Path) -> None:
    plan = plan_of(folder)
    state = torch.get_rng_state()
    digests(plan, make_batches(np.arange(6), 0, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert pickle.loads(pickle.dumps(plan)).images([0], 0).equal(plan.images([0], 0))

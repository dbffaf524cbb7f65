"""A user's own modules, pipelines and folders, as a newcomer brings them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.runs import read_config
from kdcache_stores import open_store
from tests.conftest import Result, Trained

Run = Callable[..., Result]

PARTS = """
import torch
from torchvision.transforms import v2

def crop():
    return v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomErasing(0.5)])

def other():
    own = torch.Generator()
    return lambda image: image + torch.randint(0, 9, image.shape, generator=own).byte()

def sizes():
    return lambda image: image[:, : int(torch.randint(2, 8, ()))]

def broken():
    return lambda image: 1 / 0

def needs(something):
    return lambda image: image
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that lies in the working directory alone."""
    name = f"parts_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    return name


@pytest.fixture
def dump(kdcache: Run, trained: Trained) -> Run:
    def run(*args: object) -> Result:
        return kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher",
                       trained.teacher, *args)  # fmt: skip

    return run


@pytest.mark.slow
def test_a_pipeline_of_ones_own_in_both_stages(parts: str, dump: Run, kdcache: Run) -> None:
    done = dump("--augment", f"{parts}:crop", "--views", 2, "--out", "s.zarr")
    assert done.code == 0, done.err
    student = ["train-student", "--dataset", "digits", "--store", "s.zarr", "--student", "resnet8",
               "--method", "kd", "--epochs", 1, "--train-samples", 64, "--subset", "--threads", 1,
               "--device", "cpu", "--out", "run"]  # fmt: skip
    refused = kdcache(*student)
    assert refused.code == 2
    assert f"--augment {parts}:crop" in refused.err
    done = kdcache(*student, "--augment", f"{parts}:crop")
    assert done.code == 0, done.err
    other = kdcache(*student, "--augment", f"{parts}:sizes")
    assert other.code == 1
    assert "the store was made with the augmentation" in other.err
    built_in = kdcache(*student, "--augment", "none")
    assert built_in.code == 2
    assert "other views a store brings itself" in built_in.err


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("other", "gives another image for the same sample and view each time"),
        ("sizes", "images of a batch must end up in one size"),
        ("broken", "raised ZeroDivisionError for an image uint8 (1, 8, 8): division by zero"),
        ("needs", "called without arguments, raised TypeError"),
        ("nothing", "has no attribute 'nothing'"),
    ],
)
def test_pipelines_that_cannot_be_used(parts: str, dump: Run, function: str, message: str) -> None:
    result = dump("--augment", f"{parts}:{function}", "--views", 2, "--out", "s.zarr")
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err
    assert not Path("s.zarr").exists()


def test_what_is_refused_before_a_teacher_is_loaded(
    dump: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("kdcache.dumping.requests.load_teacher", never)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    odd = dump("--augment", "weak+strong", "--views", 3, "--out", tmp_path / "s")
    foreign = dump("--views", 2, "--out", tmp_path / "mine")
    bucket = dump("--views", 2, "--out", "s3://team/s.zarr")
    assert [result.code for result in (odd, foreign, bucket)] == [2, 1, 2]
    assert "a weak one without its strong one: --views 4" in odd.err
    assert "holds notes.txt and is no kdcache store" in foreign.err
    assert "copy it (a store by `kdcache push`)" in bucket.err


def test_an_augmentation_without_chance_needs_one_view(dump: Run, tmp_path: Path) -> None:
    done = dump("--augment", "none", "--out", tmp_path / "s")
    assert done.code == 0
    assert "next: kdcache train-student" in done.out
    assert "next: " not in dump("--augment", "none", "--split", "test", "--out", tmp_path / "t").out
    with open_store(tmp_path / "s") as store:
        assert store.n_views == 1
    for augmentation in ("none", "center-crop:size=8,resize=8"):
        refused = dump("--augment", augmentation, "--views", 4, "--out", tmp_path / "four")
        assert refused.code == 2
        assert "the same image in every view, and 4 views would be stored: --views 1" in refused.err
    grown = dump("--plan-from", tmp_path / "s", "--views", 2, "--out", tmp_path / "grown")
    assert grown.code == 2
    assert not (tmp_path / "four").exists()


def test_a_folder_with_nothing_but_train(tmp_path: Path, kdcache: Run) -> None:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(150 * number, 150 * number + 100, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    (tmp_path / "data" / "train" / "dark" / "bad.png").touch()
    common = ["--dataset", f"folder:{tmp_path / 'data'}", "--device", "cpu"]
    small = ["--epochs", 2, "--batch-size", 8, "--lr", 0.1, "--skip-bad", "--threads", 1]
    done = kdcache("train-teacher", *common, *small, "--model", "resnet8", "--augment",
                   "resized-crop-flip:size=32", "--out", tmp_path / "t")  # fmt: skip
    assert done.code == 0, done.err
    assert "4 of its 41 samples" in done.err
    assert "1 of 37 images" in done.err
    assert "dark/bad.png" in done.err
    done = kdcache("dump-teacher", *common, "--skip-bad", "--teacher", tmp_path / "t", "--augment",
                   "resized-crop-flip:size=32", "--views", 2, "--out", tmp_path / "s")  # fmt: skip
    assert done.code == 0, done.err
    assert "4 of its 41 samples" in done.err
    assert "dark/bad.png" in done.err
    student = ["train-student", *common, "--store", tmp_path / "s", "--student", "resnet8",
               "--method", "kd", "--out", tmp_path / "k"]  # fmt: skip
    refused = kdcache(*student, *[option for option in small if option != "--skip-bad"])
    assert refused.code == 1
    assert "could not decode: --skip-bad does so here" in refused.err
    assert kdcache(*student, *small).code == 0


@pytest.mark.parametrize("augment", ["pad-crop-flip", "resized-crop-flip"])
def test_images_that_are_not_square_are_tested_as_trained(
    tmp_path: Path, kdcache: Run, augment: str
) -> None:
    """A bright bar in the outer columns, which a square crop of the middle would cut away."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (120, 12, 36), dtype=np.uint8)
    labels = np.arange(120) % 2
    for image, label in zip(images, labels, strict=True):
        image[:, 3:9] += np.uint8(150 * label)
    np.savez(tmp_path / "wide.npz", x_train=images, y_train=labels)
    name = f"arrays:{tmp_path / 'wide.npz'}"
    done = kdcache("train-teacher", "--dataset", name, "--model", "resnet8", "--epochs", 6,
                   "--batch-size", 16, "--lr", 0.02, "--augment", f"{augment}:flip=false",
                   "--threads", 1, "--device", "cpu", "--out", tmp_path / "t", "--json")  # fmt: skip
    assert done.code == 0, done.err
    if augment == "resized-crop-flip":
        assert "height" not in read_config(tmp_path / "t")["model"]
        return
    assert done.json["last_top1"] == 1.0
    assert read_config(tmp_path / "t")["model"]["height"] == 12
    again = kdcache("evaluate", tmp_path / "t", "--dataset", name, "--device", "cpu", "--json")
    assert again.json["top1"] == 1.0
    assert again.json["nll"] == pytest.approx(done.json["last_nll"], rel=1e-4)
    sent = kdcache("export", tmp_path / "t", "--format", "safetensors", "--json")
    assert sent.json["input"][1:] == [1, 12, 36]


def test_online_a_bare_checkpoint_is_normalised_as_its_store_says(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    spec = f"resnet8@{trained.teacher / 'model.safetensors'}"
    dumped = kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher", spec,
                     "--mean", "0.3", "--std", "0.4", "--views", 1, "--out", tmp_path / "s")  # fmt: skip
    assert dumped.code == 0, dumped.err
    student = ["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
               "--epochs", 1, "--train-samples", 64, "--device", "cpu", "--threads", 1, "--online",
               spec, "--json", "--out"]  # fmt: skip
    beside = kdcache(*student, tmp_path / "a", "--store", tmp_path / "s", "--subset")
    alone = kdcache(*student, tmp_path / "b")
    assert beside.code == alone.code == 0, beside.err + alone.err
    assert beside.json["teacher_forwards"] == alone.json["teacher_forwards"] == 64


def test_online_without_a_store_says_which_normalisation_is_used(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    student = ["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
               "--epochs", 1, "--train-samples", 64, "--device", "cpu", "--threads", 1]  # fmt: skip
    bare = f"resnet8@{trained.teacher / 'model.safetensors'}"
    measured = kdcache(*student, "--online", bare, "--out", tmp_path / "a").err
    own = kdcache(*student, "--online", trained.teacher, "--out", tmp_path / "b").err
    with open_store(trained.store) as store:
        mean = store.teacher.preprocessing["mean"][0]
    said = [" ".join(text.split()) for text in (measured, own)]
    assert "resnet8: preprocessing measured on digits: " in said[0]
    assert "a --store of it, dumped with another, says otherwise" in said[0]
    assert "preprocessing its own: " in said[1]
    assert "says otherwise" not in said[1]
    assert all(f"{mean:.3g}" in text for text in said)

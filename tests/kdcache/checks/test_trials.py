"""A live teacher tried with other preprocessings, and baselines found and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.checks.earlier_runs import Fit, baseline_beside, read_baseline
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.trials import Trials, try_out
from kdcache_stores import DataError, MismatchError
from tests.conftest import Trained

TRUE = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
CLASSES, N = 4, 400


class Reader(nn.Module):
    """Right if the images are 16 pixels wide, normalised as `TRUE` says and red comes first.

    The class is in the brightness of the upper half; brightness and red against blue must be as they were
    made, or the thresholds between the classes are missed.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != 16:
            return torch.zeros(len(images), CLASSES)
        level = images.mean((2, 3))  # (B, 3)
        wanted = torch.linspace(-1, 1, CLASSES)[:, None] * torch.tensor([1.0, 0.5, -0.5])
        return -((level[:, None] - wanted) ** 2).sum(-1)


def images(seed: int = 0) -> tuple[Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, N)
    level = np.linspace(-1, 1, CLASSES)[labels][:, None] * np.array([1.0, 0.5, -0.5])
    level = level + rng.normal(scale=0.1, size=level.shape)
    pixels = level * TRUE.std + np.array(TRUE.mean)
    whole = np.broadcast_to(pixels[:, :, None, None], (N, 3, 16, 16)) * 255
    return torch.from_numpy(whole.clip(0, 255).astype(np.uint8)), labels


def teacher(preprocessing: Preprocessing = TRUE) -> Teacher:
    return Teacher("reader", Reader(), preprocessing, CLASSES, "0" * 64)


def test_nothing_is_better_than_what_is_right() -> None:
    shown, labels = images()
    trials = try_out(teacher(), shown, labels, measured=Preprocessing.measured(shown))
    assert trials.right.mean() > 0.95
    assert trials.better() is None


def test_the_normalisation_is_named() -> None:
    shown, labels = images()
    wrong = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = try_out(teacher(wrong), shown, labels, measured=TRUE).better()
    assert found is not None
    name, remedy, top1 = found
    assert name == "the normalisation measured on the dataset"
    assert remedy == "--mean 0.5,0.4,0.3 --std 0.25,0.25,0.25"
    assert top1 > 0.95


def test_the_channel_order_is_named() -> None:
    shown, labels = images()
    found = try_out(teacher(), shown.flip(1), labels).better()
    assert found is not None
    assert "reverse order" in found[0]


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_size_is_named(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.teachers.trials.SIZES", (16, 32))
    shown, labels = images()
    found = try_out(teacher(replace(TRUE, size=size)), shown, labels).better()
    assert found is not None
    assert found[:2] == ("images of 16 pixels", "--size 16")


def test_a_network_of_one_size_and_one_channel() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    grey = Teacher(
        "grey", module.requires_grad_(False), Preprocessing((0.5,), (0.5,)), CLASSES, "0" * 64
    )
    shown = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    trials = try_out(grey, shown, np.arange(60) % CLASSES)
    assert not any("pixels wide" in name or "channels" in name for name, _ in trials.others)
    assert len(trials.right) == 60


def test_a_gain_that_chance_explains_is_none() -> None:
    right = np.zeros(100, bool)
    right[:50] = True
    some = right.copy()
    some[50:55] = True  # 5 gained, 0 lost: 1 in 32
    assert Trials(right, {("a", "b"): some}).better() is None
    some[50:70] = True
    assert Trials(right, {("a", "b"): some}).better() == ("a", "b", 0.7)
    assert Trials(right, {}).better() is None


def test_baselines_are_read_and_found(trained: Trained, tmp_path: Path) -> None:
    found = read_baseline(trained.teacher, {"model.name": "resnet8"})
    assert 0.3 < found.top1 <= 1
    with pytest.raises(MismatchError, match=r"model\.name = 'resnet20', found 'resnet8'"):
        read_baseline(trained.teacher, {"model.name": "resnet20"})
    with pytest.raises(DataError):
        read_baseline(tmp_path, {})
    out = trained.teacher.parent / "new"
    assert baseline_beside(out, {"model.name": "resnet8"}) == found
    assert baseline_beside(out, {"model.name": "resnet8", "data.train_samples": 10}) is None
    assert baseline_beside(tmp_path / "no" / "such", {}) is None


def test_a_fit_is_read_from_the_records() -> None:
    records = [{"epoch": i + 1, "train_kd": 10.0 - i, "test_top1": i / 10} for i in range(10)]
    assert Fit.of(records) == Fit(tuple(range(10, 0, -1)), 0.9)
    assert Fit.of(records[:1]) == Fit((10.0,), 0.0)
    assert Fit.of(records[1::2]) == Fit((9.0, 9.0, 7.0, 7.0, 5.0, 5.0, 3.0, 3.0, 1.0, 1.0), 0.9)
    assert Fit.of([{"train_ce": 1.0, "test_top1": 0.5}]) is None
    assert Fit.of([]) is None

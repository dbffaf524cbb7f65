"""A small teacher over a few digits, and stores compared byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.models.weights import tensor_digest
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher

MakeTeacher = Callable[..., Teacher]


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(300))


@pytest.fixture(scope="session")
def make_teacher() -> MakeTeacher:
    """A teacher with random weights: what it says does not matter, that it is kept does."""

    def make(
        model: str = "resnet8", classes: int = 10, channels: int = 1, size: int = 8, seed: int = 0
    ) -> Teacher:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = build_model(model, classes, channels, size).eval().requires_grad_(False)
        normal = Preprocessing((0.4,) * channels, (0.3,) * channels)
        return Teacher(model, module, normal, classes, tensor_digest(module.state_dict()))

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher: MakeTeacher) -> Teacher:
    return make_teacher()


def tree(store: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }

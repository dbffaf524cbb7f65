"""The examples run, learn, and see the views and targets that they are meant to see."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache import load_dataset, load_teacher
from kdcache_stores import open_store
from tests.conftest import Trained

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch(trained: Trained) -> None:
    assert example("plain_pytorch").main(str(trained.store), epochs=2) > 0.5


class Trainer:
    """Goes through the data as Lightning does.

    It makes an iterator before the first epoch and one at the start of every other, takes as many
    batches as the loader is long, and never asks for the one after the last.
    """

    def __init__(self, max_epochs: int, **options: Any) -> None:
        self.max_epochs = max_epochs

    def fit(self, module: Any, loader: Any) -> None:
        module.current_epoch = 0
        optimizer, batches = module.configure_optimizers(), iter(loader)
        for epoch in range(self.max_epochs):
            module.current_epoch = epoch
            batches = iter(loader) if epoch else batches
            for index in range(len(loader)):
                batch = module.transfer_batch_to_device(next(batches), torch.device("cpu"), 0)
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


STAND_IN = SimpleNamespace(
    LightningModule=nn.Module,
    Trainer=Trainer,
    seed_everything=lambda seed, verbose: torch.manual_seed(seed),
)


@pytest.fixture(params=["stand-in", "installed"])
def lightning(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The example with Lightning, or with what goes through the data as Lightning does."""
    with warnings.catch_warnings():
        if request.param == "stand-in":
            monkeypatch.setitem(sys.modules, "lightning", STAND_IN)
        else:
            warnings.simplefilter("ignore")  # Lightning's own, about workers and its dependencies
            pytest.importorskip("lightning")
        yield example("with_lightning")


def test_with_lightning(
    trained: Trained, lightning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs are views 0, 1 and 2 of every sample, with the teacher's logits of those images."""
    seen: list[tuple[int, Any]] = []
    step = lightning.Distillation.training_step

    def training_step(self: Any, batch: Any, index: int) -> Tensor:
        seen.append((self.current_epoch, batch))
        return step(self, batch, index)

    monkeypatch.setattr(lightning.Distillation, "training_step", training_step)
    assert lightning.main(str(trained.store), epochs=3) > 0.5
    samples = len(load_dataset("digits"))
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    with open_store(trained.store) as store:
        for epoch in range(3):
            batches = [batch for when, batch in seen if when == epoch]
            assert all((batch.views == epoch).all() for batch in batches)
            rows = np.concatenate([batch.rows for batch in batches])
            np.testing.assert_array_equal(np.sort(rows), np.arange(samples))
            logits = torch.cat([batch.teachers[0]["logits"] for batch in batches])
            stored = torch.from_numpy(np.array(store.read(epoch)))[rows]
            assert torch.equal(logits, stored)
            with torch.inference_mode():
                live = teacher.logits(torch.cat([batch.images for batch in batches]))
            torch.testing.assert_close(logits, live, rtol=0, atol=1e-3)


def test_every_example_is_tested() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"plain_pytorch", "with_lightning"}

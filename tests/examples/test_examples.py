"""The examples run, learn, and see the views and targets that they are meant to see."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset, load_teacher
from kdcache_stores import open_store
from tests.conftest import Trained, needs

EXAMPLES = Path(__file__).parents[2] / "examples"
FRAMEWORKS = {
    "plain_pytorch": "torch",
    "with_accelerate": "accelerate",
    "with_lightning": "lightning",
    "with_peft": "peft",
    "with_timm": "timm",
    "with_torchvision": "torchvision",
    "with_transformers": "transformers",
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: `make test-examples` runs the slow ones too.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "with_torchvision"))
        for name in FRAMEWORKS
    ],
)
def test_three_epochs_are_three_views(
    trained: Trained, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every sample once an epoch: its pixels, and the teacher's logits of those pixels."""
    seen: list[dict[str, Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own, about workers and dependencies
        needs(FRAMEWORKS[name])
        module = example(name)
        distill = module.distill

        def recorded(logits: Tensor, batch: dict[str, Tensor]) -> Any:
            seen.append({key: value.clone() for key, value in batch.items()})
            return distill(logits, batch)

        monkeypatch.setattr(module, "distill", recorded)
        assert module.main(str(trained.store), epochs=3) > 0.5
    train = load_dataset("digits")
    normalise = Preprocessing.measured(train.images)
    teacher = load_teacher(str(trained.teacher), classes=10, channels=1, size=8)
    views = CachedDataset(train, trained.store)
    assert len(seen) % 3 == 0
    orders = []
    with open_store(trained.store) as store:
        for epoch in range(3):
            batches = seen[epoch * len(seen) // 3 : (epoch + 1) * len(seen) // 3]
            batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
            rows = batch["row"].numpy()
            orders.append(rows.tolist())
            assert (batch["view"] == epoch).all()
            np.testing.assert_array_equal(np.sort(rows), np.arange(len(train)))
            np.testing.assert_array_equal(batch["label"], train.labels[rows])
            np.testing.assert_array_equal(batch["logits"], store.read(epoch)[rows])
            images = views.plan.images(rows, epoch)
            expected = normalise(images).expand(batch["image"].shape)
            torch.testing.assert_close(batch["image"], expected, rtol=0, atol=1e-6)
            with torch.inference_mode():
                live = teacher.logits(images)
            torch.testing.assert_close(batch["logits"], live, rtol=0, atol=1e-3)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_goes_on_in_the_middle_of_an_epoch(
    trained: Trained, workers: int
) -> None:
    """What torchdata's loader gives after a kill is what an uninterrupted one would have given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata calls what torch has deprecated (set_vital)
        stateful = needs("torchdata.stateful_dataloader").StatefulDataLoader

        def make() -> Any:
            data = CachedDataset(load_dataset("digits"), trained.store, rows=np.arange(100))
            return stateful(data, 16, sampler=ViewSampler(data, seed=4), num_workers=workers)

        def facts(batch: dict[str, Tensor]) -> tuple[Any, ...]:
            return tuple(batch[key].numpy().tobytes() for key in sorted(batch))

        loader = make()
        whole = [facts(batch) for _ in range(3) for batch in loader]
        assert len(whole) == 21
        for stop in (3, 9):
            loader = make()
            passes = (facts(batch) for _ in range(3) for batch in loader)
            taken = list(itertools.islice(passes, stop))
            state = loader.state_dict()
            del passes, loader
            then = make()
            then.load_state_dict(state)
            epochs = 3 - (stop // 7)
            rest = [facts(batch) for _ in range(epochs) for batch in then]
            assert taken + rest == whole


@pytest.mark.slow
def test_sentences_as_bags_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files of sentences to a student that has learnt them; the bags are what was hashed."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rng, files = np.random.default_rng(0), []
    for label, words in enumerate((["good", "fine", "so"], ["bad", "poor", "so"])):
        files.append(tmp_path / f"{label}.txt")
        lines = [f"film {row} is {' '.join(rng.choice(words, 5))}" for row in range(300)]
        files[-1].write_text("\n".join(lines))
    (tmp_path / "runs").mkdir()
    module = importlib.import_module("bags_of_words")
    top1 = module.main(str(tmp_path / "runs"), *map(str, files), epochs=40)
    assert top1.keys() == {"teacher", "ce", "kd"}
    assert min(top1.values()) > 0.8
    (bag,) = module.bags(["so so good"])
    assert sorted(bag[bag > 0] ** 2) == pytest.approx([0.2, 0.8])
    with open_store(tmp_path / "runs" / "t.zarr") as store:
        assert store.plan.item == {"dtype": "float32", "shape": [module.BUCKETS]}
        assert len(store) == 540


def test_every_example_is_tested_and_short() -> None:
    files = {file.stem: file.read_text().splitlines() for file in EXAMPLES.glob("*.py")}
    assert files.keys() == {*FRAMEWORKS, "bags_of_words"}
    assert {name: len(lines) for name, lines in files.items() if len(lines) >= 60} == {}

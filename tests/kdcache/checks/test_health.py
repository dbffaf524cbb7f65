"""The rules against real trainings: healthy ones stay without a warning, of each sick one it is named first.

Students of the digits, taught by a resnet20 (98% top-1): 40 healthy trainings of varied method, length, size,
schedule, views and network, and 20 and more with one thing wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import Training, load_dataset, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.runs import read_summary
from kdcache.training.optim import Optimization
from kdcache_cli import main
from kdcache_stores import Samples, open_store, write_arrays

pytestmark = pytest.mark.slow

DIGITS = ["--dataset", "digits", "--quiet", "--device", "cpu", "--threads", "1"]
EXHAUSTIVE = "exhaustive"


class Narrow(nn.Module):
    """Two features of an image: too few to tell ten digits apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(x)
        return logits


def narrow() -> nn.Module:
    return Narrow()


@dataclass(frozen=True)
class Place:
    """A trained teacher and its stores."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def store(self, name: str, *words: str, teacher: str = "teacher") -> str:
        """A store dumped as these words say, made when it is first asked for."""
        path = self / f"{name}.zarr"
        if not path.exists():
            command = ["dump-teacher", "--teacher", str(self / teacher), "--out", str(path)]
            assert main([*command, *words, *DIGITS]) == 0
        return str(path)

    def changed(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
        """The exhaustive store with other logits, as if another teacher had given them."""
        path = self / f"{name}.zarr"
        if not path.exists():
            with open_store(
                self.store("all", "--augment", EXHAUSTIVE, "--encoding", "float32")
            ) as whole:
                logits = np.stack([whole.read(view) for view in whole.view_range])
                write_arrays(
                    path, change(logits), samples=Samples(whole.keys, whole.labels), plan=whole.plan,
                    encoding="float32",
                    probes=lambda shard: [
                        probe for probe in whole.probes
                        if probe.view == shard.view and shard.start <= probe.row < shard.stop
                    ],
                ).close()  # fmt: skip
        return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("health")
    command = [
        "train-teacher",
        "--model",
        "resnet20",
        "--augment",
        "pad-crop-flip",
        "--epochs",
        "20",
    ]
    assert main([*command, "--out", str(folder / "teacher"), *DIGITS]) == 0
    return Place(folder)


def stores_of(place: Place, kind: str) -> tuple[str, ...]:
    if kind == "pairs":
        return (place.store("pairs", "--augment", "weak+strong", "--views", "16"),)
    if kind == "sixteen":
        return (place.store("sixteen", "--augment", "pad-crop-flip", "--views", "16"),)
    return (place.store("all", "--augment", EXHAUSTIVE, "--encoding", "float32"),)


def trained(place: Path, training: Training) -> list[str]:
    """The rules that warned, in their order."""
    summary = read_summary(train(training, place).path)
    return [warning["rule"] for warning in summary["warnings"]]


def student(epochs: int = 20, samples: int | None = 300, batch: int = 16, lr: float = 0.05,
            schedule: str = "step", **options: Any) -> Training:  # fmt: skip
    steps = Optimization(epochs=epochs, batch_size=batch, lr=lr, lr_schedule=schedule)
    settings: dict[str, Any] = {"dataset": "digits", "model": "resnet8", "threads": 1} | options
    return Training(**settings, train_samples=samples, optimization=steps)


METHODS: list[dict[str, Any]] = [
    {"method": "kd"},
    {"method": "kd", "standardize": "unbiased"},
    {"method": "dkd"},
    {"method": "dkd", "standardize": "unbiased"},
    {"method": "ctkd"},
    {"method": "ctkd", "standardize": "unbiased"},
    {"method": "dist"},
    {"method": "mlkd"},
    {"method": "mlkd", "standardize": "unbiased"},
    {"method": "kd", "alpha": 0.3, "temperature": 3.0},
]
LENGTHS = [(1, 1437), (3, 1000), (8, 300), (12, 300), (20, 80), (40, 80), (8, 1437), (2, 300)]
SCHEDULES = ["step", "cosine", "one-cycle", "constant"]
NETWORKS = ["resnet8", "wrn_16_1", "resnet14"]

HEALTHY = [
    (METHODS[i % len(METHODS)], *LENGTHS[(i * 3 + i // 10) % len(LENGTHS)], SCHEDULES[(i + i // 4) % 4],
     NETWORKS[i % 3], ("all", "sixteen")[i % 2])
    for i in range(40)
]  # fmt: skip


@pytest.mark.parametrize(("options", "epochs", "samples", "schedule", "network", "kind"), HEALTHY)
def test_healthy_trainings_are_not_warned_of(
    place: Place, tmp_path: Path, options: dict[str, Any], epochs: int, samples: int, schedule: str,
    network: str, kind: str,
) -> None:  # fmt: skip
    objective = ObjectiveConfig(**options)
    training = student(
        epochs, samples, 64 if samples >= 1000 else 16, 0.01 if objective.record.pairs else 0.05,
        schedule=schedule, model=network,
        objective=objective, stores=stores_of(place, "pairs" if objective.record.pairs else kind),
    )  # fmt: skip
    assert trained(tmp_path / "run", training) == []


def of_settings(**options: Any) -> Callable[[Place], Training]:
    def make(place: Place) -> Training:
        pairs = options.get("method") == "mlkd"
        return student(2, stores=stores_of(place, "pairs" if pairs else "all"),
                       objective=ObjectiveConfig(**{"method": "kd"} | options))  # fmt: skip

    return make


def of_store(make: Callable[[Place], str], **options: Any) -> Callable[[Place], Training]:
    def sick(place: Place) -> Training:
        objective = ObjectiveConfig(**{"method": "kd"} | options)
        return student(2, stores=(make(place),), objective=objective)

    return sick


def untrained(place: Place) -> str:
    path = place / "untrained.zarr"
    if not path.exists():
        assert main(["dump-teacher", "--teacher", "resnet8", "--allow-untrained", "--augment", EXHAUSTIVE,
                     "--out", str(path), *DIGITS]) == 0  # fmt: skip
    return str(path)


def two(place: Place, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Training:
    (whole,) = stores_of(place, "all")
    return student(2, stores=(whole, place.changed(name, change)), objective=ObjectiveConfig())


def half_of_the_classes(place: Place) -> Training:
    data = load_dataset("digits", "train")
    test = load_dataset("digits", "test")
    few = np.flatnonzero(data.labels < 5)
    file = place / "half.npz"
    np.savez(
        file, x_train=data.images[few].numpy(), y_train=data.labels[few],
        keys_train=np.array([data.keys[row] for row in few]), x_test=test.images.numpy(),
        y_test=test.labels, keys_test=np.array(test.keys), class_names=np.arange(10).astype(str),
    )  # fmt: skip
    return student(2, None, dataset=f"arrays:{file}", stores=stores_of(place, "all"),
                   objective=ObjectiveConfig())  # fmt: skip


def of_length(store: str, epochs: int, **options: Any) -> Callable[[Place], Training]:
    def sick(place: Place) -> Training:
        return student(
            epochs, stores=stores_of(place, store), objective=ObjectiveConfig(), **options
        )

    return sick


def one_view(place: Place) -> Training:
    store = place.store("one", "--augment", "pad-crop-flip", "--views", "1")
    return student(40, stores=(store,), objective=ObjectiveConfig())


SICK: dict[str, tuple[str, Callable[[Place], Training]]] = {
    "far too soft": ("temperature", of_settings(temperature=20.0)),
    "too sharp": ("temperature", of_settings(temperature=0.5)),
    "almost no temperature": ("temperature", of_settings(temperature=0.05)),
    "the teacher hardly counts": ("alpha", of_settings(alpha=0.9)),
    "labels hardly count": ("alpha", of_settings(alpha=0.02)),
    "no distillation": ("no-distillation", of_settings(alpha=1.0)),
    "no labels": ("no-labels", of_settings(ce_weight=0.0)),
    "a small weight": ("standardized-weight", of_settings(standardize="unbiased", kd_weight=0.9)),
    "a large weight": ("standardized-weight", of_settings(kd_weight=9.0)),
    "weights of KD": ("other-method", of_settings(method="dkd", ce_weight=0.1, kd_weight=0.9)),
    "weights of DKD": ("other-method", of_settings(method="mlkd", ce_weight=1.0, kd_weight=1.0)),
    "a batch of all": ("batch-size", of_length("all", 5, samples=80, batch=256)),
    "an untrained teacher": ("chance", of_store(untrained)),
    "classes reversed": ("class-order", of_store(lambda p: p.changed("reversed", lambda z: z[..., ::-1]))),
    "rows of others": ("chance", of_store(lambda p: p.changed("shuffled", lambda z: z[:, ::-1]))),
    "tiny logits": ("kd-share", of_store(lambda p: p.changed("tiny", lambda z: 0.02 * z))),
    "huge logits": ("certain-targets", of_store(lambda p: p.changed("huge", lambda z: 50 * z))),
    "one view of forty epochs": ("few-views", one_view),
    "one teacher twice": ("alike", lambda p: two(p, "twin", lambda z: z + 1e-3)),
    "a teacher drowned": ("scales", lambda p: two(
        p, "loud", lambda z: 8 * np.random.default_rng(0).normal(size=(1, *z.shape[1:])).astype("f4") + 8 * z)),
    "half of the classes": ("class-prior", half_of_the_classes),
    "hardly any rate": ("unfit", of_length("all", 12, lr=1e-6)),
    "too small a student": ("unfit", of_length("all", 40, lr=0.1, model=f"{__name__}:narrow")),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_of_a_sick_training_its_fault_is_named_first(
    place: Place, tmp_path: Path, name: str
) -> None:
    rule, make = SICK[name]
    warnings = trained(tmp_path / "run", replace(make(place), seed=1))
    assert warnings[:1] == [rule], warnings

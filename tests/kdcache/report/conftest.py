"""Four students of the trained teacher, two seeds by labels and two from the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.methods.config import ObjectiveConfig
from kdcache.report.building import report
from kdcache.training.optim import Optimization
from kdcache.training.preparation import train
from kdcache.training.settings import Training
from tests.conftest import Trained


@pytest.fixture(scope="session")
def students(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: ce-0, ce-1, kd-0, kd-1."""
    folder = tmp_path_factory.mktemp("students")
    for method in ("ce", "kd"):
        for seed in (0, 1):
            training = Training(
                dataset="digits",
                model="resnet8",
                objective=ObjectiveConfig(method=method),
                optimization=Optimization(epochs=2, batch_size=16),
                stores=(str(trained.store),),
                train_samples=48,
                seed=seed,
            )
            train(training, folder / f"{method}-{seed}")
    return folder


@pytest.fixture(scope="session")
def written(trained: Trained, students: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report of everything."""
    out = tmp_path_factory.mktemp("report")
    done = report([students, trained.teacher], [trained.store], out)
    assert done.left_out == []
    return out

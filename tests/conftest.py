"""Fixtures shared by all tests: one compute thread, real data if it is there, a small trained path."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # faster for networks as small as these, and the same on every machine


def needs(framework: str) -> ModuleType:
    """Import it; without it skip, but fail where all are required, as `make test-examples` does."""
    if os.environ.get("KDCACHE_REQUIRE_FRAMEWORKS"):
        return importlib.import_module(framework)
    module: ModuleType = pytest.importorskip(framework)
    return module


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets, or a skip that says how to get it."""
    folder = os.environ.get("KDCACHE_TEST_DATA")
    if not folder:
        pytest.skip("KDCACHE_TEST_DATA is not set: a folder with cifar100.npz, FashionMNIST/raw and "
                    "imagenette-small")  # fmt: skip
    return Path(folder)


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def kdcache(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""
    from kdcache_cli import main

    def run(*args: object) -> Result:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@dataclass(frozen=True)
class Trained:
    """A teacher run and its store over four views of the digits."""

    teacher: Path
    store: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A resnet8 teacher after three epochs on the digits, dumped in float32 for four views."""
    from kdcache_cli import main

    folder = tmp_path_factory.mktemp("trained")
    teacher, store = folder / "teacher", folder / "teacher.zarr"
    common = ["--dataset", "digits", "--quiet", "--device", "cpu"]
    assert main(["train-teacher", "--model", "resnet8", "--epochs", "3", "--out", str(teacher),
                 *common]) == 0  # fmt: skip
    assert main(["dump-teacher", "--teacher", str(teacher), "--views", "4", "--encoding", "float32",
                 "--out", str(store), *common]) == 0  # fmt: skip
    return Trained(teacher, store)

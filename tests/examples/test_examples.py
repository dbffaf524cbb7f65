"""The examples run and learn."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest

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


def test_with_lightning(trained: Trained) -> None:
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about workers and its dependencies
        assert example("with_lightning").main(str(trained.store), epochs=2) > 0.5


def test_every_example_is_tested() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"plain_pytorch", "with_lightning"}

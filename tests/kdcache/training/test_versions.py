"""A run that another version of kdcache began: finished it opens, unfinished it goes on and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from kdcache import __version__, train
from kdcache.runs import load_run_model, read_config
from kdcache.training.observer import Unwatched
from kdcache_stores import MismatchError
from tests.conftest import Result
from tests.kdcache.training.job import training

HOW = {"optimization": {"epochs": 4, "batch_size": 25}}


class Notes(Unwatched):
    """Collects what is said; ends the training in an epoch, if told to."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, epoch: int, done: int, total: int) -> None:
        if epoch == self.stop:
            raise KeyboardInterrupt


def made_by(run: Path, version: str) -> None:
    config = read_config(run) | {"kdcache": version}
    (run / "config.toml").write_text(tomli_w.dumps(config))


@pytest.mark.slow
def test_a_finished_run_opens_under_any_version(tmp_path: Path, kdcache: Any) -> None:
    run = train(training(HOW), tmp_path / "run").path
    made_by(run, "99.1.0")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    watch = Notes()
    assert train(training(HOW), run, watch).summary() is not None
    assert not [note for note in watch.notes if "99.1.0" in note]
    load_run_model(run, allow_code=True)
    for command in (
        ("evaluate", run, "--dataset", "digits", "--allow-code", "--device", "cpu", "--json"),
        ("export", run, "--allow-code", "--format", "safetensors", "--out", tmp_path / "net.safetensors"),
        ("report", run, "--out", tmp_path / "report"),
    ):  # fmt: skip
        done: Result = kdcache(*command)
        assert done.code == 0, done.err
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_an_unfinished_run_goes_on_under_another_version_and_says_so(tmp_path: Path) -> None:
    whole = train(training(HOW), tmp_path / "whole").path
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(training(HOW), run, Notes(stop=3))
    made_by(run, "0.0.9")
    watch = Notes(stop=4)
    with pytest.raises(KeyboardInterrupt):
        train(training(HOW), run, watch)
    assert any(f"2 epochs of {run} were trained by kdcache 0.0.9" in note for note in watch.notes)
    config = read_config(run)
    assert config["kdcache"] == "0.0.9"
    assert config["resumed"] == [{"after_epoch": 2, "kdcache": __version__}]
    again = Notes()
    train(training(HOW), run, again)  # by the same version as the last resume: no news
    assert not [note for note in again.notes if "0.0.9" in note]
    assert read_config(run) == config
    weights = [(path / "model.safetensors").read_bytes() for path in (run, whole)]
    assert weights[0] == weights[1]


def test_what_else_differs_is_refused_and_the_versions_are_named(tmp_path: Path) -> None:
    run = train(training(HOW), tmp_path / "run").path
    made_by(run, "0.0.9")
    with pytest.raises(MismatchError, match=rf"kdcache 0\.0\.9, this is {__version__}.*seed was 0"):
        train(training(HOW | {"seed": 1}), run)


def test_a_checkpoint_without_the_losses_of_its_epochs_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(training(HOW), run, Notes(stop=3))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state["losses"]
    torch.save(state, run / "checkpoint.pt")
    assert train(training(HOW), run).summary() is not None

"""An option that would do nothing beside the others is refused, naming what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from kdcache_cli.app import app
from kdcache_cli.needs import NEEDS, require_needs
from tests.cli.test_every_option import invented, options_of
from tests.conftest import Result

ROWS = [(command, flag) for command, needs in NEEDS.items() for flag in needs]

#: Values that a callback of the option accepts.
TEXTS = {
    "--milestones": "0.5,0.7",
    "--teacher-weights": "2,1",
    "--cache-size": "2GB",
    "--prune": "structured:0.5",
}


def parsed(command: str, words: list[str]) -> click.Context:
    found = app.get_command(click.Context(app), command)
    assert found is not None
    return found.make_context(command, words)


def required(command: str) -> list[str]:
    words = []
    for param in parameters(command):
        if param.required:
            words += [param.opts[0], "x"] if isinstance(param, click.Option) else ["x"]
    return words


def parameters(command: str) -> list[click.Parameter]:
    found = app.get_command(click.Context(app), command)
    assert found is not None
    return found.params


def given(command: str, flag: str) -> list[str]:
    (option,) = (option for option in options_of(command) if flag in option.opts)
    return [flag, TEXTS[flag]] if flag in TEXTS else list(invented(option).words)


def fulfilled(command: str, need: str) -> list[str]:
    """Words with which a need of the table is there."""
    if need.startswith("no "):
        return []
    flag, _, value = need.removeprefix("several ").partition(" ")
    if not flag.startswith("--"):
        return ["s"]
    words = [flag, value] if value else given(command, flag)
    if further := NEEDS[command].get(flag):  # what it needs itself
        words = words + fulfilled(command, further.partition(" or ")[0])
    return words * 2 if need.startswith("several ") else words


def lacking(command: str, needs: str) -> list[str]:
    """Words with which no need of the table is there."""
    if needs.startswith("no "):
        return given(command, needs.removeprefix("no "))
    flag, _, value = needs.partition(" ")
    return [flag, "another"] if flag.startswith("--") and value and " or " not in needs else []


@pytest.mark.parametrize(("command", "flag"), ROWS)
def test_it_is_refused_alone_and_taken_with_what_it_needs(
    command: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_SIZE", "1GB")
    needs = NEEDS[command][flag]
    words = [*required(command), *given(command, flag)]
    with pytest.raises(click.UsageError, match=f"{flag} does nothing") as refused:
        require_needs(parsed(command, [*words, *lacking(command, needs)]))
    assert needs.removeprefix("no ") in str(refused.value)
    for need in needs.split(" or "):
        require_needs(parsed(command, [*words, *fulfilled(command, need)]))
    require_needs(parsed(command, [*required(command), *lacking(command, needs)]))


def test_the_commands_ask(tmp_path: Path, kdcache: Callable[..., Result]) -> None:
    done = kdcache("import", tmp_path / "x.npz", "--out", tmp_path / "s.zarr", "--split", "test")
    assert done.code == 2
    assert "--split does nothing here: it needs --dataset" in done.err

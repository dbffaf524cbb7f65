"""What messages and help tell people to run, give, install or read is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import resources

import click
import pytest

from kdcache_cli.app import COMMANDS, app
from tests.test_words import PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
#: Files from beside the packages that a wheel holds in them.
ADDED = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]

#: Options of other programs that messages name.
OTHERS = {"--nproc-per-node", "--nnodes", "--nfc", "--nfd"}
#: Files that commands write, which are not kdcache's own.
WRITTEN = {"students.toml", "README.md", "config.toml"}


def _texts() -> Iterator[tuple[str, str]]:
    """Every string of the packages that people may see, with its place; parts of f-strings joined."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            hidden = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and node.body
                and isinstance(node.body[0], ast.Expr)
                and not (isinstance(node, ast.FunctionDef) and "commands" in file.parts)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    hidden |= {id(part) for part in node.values}
            for node in ast.walk(tree):
                if id(node) in hidden:
                    continue
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                elif isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "{}"
                        for part in node.values
                    )
                else:
                    continue
                yield f"{file.relative_to(ROOT)}:{node.lineno}", text


TEXTS = list(_texts())


def _commands() -> dict[str, click.Command]:
    context = click.Context(app)
    commands = {name: app.get_command(context, name) for name in COMMANDS}
    return {name: command for name, command in commands.items() if command is not None}


def _options() -> set[str]:
    parameters = [p for command in (app, *_commands().values()) for p in command.params]
    return {"--help", *(name for p in parameters for name in (*p.opts, *p.secondary_opts))}


def _unknown(pattern: str, known: set[str]) -> list[str]:
    named = [(place, m[1]) for place, text in TEXTS for m in re.finditer(pattern, text)]
    assert named, "the pattern matches nothing: the texts are not those of the packages"
    return [f"{place}: {name}" for place, name in named if name not in known]


def test_every_option_that_a_text_names_is_one() -> None:
    assert not _unknown(r"(?<![\w{}-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w{}-])", _options() | OTHERS)


def test_every_command_that_a_text_names_is_one() -> None:
    assert not _unknown(
        r"(?:`|'|: |run |with )kdcache ([a-z][a-z-]+)\b", set(COMMANDS) | {"runs"}
    )  # "kdcache runs on ..."


def test_every_option_that_a_text_gives_a_command_is_its_own() -> None:
    commands, wrong = _commands(), []
    for place, text in TEXTS:
        for name, rest in re.findall(r"kdcache ([a-z][a-z-]+)((?: [^`\n;.]*)?)", text):
            if name in commands:
                own = {opt for p in commands[name].params for opt in (*p.opts, *p.secondary_opts)}
                given = set(re.findall(r"(?<=\s)--[a-z-]*[a-z](?![\w{])", rest.partition("`")[0]))
                wrong += [f"{place}: {name} {option}" for option in given - own]
    assert not wrong


def test_what_loads_a_network_names_the_commands_of_its_options() -> None:
    """Many commands load one: an option that some of them lack comes with the commands that have it."""
    files = ("kdcache/teachers/load.py", "kdcache/teachers/teacher.py", "kdcache/runs.py:3",
             "kdcache/models/")  # fmt: skip
    texts = [(place, text) for place, text in TEXTS if place.startswith(files)]
    commands, named, wrong = _commands(), 0, []
    for place, text in texts:
        for option in re.findall(r"(?<![\w{}-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w{}-])", text):
            having = [n for n, c in commands.items() if any(option in p.opts for p in c.params)]
            named += 1
            if len(having) < len(commands) and not any(name in text for name in having):
                wrong.append(f"{place}: {option}")
    assert named > 5
    assert not wrong


def test_every_extra_that_a_text_installs_is_one() -> None:
    assert not _unknown(r"kdcache\[([\w-]+)\]", set(EXTRAS))


@pytest.mark.parametrize("name", ["help", "messages"])
def test_no_text_points_to_a_file_that_is_not_installed(name: str) -> None:
    if name == "help":
        texts = [(c, d.get_help(d.context_class(d, info_name=c))) for c, d in _commands().items()]
    else:
        texts = TEXTS
    packages = [resources.files(package.rpartition("/")[2]) for package in PACKAGES]
    assert all((ROOT / source).is_file() for source in ADDED)
    added = {target.partition("/")[2] for target in ADDED.values()}
    absent = [
        f"{place}: {file}"
        for place, text in texts
        for file in re.findall(r"(?<![\w/.{}*-])((?:\w+/)*\w+\.(?:md|toml|rst|sh))\b", text)
        if file not in WRITTEN | added and not any(p.joinpath(file).is_file() for p in packages)
    ]
    absent += [
        place
        for place, text in texts
        if re.search(r"\b[Ss]ee (the |its )?(README|docs|manual)", text)
    ]
    assert not absent

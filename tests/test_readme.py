"""The README does what it says: its Python runs, its commands parse, its files are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.methods.table import METHODS
from kdcache_cli.app import COMMANDS, app
from tests.conftest import Trained

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("console")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("kdcache") + 1 :] for line in words if "kdcache" in line]


@pytest.mark.parametrize("code", [code for code in blocks("python") if "teacher.zarr" in code])
def test_python_runs(
    code: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.store, tmp_path / "teacher.zarr")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_your_own_parts_train(tmp_path: Path) -> None:
    (own,) = (code for code in blocks("python") if code.startswith("# my_parts.py"))
    (tmp_path / "my_parts.py").write_text(own)
    (words,) = (words for words in commands() if "my_parts:tiny" in words)
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", *words, "--device", "cpu", "--json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "my_parts:tiny"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    command = app.get_command(app.make_context("kdcache", ["-h"], resilient_parsing=True), words[0])
    assert command is not None
    command.make_context(words[0], words[1:]).close()


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("console")), flags=re.M)
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_is_in_the_table() -> None:
    assert [name for name in COMMANDS if f"`{name}`" not in README] == []


def test_the_table_of_methods_is_that_of_the_records() -> None:
    rows = []
    for method in METHODS.values():
        own = ", ".join(
            f"`--{method.flag(option).replace('_', '-')} {option.default}`"
            for option in method.options
        )
        rows.append(f"| `{method.name}` | {method.source} | {method.title} | {own} |")
    table = "\n".join(
        ("| method | source | what it computes | own options |", "|---|---|---|---|", *rows)
    )
    assert table in README

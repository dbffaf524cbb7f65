"""The students of one `train-student`: each with its name and its settings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click

from kdcache.methods.table import METHODS


class StudentRun(NamedTuple):
    """One student: its folder's name, its settings by their Python names, those given for it alone."""

    name: str
    settings: dict[str, Any]
    given: set[str]


#: What may name a run in a list: its folder in --out.
_NAME = re.compile(r"[\w.-]*\w[\w.-]*")
#: Of the options of `train-student`, what says how many students there are, or holds for all of them.
_OF_ALL = {"out", "runs", "seeds", "methods", "recipes", "as_json", "quiet", "debug", "tensorboard",
           "allow_code", "strict", "generations", "expect", "checkpoint_every", "hold_memory",
           "cache_size"}  # fmt: skip


def student_runs(ctx: click.Context, settings: dict[str, Any]) -> list[StudentRun]:
    """The students that a command line describes: every method or recipe with every seed, or a list.

    Args:
        ctx: of the command.
        settings: its arguments; seeds, methods, recipes and runs are taken out.

    Raises:
        click.UsageError: neither a method nor a recipe, or a list that is none.
    """
    seeds, methods, recipes = (settings.pop(name) for name in ("seeds", "methods", "recipes"))
    listed = settings.pop("runs")
    tables = [{}] if listed is None else _tables(listed)
    runs = []
    for table in tables:
        own = dict(table)
        name = own.pop("name", None)
        if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
            raise click.UsageError(
                f"--runs {listed}: name {name!r} names a folder: give a text of letters, digits, '.', '_', '-'."
            )
        each = [
            _several(ctx, f"{key}s", own.pop(key), listed) if key in own else several or (None,)
            for key, several in (("seed", seeds), ("method", methods), ("recipe", recipes))
        ]
        converted = _converted(ctx, own, listed)
        for seed, method, recipe in product(*each):
            wanted = settings | converted | {"seed": seed, "method": method, "recipe": recipe}
            for other in {*methods} - {method}:  # its own options are not this student's
                wanted |= {METHODS[other].flag(option): None for option in METHODS[other].options}
            given = {*converted, *(["method"] if method else [])}
            runs.append(StudentRun(name or _name(seed, method, recipe), wanted, given))
    if not all(run.settings["method"] or run.settings["recipe"] for run in runs):
        raise click.UsageError("give --method (see `kdcache list methods`) or --recipe.")
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"several runs are named {twice[0]!r}: give each a name of its own.")
    return runs


def _name(seed: int, method: str | None, recipe: str | None) -> str:
    what = "-".join(word.rpartition("/")[2] for word in (recipe, method) if word)
    return f"{what}-seed{seed}"


def _several(ctx: click.Context, name: str, value: Any, path: Path | None) -> tuple[Any, ...]:
    """One value of a table, or a list of them, as the option of that Python name takes each."""
    values = value if isinstance(value, list) else [value]
    (param,) = (param for param in ctx.command.params if param.name == name)
    if not values or any(isinstance(item, bool) for item in values):
        raise click.UsageError(f"--runs {path}: {name[:-1]} {value!r}: expected one, or a list.")
    return tuple(param.type.convert(item, param, ctx) for item in values)


def _tables(path: Path) -> list[Mapping[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("run", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"--runs {path}: {error}") from error
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise click.UsageError(f"--runs {path}: expected a table [[run]] for each student.")
    return tables


def _converted(ctx: click.Context, table: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """A table of the list as the command line would have read it, by Python names."""
    known = {
        word.lstrip("-"): param
        for param in ctx.command.params
        if param.name not in _OF_ALL
        for word in param.opts
    }
    values = {}
    for key, value in table.items():
        word = key.replace("_", "-")
        if word not in known:
            close = get_close_matches(word, [*known, "name", "seed", "method", "recipe"], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"--runs {path}: {key} is no option of a single student{hint}")
        values[str(known[word].name)] = known[word].process_value(ctx, value)
    return values

"""Published training recipes, as TOML files beside this module.

A file holds a ``[base]`` table of options (named as the flags of `kdcache train-student`, without the
dashes in front), then what a student, a method, or a method for a pair of teacher and student changes:
``[student.NAME]``, ``[method.NAME]``, ``[pair."TEACHER>STUDENT".METHOD]``. Later tables win in this order;
flags given on the command line win over all. ``[like]`` takes whole tables and methods from another file, over
which the file's own are laid. Sources are named in the files; ``ours = true`` marks a file, or a method, whose
settings nobody has published.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from kdcache_stores.errors import UnknownName

OURS = "not published, ours"

#: Keys of a method's table that are no options of a training.
_NO_OPTIONS = ("about", "ours", "student")


@cache
def load(dataset: str) -> Mapping[str, Any]:
    """One recipe file, with what it takes from another. To be read only: it is read once."""
    text = files("kdcache.recipes").joinpath(f"{dataset}.toml").read_text(encoding="utf-8")
    recipe = tomllib.loads(text)
    like = recipe.pop("like", None)
    if like is None:
        return recipe
    other = load(like["dataset"])
    for table in like.get("tables", ()):
        recipe[table] = other[table] | recipe.get(table, {})
    own = recipe.get("method", {})
    recipe["method"] = {name: other["method"][name] | own.get(name, {}) for name in like["methods"]}
    return recipe


def datasets() -> list[str]:
    """The datasets that have a recipe file."""
    names = (file.name for file in files("kdcache.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


@cache
def names() -> Mapping[str, str]:
    """Every recipe, "dataset/method", with what it is."""
    recipes = {}
    for dataset in datasets():
        recipe = load(dataset)
        for method, options in recipe["method"].items():
            ours = recipe.get("ours") or options.get("ours")
            what = f"{recipe['name']}, {options['about']}" + (f"; {OURS}" if ours else "")
            recipes[f"{dataset}/{method}"] = what
    return recipes


def resolve(name: str, student: str, teacher: str | None = None) -> dict[str, Any]:
    """The options of a recipe for a student, by their Python names ("batch_size").

    Args:
        name: "dataset/method", see `names`.
        student: the student's model.
        teacher: the teacher's architecture, for settings of the pair; None leaves those out.

    Raises:
        UnknownName: no such recipe.
    """
    known = names()
    if name not in known:
        raise UnknownName("recipe", name, known)
    dataset, _, method = name.partition("/")
    recipe = load(dataset)
    pair = recipe.get("pair", {}).get(f"{teacher}>{student}", {})
    options: dict[str, Any] = {}
    for table in (
        recipe["base"],
        recipe.get("student", {}).get(student, {}),
        recipe["method"][method],
        recipe["method"][method].get("student", {}).get(student, {}),
        pair.get(method, {}),
    ):
        options |= {key.replace("-", "_"): value for key, value in table.items()}
    return {key: value for key, value in options.items() if key not in _NO_OPTIONS}

"""Published training recipes, as TOML files beside this module.

A file holds a ``[base]`` table of options (named as the flags of `kdcache train-student`, without the
dashes in front), then what a student, a method, or a method for a pair of teacher and student changes:
``[student.NAME]``, ``[method.NAME]``, ``[pair."TEACHER>STUDENT".METHOD]``. Later tables win in this order;
flags given on the command line win over all. Sources are named in the files.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from kdcache_stores.errors import UnknownName


def load(dataset: str) -> dict[str, Any]:
    """One recipe file as it is."""
    text = files("kdcache.recipes").joinpath(f"{dataset}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def datasets() -> list[str]:
    """The datasets that have a recipe file."""
    names = (file.name for file in files("kdcache.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def names() -> dict[str, str]:
    """Every recipe, "dataset/method", with what it is."""
    recipes = {}
    for dataset in datasets():
        recipe = load(dataset)
        for method, options in recipe["method"].items():
            recipes[f"{dataset}/{method}"] = options.get("about", recipe["about"])
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
    options.pop("about", None)
    options.pop("student", None)
    return options

"""No file of the package imports, by way of others, itself; imports for type checkers count."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import kdcache_stores

PACKAGE = Path(kdcache_stores.__file__).parent


def imports(file: Path, names: set[str]) -> set[str]:
    result = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdcache_stores"):
            module = (node.module or "").removeprefix("kdcache_stores").removeprefix(".")
            parts = {module} if module else {alias.name for alias in node.names}
            result |= {part if part in names else "__init__" for part in parts}
    return result


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = {file.stem: file for file in PACKAGE.glob("*.py")}
    graph = {name: imports(file, set(files)) for name, file in files.items()}
    assert graph["writer"] >= {"begin", "outstanding", "packing"}
    TopologicalSorter(graph).prepare()  # raises `CycleError`, naming the files

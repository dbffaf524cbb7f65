"""Dependencies point down: cli -> kdcache -> kdcache_stores, without cycles, and stores need no torch."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "kdcache_stores": ROOT / "stores" / "kdcache_stores",
    "kdcache": ROOT / "kdcache",
    "kdcache_cli": ROOT / "cli" / "kdcache_cli",
}
FORBIDDEN = {
    "kdcache_stores": {"kdcache", "kdcache_cli", "torch", "torchvision", "click", "rich"},
    "kdcache": {"kdcache_cli", "click", "rich"},
    "kdcache_cli": set(),
}


#: Names of two things that are still to be told apart: a step of the demo, the store of a replay.
TO_RENAME = {"class Step", "class Store"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): sorted(imports(file) & FORBIDDEN[package])
        for file in files
        if imports(file) & FORBIDDEN[package]
    }
    assert wrong == {}


def module_of(file: Path, folder: Path) -> str:
    return ".".join([folder.name, *file.relative_to(folder).with_suffix("").parts])


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """The project's files that a file imports; imports for type checkers and in functions count."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {name if name in modules else node.module for name in members}
    return {name if name in modules else f"{name}.__init__" for name in targets} & modules


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = {
        module_of(file, folder): file
        for folder in PACKAGES.values()
        for file in folder.rglob("*.py")
    }
    graph = {name: imported_modules(file, set(files)) for name, file in files.items()}
    writer = graph["kdcache_stores.write.writer"]
    assert {"kdcache_stores.write.begin", "kdcache_stores.errors"} <= writer
    TopologicalSorter(graph).prepare()  # raises `CycleError`, naming the files


def test_no_two_modules_and_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            if file.stem not in ("__init__", "__main__"):
                places[file.name].append(module_of(file, folder))
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[f"class {node.name}"].append(module_of(file, folder))
    shared = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in shared.items() if name not in TO_RENAME} == {}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_stores_import_without_torch() -> None:
    assert "torch" not in modules_after("import kdcache_stores; kdcache_stores.open_store")


def test_kdcache_import_without_torch() -> None:
    assert "torch" not in modules_after("import kdcache; kdcache.open_store")


@pytest.mark.parametrize("code", [
    "import kdcache.methods.table",
    "import kdcache_cli; kdcache_cli.main(['train-student', '-h'])",
    "import kdcache_cli; kdcache_cli.main(['list', 'methods'])",
])  # fmt: skip
def test_the_table_of_methods_needs_nothing(code: str) -> None:
    assert modules_after(code).isdisjoint({"torch", "zarr", "pyarrow", "numpy"})


def test_help_needs_neither_torch_nor_zarr() -> None:
    help_page = "import kdcache_cli; kdcache_cli.main(['-h'])"
    assert modules_after(help_page).isdisjoint({"torch", "zarr", "pyarrow", "numpy"})

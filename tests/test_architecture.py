"""The shape of the code: dependencies point down and never in a circle, folders are small, names are single."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Where they are imported from: a checkout, or the place that a wheel was installed into.
PACKAGES = {
    package: Path(str(find_spec(package).origin)).parent  # type: ignore[union-attr]
    for package in ("kdcache_stores", "kdcache", "kdcache_cli")
}
FORBIDDEN = {
    "kdcache_stores": {"kdcache", "kdcache_cli", "torch", "torchvision", "click", "rich"},
    "kdcache": {"kdcache_cli", "click", "rich"},
    "kdcache_cli": set(),
}


#: Every file of the three packages by the name of its module.
MODULES = {
    ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for package, folder in PACKAGES.items()
    for file in folder.rglob("*.py")
}
MOST_FILES = 14


def imports(file: Path) -> set[str]:
    """What a file imports, those for type checkers and those within functions too."""
    result = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= {name if name in MODULES else str(node.module) for name in names}
    return result


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    roots = {file: {name.partition(".")[0] for name in imports(file)} for file in files}
    assert {file: names & FORBIDDEN[package] for file, names in roots.items()} == {
        file: set() for file in files
    }


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module: imports(file) & MODULES.keys() for module, file in MODULES.items()}
    assert "kdcache.teachers.teacher" in graph["kdcache.teachers.load"]
    TopologicalSorter(graph).prepare()  # raises `CycleError`, naming the files


def test_package_files_hold_no_code() -> None:
    code = {
        module: node.name
        for module, file in MODULES.items()
        if file.name == "__init__.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    assert code == {}


def test_no_two_modules_share_a_name() -> None:
    counts = Counter(file.stem for file in MODULES.values() if not file.stem.startswith("__"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_two_public_classes_share_a_name() -> None:
    places = defaultdict(list)
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_a_folder_is_one_idea() -> None:
    counts = Counter(file.parent for file in MODULES.values())
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def modules_after(code: str) -> set[str]:
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(process.stdout.split())


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

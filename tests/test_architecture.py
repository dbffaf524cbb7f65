"""Dependencies point down: cli -> kdcache -> kdcache_stores, and stores know no torch."""

import ast
import subprocess
import sys
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


def test_no_module_is_long() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in PACKAGES.values()
        for file in folder.rglob("*.py")
        if (lines := file.read_text().count("\n")) > 350
    }
    assert long == {}

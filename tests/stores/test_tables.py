"""Parquet is read in Arrow's own memory and in the caller's thread, at one place."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache_stores import FormatError
from kdcache_stores.format.tables import read_metadata, read_table, table_writer, write_table
from tests.stores.inspect_loop import endings, unexpected
from tests.test_architecture import PACKAGES

READERS = {"csv", "dataset", "feather", "fs", "ipc", "json", "orc", "parquet"}
"""Modules of pyarrow that read files, in threads of their own."""
OF_PYTHON = {"BufferReader", "PythonFile", "foreign_buffer", "input_stream", "py_buffer"}
"""What hands Python's memory or files to Arrow."""


def arrow_readers(source: str) -> set[str]:
    """What of pyarrow a module uses that may read in other threads, or read Python's memory."""
    uses = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            uses |= {a.name for a in node.names if a.name.partition("pyarrow.")[2] in READERS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyarrow"):
            uses |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute) and node.attr in OF_PYTHON:
            uses.add(node.attr)
    return uses


def test_one_module_reads_with_arrow() -> None:
    using = {
        file.name: uses
        for folder in PACKAGES.values()
        for file in folder.rglob("*.py")
        if (uses := arrow_readers(file.read_text()))
    }
    assert using == {"tables.py": {"pyarrow.parquet", "BufferReader"}}
    assert arrow_readers("from pyarrow import csv") == {"pyarrow.csv"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_reading_starts_no_thread(store_path: Path) -> None:
    code = (
        "import os, sys\n"
        "import pyarrow.parquet\n"
        "from kdcache_stores.format.manifest import read_manifest, read_part\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert len(read_manifest(data, 'x')) > 5 and read_part(data, 'x') is None\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store_path / "manifest.parquet")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "0\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_thread_is_left_when_a_command_ends(command: str, store_path: Path) -> None:
    """But jemalloc's own, which holds nothing of Python's; one that was joined may take a moment to go."""
    code = (
        "import os, sys, time\n"
        "from contextlib import suppress\n"
        "from kdcache_cli import main\n"
        "def names():\n"
        "    for thread in os.listdir('/proc/self/task'):\n"
        "        with suppress(FileNotFoundError, ProcessLookupError):\n"
        "            yield open(f'/proc/self/task/{thread}/comm').read()\n"
        "def count():\n"
        "    return sum(not name.startswith('jemalloc') for name in names())\n"
        "assert main([*sys.argv[1:], '--quiet']) == 0\n"
        "end = time.monotonic() + 10\n"
        "while count() > 1 and time.monotonic() < end:\n"
        "    time.sleep(.01)\n"
        "print(count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(store_path)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "1\n"


def test_a_table_and_its_metadata_come_back(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())], {b"k": b"v"})
    table = pa.table({"a": np.arange(3), "b": ["x", "y", None]}, schema)
    with table_writer(tmp_path / "t", schema) as writer:
        writer.write_table(table)
    for data in (write_table(table), (tmp_path / "t").read_bytes()):
        assert read_table(data, {"a": "int64", "b": "string?"}, 3, "t").equals(table)
        assert read_metadata(data)[b"k"] == b"v"
    for damaged in (b"", b"PAR1", write_table(table)[:-1]):
        with pytest.raises(FormatError, match="t is no Parquet file"):
            read_table(damaged, {"a": "int64"}, 3, "t")


@pytest.mark.slow
def test_no_inspect_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    (counts,) = endings(tmp_path, 400)
    assert unexpected(counts) == 0, counts
    assert counts.total() == 400

"""Names in stores and paths reach neither rich's markup nor the terminal; stores are pinned by digest."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache_cli.output import printable
from kdcache_stores.errors import explain
from tests.conftest import Result
from tests.stores.hostile import put, reseal

Run = Callable[..., Result]
GOLDEN = Path(__file__).parents[1] / "data" / "golden-train"
NASTY = "[/c]\x1b[31m\x07\u202e[red]<b>`|\nx"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "s[/c]\x1b[2J"
    shutil.copytree(GOLDEN, path)
    root = path / "zarr.json"
    for place in ("plan.dataset", "plan.split", "teacher.architecture", "teacher.precision"):
        document = json.loads(root.read_bytes())
        document["attributes"]["kdcache"]["teacher"].pop("digest", None)
        root.write_bytes(put(document, f"attributes.kdcache.{place}", NASTY))
    from kdcache_stores import StoredTeacher

    document = json.loads(root.read_bytes())
    teacher = document["attributes"]["kdcache"]["teacher"]
    teacher["digest"] = StoredTeacher.from_dict(teacher).digest
    root.write_text(json.dumps(document))
    reseal(path)
    return path


def test_commands_show_names_as_text(hostile: Path, kdcache: Run) -> None:
    for command in ("inspect", "verify", "card", "ls"):
        result = kdcache(command, hostile.parent if command == "ls" else hostile)
        assert result.code == 0, result.err
        assert "\x1b[31m" not in result.err + result.out
        assert not set("\x07\u202e") & set(result.err + result.out)
    assert "[/c]\\x1b[31m" in kdcache("inspect", hostile).err
    card = (hostile / "README.md").read_text().partition("# ")[2]
    assert not set("\x1b\x07\u202e<") & set(card)
    assert "[/c]" not in card


def test_printable() -> None:
    assert printable("a\x1b[1m\x9b\u2066é\ud800\nb") == "a\\x1b[1m\\x9b\\u2066é\\ud800\nb"


def test_a_store_is_pinned(tmp_path: Path, kdcache: Run) -> None:
    digest = kdcache("inspect", GOLDEN, "--json").json["digest"]
    wrong = "0" * 64
    for words in (["pull", GOLDEN, tmp_path / "a"], ["push", GOLDEN, tmp_path / "b"],
                  ["check", GOLDEN], ["verify", GOLDEN]):  # fmt: skip
        refused = kdcache(*words, "--expect", wrong)
        assert refused.code == 1
        assert f"has the content digest {digest}, expected {wrong}" in refused.err
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert kdcache("pull", GOLDEN, tmp_path / "a", "--expect", digest).code == 0
    refused = kdcache("train-student", "--store", GOLDEN, "--dataset", "digits", "--student", "resnet8",
                      "--method", "kd", "--out", tmp_path / "run", "--expect", wrong)  # fmt: skip
    assert refused.code == 1
    assert wrong in refused.err
    assert (
        "a digest for each of 1 stores"
        in kdcache("check", GOLDEN, "--expect", wrong, "--expect", wrong).err
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSYS, errno.ELOOP, errno.EROFS, 9999])
def test_an_error_of_the_system_has_a_path_and_a_remedy(number: int) -> None:
    text = explain(OSError(number, "why", "some/path"))
    assert text.startswith("some/path: ")
    assert ": " in text.removeprefix("some/path: ")


def test_an_error_without_a_path_is_not_given_one() -> None:
    """Of a socket, say."""
    error = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert explain(error) == str(error)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/below"])
def test_paths_that_lead_nowhere(tmp_path: Path, kdcache: Run, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for command in ("inspect", "verify"):
        result = kdcache(command, tmp_path / name)
        assert result.code == 1
        assert "error: " in result.err
        assert "Errno" not in result.err
    result = kdcache("pull", GOLDEN, tmp_path / name)
    assert result.code == 1
    assert "Errno" not in result.err


def test_a_manifest_that_is_a_folder(tmp_path: Path, kdcache: Run) -> None:
    shutil.copytree(GOLDEN, tmp_path / "s")
    (tmp_path / "s/manifest.parquet").unlink()
    (tmp_path / "s/manifest.parquet").mkdir()
    result = kdcache("inspect", tmp_path / "s")
    assert result.code == 1
    assert "no plain file" in result.err

"""Names in stores and paths reach neither rich's markup nor the terminal; stores are pinned by digest."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache_stores.errors import TrainingError, explain
from kdcache_stores.printable import printable
from tests.conftest import Result
from tests.stores.hostile import put, reseal

Run = Callable[..., Result]
GOLDEN = Path(__file__).parents[1] / "data" / "golden-train"
NASTY = "[/c]\x1b[31m\x07\u202e[red]<b>`|\nFORGED\r\t\u2028\u2066x"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / 's[/c]\x1b[2J" onload="\nFORGED'
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


def shown_as_text(result: Result) -> bool:
    """Whether no name began a line of its own or reached the terminal as a command."""
    lines = (result.out + result.err).split("\n")
    return all(line.isprintable() and not line.startswith("FORGED") for line in lines)


def test_commands_show_names_as_text(hostile: Path, tmp_path: Path, kdcache: Run) -> None:
    copy = f"{hostile}2"
    for words in (["pull", hostile, copy], ["inspect", hostile], ["verify", hostile],
                  ["ls", tmp_path], ["diff", hostile, GOLDEN], ["card", hostile],
                  ["push", copy, tmp_path / "pushed"]):  # fmt: skip
        result = kdcache(*words)
        assert result.code == (words[0] == "diff"), result.err
        assert shown_as_text(result), words
        assert ("FORGED" in result.out) == (words[0] != "push")
    assert "[/c]\\x1b[31m" in kdcache("inspect", hostile).out
    card = (hostile / "README.md").read_text().partition("# ")[2]
    assert "FORGED" in card
    assert "\nFORGED" not in card
    assert not set("\x1b\x07\u202e\u2028<") & set(card)
    assert "[/c]" not in card


def test_refusals_show_names_as_text(hostile: Path, tmp_path: Path, kdcache: Run) -> None:
    for words in (["inspect", f"{hostile}4"], ["check", hostile, "--expect", "0" * 64],
                  ["check", hostile, "--dataset", "digits"], ["push", f"{hostile}4", tmp_path / "x"],
                  ["pull", hostile, hostile.parent], ["dump-teacher", "--teacher", "x\nFORGED\x1b[2J"],
                  ["evaluate", "--model", hostile, "--dataset", "digits"], ["x\nFORGED\x1b[2J"],
                  ["report", hostile, "--out", tmp_path / "page"]):  # fmt: skip
        result = kdcache(*words)
        assert result.code, words
        assert shown_as_text(result), words
    shard = next((hostile / "logits/values/c").rglob("0"), None)
    assert shard is not None
    for file in (hostile / "logits/values/c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x" * file.stat().st_size)
    result = kdcache("verify", hostile)
    assert result.code == 1
    assert "damaged: " in result.out
    assert shown_as_text(result)


def test_the_report_shows_names_as_text(hostile: Path, tmp_path: Path, kdcache: Run) -> None:
    page = tmp_path / "page"
    result = kdcache("report", "--store", hostile, "--store", f"{hostile.parent}/./{hostile.name}",
                     "--out", page)  # fmt: skip
    assert result.code == 0, result.err
    assert shown_as_text(result)
    text = (page / "index.html").read_text()
    assert not set("\x1b\x07\u202e\u2028\u2066\r\t") & set(text)
    assert "\nFORGED" not in text
    assert '" onload="' not in text  # the command that made the page names it, quotes escaped
    assert "<b>" not in text
    names = sorted(file.name for file in page.iterdir())
    assert all(name.isprintable() for name in names)
    assert len([name for name in names if name.endswith("-mean.csv")]) == 2


def test_printable() -> None:
    assert printable("a b\x1b[1m\x9b\u2066é\ud800\n\tb") == "a b\\x1b[1m\\x9b\\u2066é\\ud800\\n\\tb"


def test_an_error_of_several_lines() -> None:
    assert str(TrainingError("two:", "- a", "- b")) == "two:\n- a\n- b"


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

"""No command that only looks changes a byte, a name or a time of change anywhere."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache_cli import main
from kdcache_stores import open_store
from kdcache_stores.format.manifest import ANNOUNCEMENT, MANIFEST, SEAL, seal_text, sha256
from kdcache_stores.format.records import announcement
from tests.conftest import Result, Trained

Run = Callable[..., Result]
State = dict[str, tuple[int, bytes | None]]

DUMP = ["dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher", "teacher"]
DRY = [*DUMP, "--dry-run", "--encoding", "float32"]
HERE = ["--dataset", "digits", "--device", "cpu"]
LOOKING: list[tuple[int, list[str]]] = [
    (0, ["-h"]),
    (0, ["--version"]),
    *((0, ["list", kind]) for kind in ("models", "datasets", "methods", "augmentations", "encodings",
                                       "recipes")),
    (0, ["ls", "."]),
    (0, ["cache"]),
    (0, ["inspect", "finished"]),
    (0, ["inspect", "growing"]),
    (1, ["inspect", "unfinished"]),
    (0, ["inspect", "damaged"]),
    (0, ["verify", "finished"]),
    (0, ["verify", "finished", "--teacher", "teacher", "--rows", "16", *HERE]),
    (1, ["verify", "damaged"]),
    (1, ["verify", "unfinished"]),
    (0, ["diff", "finished", "finished"]),
    (0, ["diff", "finished", "growing"]),
    (1, ["diff", "finished", "unfinished"]),
    (0, ["check", "finished"]),
    (0, ["check", "finished", "--student", "resnet8", "--method", "kd", *HERE]),
    (0, ["check", "--run", "student", "--device", "cpu"]),
    (0, ["evaluate", "student", "--threads", "1", *HERE]),
    (0, ["evaluate", "student", "--split", "train", "--store", "finished", "--teacher", "teacher",
         "--threads", "1", *HERE]),
    (0, [*DRY, "--views", "4", "--out", "finished"]),
    (0, [*DRY, "--views", "6", "--out", "finished"]),
    (1, [*DRY, "--views", "2", "--out", "finished"]),
    (0, [*DRY, "--views", "4", "--out", "unfinished"]),
    (0, [*DRY, "--views", "6", "--out", "unfinished"]),
    (1, [*DRY, "--views", "1", "--out", "unfinished"]),
    (1, [*DRY, "--views", "4", "--seed", "1", "--out", "unfinished"]),
    (1, [*DRY[:-1], "float16", "--views", "4", "--out", "unfinished"]),
    (0, [*DRY, "--views", "6", "--out", "growing"]),
    (0, [*DRY, "--views", "9", "--part", "1/3", "--out", "growing"]),
    (0, [*DRY, "--views", "4", "--out", "interrupted"]),
    (0, [*DRY, "--views", "2", "--out", "new/one"]),
    (0, [*DRY, "--plan-from", "finished", "--out", "new", "--out", "unfinished", "--teacher",
         "teacher"]),
    (1, [*DRY, "--views", "2", "--out", "student"]),
]  # fmt: skip
"""Expected exit codes, and what is run."""


def state(folder: Path) -> State:
    """Time of change and content of everything below a folder, links not followed."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in paths
    }


@pytest.fixture(scope="module")
def world(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with stores in every state, runs, a cache, a home and a place for temporary files."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("KDCACHE_CACHE", str(folder / "cache"))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        for name in ("temporary", "home", "cache/ab"):
            Path(name).mkdir(parents=True)
        left = Path("cache/ab/.ab.0123456789abcdef.tmp")
        left.write_bytes(b"left by a process that was killed")
        os.utime(left, (time.time() - 10**6,) * 2)
        shutil.copytree(trained.teacher, "teacher")
        shutil.copytree(trained.store, "finished")
        (folder / "finished/.zarr.json.0123456789abcdef.tmp").write_bytes(b"left behind")
        shutil.copytree(trained.store, "damaged")
        flipped = Path("damaged/samples.parquet")
        flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
        shutil.copytree(trained.store, "growing")
        part = [*DUMP, "--encoding", "float32", "--quiet", "--part", "0/2"]
        assert main([*part, "--views", "6", "--out", "growing"]) == 0
        assert main([*part, "--views", "4", "--out", "unfinished"]) == 0
        student = ["train-student", *HERE, "--student", "resnet8", "--method", "kd", "--epochs", "1",
                   "--store", "finished", "--out", "student", "--threads", "1", "--quiet"]  # fmt: skip
        assert main(student) == 0
        # A crash between the manifest of a growth and its seal.
        shutil.copytree(trained.store, "interrupted")
        manifest = sha256(Path("interrupted", MANIFEST).read_bytes())
        Path("interrupted", ANNOUNCEMENT).parent.mkdir()
        Path("interrupted", ANNOUNCEMENT).write_bytes(announcement(manifest, 4))
        Path("interrupted", SEAL).write_bytes(seal_text("0" * 64))
        Path("interrupted/records/0-0.json").write_bytes(b"{}")
        yield folder


@pytest.mark.parametrize(("code", "args"), LOOKING, ids=[" ".join(args) for _, args in LOOKING])
def test_looking_changes_nothing(code: int, args: list[str], world: Path, kdcache: Run) -> None:
    before = state(world)
    done = kdcache(*args)
    after = state(world)
    del before["temporary"], after["temporary"]  # its time; whatever is left in it would be found
    assert done.code == code, done.err
    assert after == before


def test_a_dry_run_with_other_views_leaves_a_store_that_seals(
    trained: Trained, kdcache: Run, tmp_path: Path
) -> None:
    dump = ["dump-teacher", *HERE, "--teacher", trained.teacher, "--encoding", "float32", "--out",
            tmp_path / "s"]  # fmt: skip
    for part in ("0/2", "1/2"):
        assert kdcache(*dump, "--views", 2, "--part", part).code == 0
    assert kdcache(*dump, "--views", 4, "--dry-run").code == 0
    sealed = kdcache("seal", tmp_path / "s")
    assert sealed.code == 0, sealed.err
    with open_store(tmp_path / "s") as store:
        assert store.n_views == 2


def test_a_refused_dump_leaves_an_unfinished_store_as_it_was(
    trained: Trained, kdcache: Run, tmp_path: Path
) -> None:
    dump = ["dump-teacher", *HERE, "--teacher", trained.teacher, "--encoding", "float32", "--out",
            tmp_path / "s"]  # fmt: skip
    assert kdcache(*dump, "--views", 4, "--part", "1/2").code == 0
    before = state(tmp_path)
    refused = kdcache(*dump, "--views", 1)
    assert refused.code == 1
    assert "would leave out" in refused.err
    assert state(tmp_path) == before

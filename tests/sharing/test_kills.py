"""A pull, push or import that was killed after any of its calls is repeated, and leaves nothing behind."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache_stores import (
    StoreInUse,
    StoreNotFound,
    UnfinishedStore,
    open_store,
    write_arrays,
)
from kdcache_stores.objects.files import Disk
from kdcache_stores.share.card import write_card
from kdcache_stores.share.pull import pull_store
from kdcache_stores.share.push import push_store
from tests.stores.conftest import (
    dump,
    make_logits,
    make_samples,
    open_writer,
    tree,
    write_pending,
)
from tests.stores.faults import LossyDisk, QuickDisk, after_power_cut, restore

Transfer = Callable[[Path, Path, Disk], object]

TRANSFERS: dict[str, tuple[Transfer, Transfer | None]] = {
    "pull": (lambda store, path, disk: pull_store(store, path, disk=disk), None),
    "pull more views": (
        lambda store, path, disk: pull_store(store, path, disk=disk),
        lambda store, path, disk: pull_store(store, path, (0, 1), disk=disk),
    ),
    "pull a part": (lambda store, path, disk: pull_store(store, path, (1, 3), disk=disk), None),
    "push": (lambda store, path, disk: push_store(store, str(path), disk=disk), None),
    "import": (
        lambda store, path, disk: write_arrays(
            path, make_logits(0, 30), samples=make_samples(30), shard_rows=15, disk=disk
        ),
        None,
    ),
}
VIEWS = {"pull a part": "2", "import": "1"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three views of 30 samples in two shards each, with cards."""
    path = dump(tmp_path / "local" / "toy.zarr", samples=make_samples(30), shard_rows=15)
    write_card(path)
    return path


def kill_everywhere(small: Path, name: str, keep: float, stride: int) -> set[str]:
    """What a reader saw of the target after each kill."""
    transfer, before = TRANSFERS[name]
    folder = small.parents[1]
    target = folder / "target" / "toy.zarr"
    if before is not None:
        before(small, target, QuickDisk())
    first = {str(target / key): data for key, data in tree(target).items()}
    disk = LossyDisk()
    transfer(small, target, disk)
    whole, seen, rng = tree(target), set(), random.Random(1)
    for cut in [*range(0, len(disk.log), stride), len(disk.log)]:
        again = folder / "again" / "toy.zarr"
        shutil.rmtree(again.parent, ignore_errors=True)
        restore(after_power_cut(first, disk.log[:cut], rng, keep), target, again)
        if name != "import":  # which takes no such lock
            (again / "records").mkdir(exist_ok=True)
            (again / "records/transfer.lock").write_bytes(b"process 7 on some-host\n")
        try:
            seen.add(str(open_store(again).n_views))
        except (UnfinishedStore, StoreNotFound) as error:
            seen.add(type(error).__name__)
        transfer(small, again, QuickDisk())
        assert tree(again) == whole, f"killed after call {cut}"
        assert not (again / "records").exists()
    return seen


@pytest.mark.parametrize("name", TRANSFERS)
def test_killed_after_any_call(small: Path, name: str) -> None:
    seen = kill_everywhere(small, name, keep=1.0, stride=3)
    unsealed = {"UnfinishedStore", "StoreNotFound"} if name != "pull more views" else {"1"}
    assert seen == unsealed | {VIEWS.get(name, "3")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_power_cut_after_every_call(small: Path, name: str, keep: float) -> None:
    kill_everywhere(small, name, keep, stride=1)


def test_a_dump_at_work_or_stopped_is_no_pull(small: Path, tmp_path: Path) -> None:
    with open_writer(tmp_path / "dump", samples=make_samples(30), shard_rows=15) as writer:
        with writer.files.lock("records/0-0.lock"), pytest.raises(StoreInUse, match="unfinished"):
            pull_store(small, tmp_path / "dump")
        write_pending(writer, 1)
    with pytest.raises(StoreInUse, match="unfinished dump"):
        pull_store(small, tmp_path / "dump")


def test_what_a_kill_left_before_the_root_is_no_store(small: Path, tmp_path: Path) -> None:
    for name in ("dumped", "pulled", "pushed"):
        (tmp_path / name / "records").mkdir(parents=True)
        (tmp_path / name / "records/transfer.lock").write_text("process 7 on some-host\n")
        (tmp_path / name / ".zarr.json.0123456789abcdef.tmp").write_text("{")
    dump(tmp_path / "dumped", samples=make_samples(30), shard_rows=15)
    pull_store(small, tmp_path / "pulled")
    push_store(small, str(tmp_path / "pushed"))
    names = {path: set(tree(tmp_path / path)) for path in ("dumped", "pulled", "pushed")}
    assert names["dumped"] | {"README.md", "croissant.json"} == names["pulled"] == names["pushed"]

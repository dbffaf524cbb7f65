"""Kill a dump with SIGKILL at random times until it finishes, again and again.

    python kill_loop.py FOLDER KILLS SEED ENCODING

After each kill every committed shard must be whole, and a store that opens must hold the right
logits; at the end of each dump the store must equal, byte for byte, one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from kdcache_stores import StoreNotFound, UnfinishedStore
from tests.stores.conftest import tree
from tests.stores.test_faults import check_committed, check_views, small_dump


def dump_in_child(path: Path, encoding: str, kill_after: float | None = None) -> tuple[bool, float]:
    """Whether the dump finished, and how long it took, in a child that may be killed."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            small_dump(path, views=1, encoding=encoding)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False, time.monotonic() - begin
    assert os.WEXITSTATUS(status) == 0, "the dump failed"
    return True, time.monotonic() - begin


def main(folder: Path, wanted: int, seed: int, encoding: str) -> None:
    rng = random.Random(seed)
    small_dump(
        folder / "whole", views=1, encoding=encoding
    )  # here: has everything imported before the forks
    longest = max(dump_in_child(folder / f"timed-{i}", encoding)[1] for i in range(3))
    whole = tree(folder / "whole")
    kills = dumps = resumed = 0
    path = folder / "killed"

    def enough() -> bool:
        """Few kills may all come before the first shard: then there are some more."""
        return kills >= wanted and (resumed > kills // 100 or kills >= wanted + 200)

    while not enough() or not dumps:
        # The last one may finish, however slow the machine has become.
        finished, _ = dump_in_child(path, encoding, None if enough() else rng.uniform(0, longest))
        if not finished:
            kills += 1
            if path.exists() and (path / "zarr.json").exists():
                committed = check_committed(path, views=1, encoding=encoding)
                resumed += committed > 0
            with contextlib.suppress(UnfinishedStore, StoreNotFound):
                check_views(path, encoding)
            continue
        assert tree(path) == whole
        dumps += 1
        shutil.rmtree(path)
    assert resumed > kills // 100
    print(f"{kills} kills, {resumed} of them after a shard was committed, {dumps} dumps finished")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

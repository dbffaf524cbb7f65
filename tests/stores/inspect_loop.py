"""Run `kdcache inspect` again and again, four at a time, and count how the processes ended.

    python inspect_loop.py FOLDER RUNS [AT_ONCE]

Every second run is of a store whose basis has a flipped bit: it must exit with 1, the others with
0. Prints the number of runs per store and exit code (negative: the signal that killed it), and ends
with 1 if there is another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.stores.test_faults import small_dump

EXPECTED = {"sound": 0, "damaged": 1}
PAUSE = 500
"""Runs after which the counts so far are printed."""


def make_stores(folder: Path) -> None:
    """A sound store and a damaged copy, unless they are there; both are parsed by Arrow."""
    sound, damaged = (folder / name for name in EXPECTED)
    if damaged.exists():
        return
    small_dump(sound, views=2, encoding="compact")
    shutil.copytree(sound, damaged)
    basis = max((damaged / "logits" / "basis" / "c").rglob("*"), key=lambda path: path.is_file())
    data = bytearray(basis.read_bytes())
    data[len(data) // 2] ^= 1
    basis.write_bytes(data)


def inspect(path: Path) -> int:
    """The exit code of one `kdcache inspect`; negative: minus the signal that ended it."""
    command = [sys.executable, "-m", "kdcache", "inspect", str(path), "--json"]
    return subprocess.run(command, capture_output=True, env=os.environ, check=False).returncode


def endings(folder: Path, runs: int, at_once: int = 4) -> Iterator[Counter[tuple[str, int]]]:
    """Counts of (store, exit code), after every `PAUSE` runs and at the end."""
    make_stores(folder)
    counts: Counter[tuple[str, int]] = Counter()
    names = list(EXPECTED)
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, runs, PAUSE):
            chosen = [names[i % 2] for i in range(start, min(start + PAUSE, runs))]
            codes = pool.map(inspect, [folder / name for name in chosen])
            counts.update(zip(chosen, codes, strict=True))
            yield counts


def unexpected(counts: Counter[tuple[str, int]]) -> int:
    """How many runs ended otherwise than they must."""
    return sum(n for (name, code), n in counts.items() if code != EXPECTED[name])


def main(folder: Path, runs: int, at_once: int = 4) -> int:
    for counts in endings(folder, runs, at_once):
        lines = [f"{name} exit {code}: {n}" for (name, code), n in sorted(counts.items())]
        print(
            f"{counts.total()} runs, {unexpected(counts)} unexpected; {'; '.join(lines)}",
            flush=True,
        )
    return int(unexpected(counts) > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))

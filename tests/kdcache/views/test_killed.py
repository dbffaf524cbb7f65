"""A loop of one's own, killed in the middle of an epoch, ends as one that was never interrupted."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Trained

ROOT = Path(__file__).parents[3]


def start(kind: str, workers: int, store: Path, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join(str(ROOT / part) for part in ("", "stores", "cli"))
    words = [kind, str(workers), str(store), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kdcache.views.killed_loop", *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def steps(folder: Path) -> dict[int, str]:
    """What each step saw and lost, of whole lines; a step that was taken twice counts once, if alike."""
    file, taken = folder / "steps", dict[int, str]()
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            number, _, rest = line.partition(" ")
            assert taken.setdefault(int(number), rest) == rest
    return taken


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("views", 0), ("stateful", 0), ("stateful", 2)])
def test_killed_in_mid_epoch_it_ends_alike(
    trained: Trained, tmp_path: Path, kind: str, workers: int
) -> None:
    if kind == "stateful" and importlib.util.find_spec("torchdata") is None:
        pytest.skip("needs torchdata, of the extra kdcache[examples]")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(kind, workers, trained.store, whole).wait() == 0
    total = len(steps(whole))
    for wanted in (
        total // 7,
        total // 2,
        total - 5,
    ):  # of an epoch the first half, the middle, the end
        process = start(kind, workers, trained.store, cut)
        while len(steps(cut)) < wanted:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (cut / "weights").exists()
    assert start(kind, workers, trained.store, cut).wait() == 0
    assert steps(cut) == steps(whole)
    ends = [torch.load(folder / "weights") for folder in (cut, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])

"""One training writes a run: a second is told who does, and a killed one leaves no obstacle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdcache import train
from kdcache.runs import LOCK, read_metrics, writing
from kdcache_stores import TrainingError
from kdcache_stores.objects.files import LocalFiles
from tests.kdcache.training.job import training
from tests.kdcache.training.test_ranks import ROOT

LONG = {"optimization": {"epochs": 10_000, "batch_size": 25}}
SHORT = {"optimization": {"epochs": 3, "batch_size": 25}}


def process(out: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
    options = options | {"checkpoint_every": "1"}
    path = os.pathsep.join(str(ROOT / part) for part in ("", "stores", "cli"))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kdcache.training.job", json.dumps([[str(out), options]])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(run, LONG) as first:
        try:
            wait_for(run / "checkpoint.pt")
            who = f"process {first.pid} on {socket.gethostname()}"
            with pytest.raises(TrainingError, match=f"{who}.* end it"):
                train(training(LONG), run)
        finally:
            first.send_signal(signal.SIGKILL)
    assert (run / LOCK).exists()
    done = len(read_metrics(run))
    with process(run, LONG) as second:
        try:
            until = time.monotonic() + 60
            while len(read_metrics(run)) <= done + 1:
                assert second.poll() is None, second.communicate()[1]
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            second.send_signal(signal.SIGKILL)
    epochs = [record["epoch"] for record in read_metrics(run)]
    assert epochs == list(range(1, len(epochs) + 1))


def test_nothing_is_left_of_the_lock_of_a_run_that_ended(tmp_path: Path) -> None:
    run = train(training(SHORT), tmp_path / "run").path
    assert not (run / LOCK).exists()
    with pytest.raises(TrainingError, match="loss became"):
        train(
            training({"optimization": {"epochs": 3, "lr": 1e30, "batch_size": 5}}),
            tmp_path / "wild",
        )
    assert not (tmp_path / "wild" / LOCK).exists()


def test_a_finished_run_needs_no_lock(tmp_path: Path) -> None:
    run = train(training(SHORT), tmp_path / "run").path
    with LocalFiles(run).lock(LOCK):
        assert train(training(SHORT), run).summary() is not None


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on elsewhere\n")
    with writing(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(TrainingError, match=f"process {os.getpid()} "), writing(tmp_path):
            raise AssertionError("two writers")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_lock_goes_when_it_is_empty(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with files.lock("records/1.lock"):
        with files.lock("records/2.lock"):
            pass
        assert [file.name for file in (tmp_path / "records").iterdir()] == ["1.lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_lock_file_claims_is_not_printed_unless_it_is_a_process(tmp_path: Path) -> None:
    with LocalFiles(tmp_path).lock("x.lock"):
        (tmp_path / "x.lock").write_bytes(b"\x1b[2Jprocess 1 on a\n")
        with (
            pytest.raises(Exception, match="another process is writing"),
            LocalFiles(tmp_path).lock("x.lock"),
        ):
            raise AssertionError("two holders")


def test_a_forked_worker_does_not_hold_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from kdcache_stores.objects.files import LocalFiles\n"
        "with LocalFiles(sys.argv[1]).lock('x.lock'):\n"
        "    if os.fork() == 0:\n"
        "        open(sys.argv[1] + '/child', 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "stores")])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    child = tmp_path / "child"
    try:
        until = time.monotonic() + 60
        while not (child.exists() and child.read_text()):
            assert time.monotonic() < until
            time.sleep(0.01)
        parent.kill()
        parent.wait()
        with LocalFiles(tmp_path).lock("x.lock"):
            pass
    finally:
        parent.kill()
        os.kill(int(child.read_text()), signal.SIGKILL)

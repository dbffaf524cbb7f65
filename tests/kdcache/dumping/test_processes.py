"""Whole processes: killed and run again, and several that share a dump."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from kdcache.distributed import PATIENCE, Ranks, join
from kdcache_cli import main
from tests.conftest import Trained
from tests.kdcache.dumping.conftest import tree


@dataclass(frozen=True)
class Job:
    """A dump as a command, and the store of one process that nothing interrupted."""

    teacher: Path
    encoding: str
    fields: str
    views: int
    shard_rows: int
    whole: dict[str, bytes]

    def words(self, out: Path) -> list[str]:
        return ["dump-teacher", "--dataset", "digits", "--teacher", str(self.teacher), "--out",
                str(out), "--views", str(self.views), "--shard-rows", str(self.shard_rows),
                "--encoding", self.encoding, "--fields", self.fields,
                "--device", "cpu", "--threads", "1", "--batch-size", "64", "--quiet"]  # fmt: skip

    @property
    def shards(self) -> int:
        """How many records the whole has: digits train on 1,437 images."""
        return self.views * -(-1437 // self.shard_rows)


def start(args: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


# Compact stores ask more of several processes: they share what is fitted, and every base. A single view
# of many rows is shared, and goes on, shard by shard.
@pytest.fixture(
    scope="module",
    params=[
        ("compact:1e-3", "logits,pooled", 12, 65_536),
        pytest.param(("float16", "logits", 1, 128), marks=pytest.mark.slow),
        pytest.param(("float16", "logits", 12, 65_536), marks=pytest.mark.slow),
    ],
    ids=["compact", "one view", "float16"],
)
def job(
    request: pytest.FixtureRequest, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    out = tmp_path_factory.mktemp("whole") / "s.zarr"
    job = Job(trained.teacher, *request.param, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        assert main(job.words(out)) == 0
    job.whole.update(tree(out))
    return job


def wait_for_records(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(out.glob("records/*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def test_killed_and_run_again(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    process = start(["-m", "kdcache", *job.words(out)])
    wait_for_records(out, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 <= len(list(out.glob("records/*.json"))) < job.shards
    assert main(job.words(out)) == 0
    assert tree(out) == job.whole


@pytest.mark.slow
def test_ctrl_c_of_a_process(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    command = job.words(out)[:-1]
    process = start(["-m", "kdcache", *command])
    wait_for_records(out, 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    again = next(line for line in said.splitlines() if "to go on: kdcache " in line)
    assert main(again.partition("to go on: kdcache ")[2].split()) == 0
    assert tree(out) == job.whole


def ranks(out: Path, job: Job) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(["-m", "kdcache", *job.words(out)], RANK=str(rank), LOCAL_RANK=str(rank),
              WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_rank_is_killed_and_the_job_restarted(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    first, second = ranks(out, job)
    wait_for_records(out, 3, first)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    time.sleep(0.2)
    first.kill()  # as torchrun does with those that are left
    first.communicate()
    assert not (out / "manifest.sha256").exists()
    for process in ranks(out, job):
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert tree(out) == job.whole


def test_torchrun(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    process = start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                     "kdcache", *job.words(out)[:-1]])  # fmt: skip
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert said.count("estimate:") == 1  # rank 0 alone speaks
    assert tree(out) == job.whole


def test_alone_the_first_rank_just_does_it() -> None:
    assert Ranks().on_first(lambda: 3) == 3
    Ranks().wait()


def test_a_world_that_torchrun_did_not_start_is_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As cluster schedulers set it: neither a dump nor a training waits for others."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with join("cpu", "gloo", PATIENCE) as (ranks, device):
        assert (ranks, device) == (Ranks(), "cpu")

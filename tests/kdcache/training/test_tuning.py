"""What a training asks of its process, and how seldom it may be measured."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache import train
from kdcache.runs import Run, read_config, read_metrics, read_summary
from kdcache.training.tuning import hold_freed_memory, tuned
from kdcache_stores import MismatchError, UsageError
from tests.kdcache.training.job import training

HOW = {"optimization": {"epochs": 5, "batch_size": 25}}

HELD = """
import resource
import numpy as np
from kdcache.training.tuning import hold_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        big = [np.ones(200_000) for _ in range(20)]
        del big
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
assert hold_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MB taken and freed again and again: until it is held, the system maps it anew each time."""
    done = subprocess.run([sys.executable, "-c", HELD], check=True, capture_output=True, text=True)
    usual, held = map(int, done.stdout.split())
    assert held < 100 < usual
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not hold_freed_memory()  # whoever sets it has chosen


def test_a_run_says_what_computed_it(tmp_path: Path) -> None:
    run = train(training(HOW), tmp_path / "run")
    said = read_config(run.path)["computing"]
    assert said == {"torch": str(torch.__version__), "float32_matmul": "highest", "graph": False}


def test_what_computes_may_change(tmp_path: Path) -> None:
    config = {"training": {"seed": 1}, "computing": {"torch": "2.11.0"}}
    Run(tmp_path / "run", config)
    Run(tmp_path / "run", config | {"computing": {"torch": "2.15.0", "gpu": "H100"}})
    with pytest.raises(MismatchError, match=r"training\.seed"):
        Run(tmp_path / "run", config | {"training": {"seed": 2}})


def test_a_cpu_is_left_alone() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    with tuned(training(HOW)):
        assert (cudnn.benchmark, cudnn.allow_tf32) == before


def test_evaluation_every_so_many_epochs_and_after_the_last(tmp_path: Path) -> None:
    usual = train(training(HOW), tmp_path / "usual")
    seldom = train(training(HOW | {"eval_every": 2}), tmp_path / "seldom")
    records = read_metrics(seldom.path)
    assert [r["epoch"] for r in records if "test_top1" in r] == [2, 4, 5]
    assert [r["train_loss"] for r in records] == [r["train_loss"] for r in read_metrics(usual.path)]
    summary = read_summary(seldom.path)
    assert summary["last_top1"] == records[-1]["test_top1"]
    assert summary["best_epoch"] in (2, 4, 5)
    assert read_config(seldom.path)["training"]["eval_every"] == 2
    with pytest.raises(UsageError, match="--eval-every 0"):
        training({"eval_every": 0})


def test_a_run_is_measured_in_the_precision_that_it_trains_in(tmp_path: Path) -> None:
    """The logits of the last epoch are those of the network under autocast."""
    from kdcache import load_dataset
    from kdcache.evaluation.scores import clean_logits, scores
    from kdcache.preprocessing import autocast
    from kdcache.runs import load_run_model

    run = train(training(HOW | {"precision": "bf16"}), tmp_path / "run")
    model = load_run_model(run.path, allow_code=True)

    def network(images: torch.Tensor) -> torch.Tensor:
        with autocast(torch.device("cpu"), "bf16"):
            logits: torch.Tensor = model.module(model.preprocessing(images))
        assert logits.dtype == torch.bfloat16
        return logits

    expected = scores(*clean_logits(network, load_dataset("digits", "test")))
    last = read_metrics(run.path)[-1]
    assert {name: last[f"test_{name}"] for name in expected} == expected


def test_curves_show_the_epochs_that_were_measured(tmp_path: Path) -> None:
    from kdcache.report.collect import grouped, read_run
    from kdcache.report.sections.training_section import series

    run = train(training(HOW | {"eval_every": 2}), tmp_path / "run")
    measured = series(grouped([read_run(run.path)])[0], "test_top1")
    assert measured is not None
    epochs, values = measured
    assert epochs == [2, 4, 5]
    assert values.shape == (3, 1)

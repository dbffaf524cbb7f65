"""The demo: its commands are its steps, its table is its runs', and it claims no more than they show."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest

from kdcache import demo
from kdcache.runs import read_config
from kdcache_cli.app import app
from tests.conftest import Result


class End(Exception):
    """The last call is made; what would follow is the work."""


def test_each_command_repeats_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def together(trainings: Any, outs: Any, *_: Any, **__: Any) -> None:
        asked.append((list(trainings), [Path(out) for out in outs]))
        raise End

    def alone(training: Any, out: Any, *_: Any, **__: Any) -> None:
        together([training], [out])

    monkeypatch.setattr(demo, "train", alone)
    monkeypatch.setattr(demo, "train_together", together)
    monkeypatch.setattr("kdcache.training.preparation.train_together", together)
    teacher, store, *students = demo.steps(tmp_path)
    assert [step.title for step in students] == [f"students, seed {seed}" for seed in demo.SEEDS]
    for before, step in pairwise(students):
        differing = step.brief.removeprefix("... ")
        same = before.command.split(" --seed ")[0]
        assert step.command.startswith(f"{same} {differing} ")
    assert not students[0].brief
    for step in (teacher, *students):
        with pytest.raises(End):
            step.run(None)
        with pytest.raises(End):
            app.main(shlex.split(step.command)[1:], standalone_mode=False)
    for library, command in zip(asked[::2], asked[1::2], strict=True):
        assert library == command
    words = shlex.split(store.command)[1:]
    dumping = app.get_command(click.Context(app), words[0])
    assert dumping is not None
    given = dumping.make_context(words[0], words[1:]).params
    assert (given["views"], given["encoding"]) == (demo.VIEWS, {"logits": demo.ENCODING})


def finished(out: Path, top1: Mapping[str, Callable[[int], float]]) -> None:
    for method, of_seed in top1.items():
        for seed in demo.SEEDS:
            path = demo.run_path(out, method, seed)
            path.mkdir(parents=True)
            summary = {"last_top1": of_seed(seed), "teacher_forwards": 0}
            (path / "summary.json").write_text(json.dumps(summary))


def test_the_table_is_of_the_runs_and_claims_what_they_show(tmp_path: Path) -> None:
    finished(tmp_path, {
        "ce": lambda seed: 0.5 + 0.01 * seed,
        "kd": lambda seed: 0.6 + 0.01 * seed + 0.01 * (-1) ** seed,
        "kd+std": lambda seed: 0.5 + 0.01 * seed + 0.01 * (-1) ** seed,
        "kd+std+noise": lambda seed: 0.4 + 0.01 * seed + 0.01 * (-1) ** seed,
    })  # fmt: skip
    ce, kd, std, noise = demo.results(tmp_path)["rows"]
    assert ce["minus_ce"] is None
    assert ce["top1_mean"] == pytest.approx(0.5 + 0.005 * (len(demo.SEEDS) - 1))
    # Differences of +1 and -1 points around the mean: s = 0.01 sqrt(n / (n - 1)), the error s / sqrt(n).
    error = 0.01 / (len(demo.SEEDS) - 1) ** 0.5
    assert kd["minus_ce"]["mean"] == pytest.approx(0.1)
    assert kd["minus_ce"]["error"] == pytest.approx(error)
    assert 0.1 - kd["minus_ce"]["low"] == pytest.approx(kd["minus_ce"]["high"] - 0.1)
    assert 2 * error < kd["minus_ce"]["high"] - 0.1 < 2.5 * error
    assert kd["minus_ce"]["leads"]
    assert not std["minus_ce"]["leads"]  # a mean of nothing
    assert not noise["minus_ce"]["leads"]  # far away, on the other side
    assert demo.verdict(kd).startswith("kd leads ce by 10.00 points (95% interval +")
    assert demo.verdict(std).startswith("kd+std: no lead over ce is shown (+0.00 points")
    assert demo.verdict(noise).startswith("kd+std+noise: no lead over ce is shown (-10.00 points")


@pytest.mark.slow
def test_the_whole_demo_shows_a_lead_and_its_report(
    kdcache: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    done = kdcache("demo", "--out", out, "--json", "--quiet")
    assert done.code == 0
    rows = {row["method"]: row["minus_ce"] for row in done.json["rows"]}
    assert rows["kd"]["leads"]
    assert rows["kd+std"]["leads"]
    assert all(read_config(Path(run)) for run in done.json["runs"])
    again = kdcache("demo", "--out", out)
    assert "kd+std leads ce by" in again.out
    page = kdcache("report", out, "--store", out / "teacher.zarr", "--out", tmp_path / "page")
    assert page.code == 0
    assert f"{4 * len(demo.SEEDS) + 1} runs" in (tmp_path / "page" / "index.html").read_text()

"""Runs become groups over seeds, and groups are compared with their baseline."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kdcache.report.collect import Spread, baseline_of, difference, find_runs, grouped, read_run
from kdcache.report.side_by_side import means_over_seeds
from kdcache_stores import DataError


def write_run(path: Path, top1: float, *, method: str = "ce", seed: int = 0, finished: bool = True,
              model: str = "resnet8", **training: Any) -> Path:  # fmt: skip
    path.mkdir(parents=True)
    config = {
        "kdcache": "0.1.0",
        "data": {"name": "digits", "train_samples": 50, "view_seed": seed},
        "model": {"name": model},
        "objective": {"method": method},
        "training": {"seed": seed, "epochs": 2, "lr": 0.1, "device": "cpu", **training},
    }
    (path / "config.toml").write_text(tomli_w.dumps(config))
    records = [{"epoch": e, "test_top1": top1 - 0.1 * (2 - e), "train_loss": 1.0} for e in (1, 2)]
    if not finished:
        records.pop()
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        (path / "summary.json").write_text(json.dumps({"last_top1": top1, "best_top1": top1}))
    return path


def test_runs_that_differ_only_in_seed_are_one_group(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", 0.5, seed=1, device="cuda"),
        write_run(tmp_path / "b", 0.6, seed=0, threads=1),
        write_run(tmp_path / "c", 0.7, method="kd"),
        write_run(tmp_path / "d", 0.7, method="kd", lr=0.2),
        write_run(tmp_path / "e", 0.9, model="resnet20"),
    ]
    groups = grouped([read_run(path) for path in paths])
    assert [[run.path.name for run in group.runs] for group in groups] == [
        ["b", "a"], ["c"], ["d"], ["e"]]  # fmt: skip
    assert [group.label for group in groups] == [
        "resnet8 ce", "resnet8 kd (lr=0.1)", "resnet8 kd (lr=0.2)", "resnet20 ce"]  # fmt: skip
    assert groups[0].values("last_top1") == {0: 0.6, 1: 0.5}
    assert baseline_of(groups[1], groups) is groups[0]
    assert baseline_of(groups[0], groups) is None
    assert baseline_of(groups[3], groups) is None


def test_seeds_that_were_shown_one_choice_of_samples_are_a_group_of_their_own(
    tmp_path: Path,
) -> None:
    def run(name: str, seed: int, data_seed: int) -> Path:
        path = write_run(tmp_path / name, 0.5, seed=seed)
        config = tomllib.loads((path / "config.toml").read_text())
        config["data"] |= {"seed": data_seed, "view_seed": 0}
        (path / "config.toml").write_text(tomli_w.dumps(config))
        return path

    paths = [
        *(run(f"own{seed}", seed, seed) for seed in (1, 2, 3)),
        *(run(f"of9-{seed}", seed, 9) for seed in (4, 5, 6)),
        run("of7", 1, 7),
    ]
    groups = grouped([read_run(path) for path in paths])
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2, 3], [4, 5, 6], [1]]


def test_seeds_whose_stores_lie_elsewhere_are_one_group(tmp_path: Path) -> None:
    def run(name: str, seed: int, digest: str, more: dict[str, Any]) -> Path:
        path = write_run(tmp_path / name, 0.5, method="kd", seed=seed)
        config = tomllib.loads((path / "config.toml").read_text())
        config["data"] |= {"view_seed": 0, "root": f"/data/{name}"}
        config |= {
            "stores": [{"digest": digest, "plan": "p"}],
            "store_paths": [f"/{name}/s.zarr"],
        } | more
        (path / "config.toml").write_text(tomli_w.dumps(config))
        return path

    paths = [
        run("a", 0, "one", {}),
        run("b", 1, "one", {"kdcache": "9.0", "resumed": [{"after_epoch": 1, "kdcache": "9.1"}]}),
        run("c", 0, "another", {}),
    ]
    groups = grouped([read_run(path) for path in paths])
    assert [[r.path.name for r in group.runs] for group in groups] == [["a", "b"], ["c"]]


def test_the_nearest_baseline_is_taken(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", 0.5, lr=0.1),
        write_run(tmp_path / "b", 0.5, lr=0.2),
        write_run(tmp_path / "c", 0.7, method="kd", lr=0.2),
    ]
    groups = grouped([read_run(path) for path in paths])
    assert baseline_of(groups[2], groups) is groups[1]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, 0.5)) for name in ("a", "b")]
    with pytest.raises(DataError, match="equal configuration and seed 0"):
        grouped(runs)


def test_an_unfinished_run_speaks_by_its_metrics(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", 0.5, finished=False))
    assert run.summary is None
    [group] = grouped([run])
    assert group.values("last_top1") == {0: pytest.approx(0.4)}
    assert group.values("best_top1") == {}


def test_folders_of_runs_are_searched(tmp_path: Path) -> None:
    b, a = write_run(tmp_path / "x" / "b", 0.5), write_run(tmp_path / "x" / "a", 0.5)
    (tmp_path / "x" / "no-run").mkdir()
    assert find_runs([tmp_path / "x"]) == [a, b]
    assert find_runs([b, tmp_path / "x"]) == [b, a]
    with pytest.raises(DataError, match="is not a run and holds none"):
        find_runs([tmp_path / "x" / "no-run"])


def test_a_config_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[training]\nseed = 1\n")
    with pytest.raises(DataError, match=r"training\.epochs"):
        read_run(tmp_path)


def test_paired_difference() -> None:
    gap = difference({0: 0.52, 1: 0.55, 2: 0.61}, {0: 0.50, 1: 0.52, 2: 0.57})
    assert gap is not None
    assert gap.paired
    assert gap.mean == pytest.approx(0.03)
    assert gap.error == pytest.approx(0.01 / math.sqrt(3))  # differences 0.02, 0.03, 0.04


def test_unpaired_difference() -> None:
    gap = difference({0: 1.0, 1: 3.0}, {5: 0.0, 6: 2.0, 7: 4.0})
    assert gap is not None
    assert not gap.paired
    assert gap.mean == pytest.approx(0.0)
    assert gap.error == pytest.approx(math.sqrt(2 / 2 + 4 / 3))
    assert difference({}, {0: 1.0}) is None


def test_one_seed_has_no_spread() -> None:
    single = Spread.of([0.5])
    assert single is not None
    assert math.isnan(single.std)
    assert Spread.of([]) is None
    alone = difference({0: 0.6}, {0: 0.5})
    assert alone is not None
    assert math.isnan(alone.error)


def test_a_curve_shows_its_first_epoch_and_both_axes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure as Canvas

    from kdcache.report import figures
    from kdcache.report.sections import training_section

    run = write_run(tmp_path / "a", 0.9)
    tops = [0.02, *[0.9 + epoch / 1000 for epoch in range(39)]]
    lines = (json.dumps({"epoch": e + 1, "test_top1": top}) + "\n" for e, top in enumerate(tops))
    (run / "metrics.jsonl").write_text("".join(lines))
    limits = []

    def watched(*args: Any, **options: Any) -> Any:
        axes = Canvas().add_subplot()
        args[2](axes)
        limits.append(axes.get_ylim())
        return figures.figure(*args, **options)

    monkeypatch.setattr(training_section, "figure", watched)
    training_section.curve(grouped([read_run(run)]), "test_top1")
    assert limits[0][0] < 2 < 93.9 < limits[0][1]
    with pytest.raises(ValueError, match="needs a label on both axes"):
        figures.figure("x", "x", lambda axes: axes.set(xlabel="a"), alt="", columns=(), rows=())


def test_means_over_seeds_and_what_they_gain(tmp_path: Path) -> None:
    top1 = {"ce": (0.50, 0.54, 0.52), "kd": (0.46, 0.49, 0.47)}
    runs = [
        write_run(tmp_path / f"{method}{seed}", value, method=method, seed=seed)
        for method, values in top1.items()
        for seed, value in enumerate(values)
    ]
    runs.append(write_run(tmp_path / "kd-again", 0.46, method="kd"))
    ce, kd = means_over_seeds(runs)
    assert (ce.label, ce.top1.n, ce.baseline) == ("ce", 3, None)
    assert (kd.label, kd.baseline, kd.top1.n) == ("kd", "ce", 3)
    assert kd.gain is not None
    assert kd.gain.mean == pytest.approx(-0.14 / 3)
    assert kd.gain.half == pytest.approx(4.3027 * 0.0057735 / math.sqrt(3), rel=1e-4)
    (_, alone) = means_over_seeds([runs[0], runs[3]])
    assert alone.gain is not None
    assert math.isnan(alone.gain.half)

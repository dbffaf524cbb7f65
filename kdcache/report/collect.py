"""Runs read from their directories, grouped over seeds, and compared with a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from kdcache.methods.table import without_teacher
from kdcache.runs import SUMMARY, flatten, is_run, read_config, read_metrics, read_summary
from kdcache_stores.errors import DataError
from kdcache_stores.printable import printable

# What may differ between runs of one group: the seed, and what has no part in the result.
_NOT_THE_SAME = {"training.seed", "peers", "training.device", "training.threads", "data.root", "store_paths",
                 "kdcache", "resumed"}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on the disk.

    Attributes:
        path: its directory.
        config: resolved configuration.
        metrics: records of the finished epochs.
        summary: None while the run is not finished.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.config["training"]["seed"])

    @property
    def data_seed(self) -> int:
        """Seed of what the network was shown."""
        return int(self.config["data"].get("seed", self.seed))

    @property
    def epochs(self) -> int:
        """Epochs that the run is to have."""
        return int(self.config["training"]["epochs"])

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the seed that decides the result, as flat names."""
        tables = {k: v for k, v in self.config.items() if k not in _NOT_THE_SAME}
        flat = {k: v for k, v in flatten(tables).items() if k not in _NOT_THE_SAME}
        if self.data_seed == self.seed:
            flat.pop("data.seed", None)
        # Widths are what its pruning came to.
        flat = {k: v for k, v in flat.items() if not k.startswith("model.widths.")}
        if "stores" not in tables:
            flat.pop("data.view_seed", None)  # without a store the views follow the training's seed
        return flat

    def last(self, name: str) -> float | None:
        """A figure of the last finished epoch, or None."""
        value = self.metrics[-1].get(name) if self.metrics else None
        return None if value is None else float(value)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, in the order of the seeds; the label tells groups apart."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that its runs share."""
        return self.runs[0].settings

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.runs[0].config["objective"]["method"])

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.runs[0].config["model"]["name"])

    def values(self, name: str) -> dict[int, float]:
        """seed -> an entry of the summary, or the same figure of the last epoch so far."""
        by_seed = {}
        for run in self.runs:
            value = (run.summary or {}).get(name)
            if value is None and name.startswith("last_"):
                value = run.last(f"test_{name.removeprefix('last_')}")
            if value is not None:
                by_seed[run.seed] = float(value)
        return by_seed


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of n values; the deviation of one is NaN."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of some values, or None if there are none."""
        numbers = list(values)
        if not numbers:
            return None
        return cls(fmean(numbers), stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers))


class Difference(NamedTuple):
    """How far a group's mean is from the baseline's.

    Attributes:
        mean: of the differences, or difference of the means.
        error: its standard error; NaN if there is one seed.
        paired: differences were taken seed by seed.
        half: of the 95% interval, by Student's t with as many degrees of freedom as the side with fewer
            seeds has, less one; NaN if that has one seed.
    """

    mean: float
    error: float
    paired: bool
    half: float


def difference(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Mean difference and its standard error; None where a side is empty.

    With the same seeds on both sides, the runs are pairs (a seed draws the same initial weights,
    samples and order in both), so the error is that of the mean of the n differences, s/sqrt(n).
    Otherwise it is sqrt(s1^2/n1 + s2^2/n2) (Welch).
    """
    if not values or not baseline:
        return None
    if values.keys() == baseline.keys():
        spread = Spread.of(values[seed] - baseline[seed] for seed in values)
        assert spread is not None
        error = spread.std / math.sqrt(spread.n)
        return Difference(spread.mean, error, True, _half(error, spread.n))
    first, two = Spread.of(values.values()), Spread.of(baseline.values())
    assert first is not None
    assert two is not None
    error = math.hypot(first.std / math.sqrt(first.n), two.std / math.sqrt(two.n))
    return Difference(first.mean - two.mean, error, False, _half(error, min(first.n, two.n)))


def _half(error: float, seeds: int) -> float:
    return float(t.ppf(0.975, seeds - 1)) * error if seeds > 1 else math.nan


def read_run(path: Path) -> RunRecord:
    """A run, finished or not.

    Raises:
        DataError: not a run, or a damaged one.
    """
    config = read_config(path)
    summary = read_summary(path) if (path / SUMMARY).exists() else None
    return RunRecord(path, config, read_metrics(path), summary)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs among some paths: a path is a run, or a folder of runs (taken in sorted order).

    Runs lie in such a folder, or in folders of it.

    Raises:
        DataError: a path that is neither.
    """
    runs: list[Path] = []
    for path in paths:
        inside = [path] if is_run(path) else []
        if not inside and path.is_dir():
            inside = sorted(c for depth in ("*", "*/*") for c in path.glob(depth) if is_run(c))
        if not inside:
            raise DataError(
                f"{path} is not a run and holds none. Give directories made by `kdcache train-teacher` "
                "or `kdcache train-student`, or a folder of them; stores go to --store."
            )
        runs += [run for run in inside if run not in runs]
    return runs


def grouped(runs: Sequence[RunRecord], equal: bool = False) -> list[Group]:
    """Runs that differ only in seed as one group each, in order of appearance.

    Args:
        equal: whether runs may be equal; the first of them counts.

    Raises:
        DataError: two runs of one group have the same seed.
    """
    together: list[list[RunRecord]] = []
    for run in runs:
        for group in together:
            if all(_alike(run, other) for other in group):
                twin = next((other for other in group if other.seed == run.seed), None)
                if twin is not None and equal:
                    break
                if twin is not None:
                    raise DataError(
                        f"{run.path} and {twin.path} are the same run: equal configuration and seed "
                        f"{run.seed}. Give one of them."
                    )
                group.append(run)
                break
        else:
            together.append([run])
    for group in together:
        group.sort(key=lambda run: run.seed)
    return [
        Group(name, tuple(group)) for name, group in zip(_labels(together), together, strict=True)
    ]


def _alike(run: RunRecord, other: RunRecord) -> bool:
    """Whether two differ in their seed alone: both were shown one data seed's samples, or each its own's."""
    shown = {"data.seed": None}
    own = run.data_seed == run.seed and other.data_seed == other.seed
    same = own or run.data_seed == other.data_seed
    return same and run.settings | shown == other.settings | shown


def _labels(groups: list[list[RunRecord]]) -> list[str]:
    """A short name per group: method and options, and whatever else it takes to tell them apart."""
    models = {group[0].config["model"]["name"] for group in groups}
    names: list[str] = []
    for group in groups:
        config = group[0].config
        objective = config["objective"]
        name = objective["method"]
        name += "+std" if objective.get("standardize") else ""
        name += "+noise" if objective.get("noise") else ""
        name += f" {config['training'].get('prune', '')}".rstrip()
        name += " online" if config.get("online") else ""
        names.append(printable(f"{config['model']['name']} {name}" if len(models) > 1 else name))
    for name in {name for name in names if names.count(name) > 1}:
        same = [index for index, other in enumerate(names) if other == name]
        settings = [groups[index][0].settings for index in same]
        keys = sorted({key for setting in settings for key in setting if _differ(key, settings)})
        shown = [k for k in keys if not isinstance(settings[0].get(k), list)][:3] or keys[:1]
        for index, setting in zip(same, settings, strict=True):
            details = ", ".join(
                f"{key.rpartition('.')[2]}={_brief(setting.get(key))}" for key in shown
            )
            names[index] = f"{name} ({details})"
    # Whatever is still equal is counted.
    counts: dict[str, int] = {}
    for index, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        names[index] = name if counts[name] == 1 else f"{name} #{counts[name]}"
    return names


def _differ(key: str, settings: list[dict[str, Any]]) -> bool:
    return any(setting.get(key) != settings[0].get(key) for setting in settings)


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(str(item)[:8] for item in value)
    return "none" if value is None else printable(str(value)[:16])


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group trained from labels alone to compare with: same network, dataset and number of samples.

    Of several, the one whose settings differ least; None if there is none, or it is the group itself.
    """
    wanted = ("model.name", "data.name", "data.train_samples")
    mine = group.settings
    candidates = [
        other
        for other in groups
        if without_teacher(other.method)
        and all(other.settings.get(k) == mine.get(k) for k in wanted)
    ]
    if group in candidates or not candidates:
        return None

    def distance(other: Group) -> int:
        theirs = other.settings
        return sum(theirs.get(key) != mine.get(key) for key in theirs.keys() | mine.keys())

    return min(candidates, key=distance)

"""What finished runs show: a student's accuracy by labels alone, and how well a student fits its targets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.methods.table import without_teacher
from kdcache.pruning.request import PruneRequest
from kdcache.runs import SUMMARY, is_run, read_config, read_metrics, read_summary
from kdcache_stores import DataError, MismatchError

MOST_NEIGHBOURS = 200


@dataclass(frozen=True)
class Baseline:
    """A network trained by cross-entropy alone.

    Attributes:
        path: of its run.
        top1: on the test set after the last epoch, 0 to 1.
    """

    path: Path
    top1: float


def read_baseline(path: str | os.PathLike[str], wanted: Mapping[str, Any]) -> Baseline:
    """The baseline of a run that the user names.

    Args:
        wanted: what its config must say, by dotted names; None: nothing.

    Raises:
        DataError: not a finished run.
        MismatchError: not by cross-entropy, or of another model or dataset.
    """
    config, summary = read_config(path), read_summary(path)
    method = str(_entry(config, "objective.method"))
    if not without_teacher(method):
        raise MismatchError(
            f"--baseline {path}: expected a run from labels alone, found the method {method!r}. Give "
            "the student's own training by labels alone."
        )
    for name, value in wanted.items():
        entry = _entry(config, name)
        if entry != value:
            raise MismatchError(
                f"--baseline {path}: expected a run with {name} = {value!r}, found {entry!r}. Give "
                "the student's own training by labels alone."
            )
    return Baseline(Path(path), float(summary["last_top1"]))


def baseline_beside(out: str | os.PathLike[str], wanted: Mapping[str, Any]) -> Baseline | None:
    """A finished run beside `out` that is the student's baseline; the best of several, or None.

    Looks into the neighbouring folders alone, `MOST_NEIGHBOURS` of them at most.
    """
    parent = Path(out).resolve().parent
    baselines: list[Baseline] = []
    if not parent.is_dir():
        return None
    for folder in sorted(parent.iterdir())[:MOST_NEIGHBOURS]:
        try:
            if folder.is_dir() and is_run(folder) and (folder / SUMMARY).is_file():
                baselines.append(read_baseline(folder, wanted))
        except (DataError, MismatchError, KeyError, OSError):
            continue  # another kind of run, or none of ours: nothing was promised of it
    return max(baselines, key=lambda baseline: baseline.top1, default=None)


def _entry(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Pruned:
    """What went of a student as it trained.

    Attributes:
        ratio: of its channels or weights.
        epochs: the first ones, at whose ends parts went.
        trained: whether it began from given weights.
    """

    ratio: float
    epochs: int
    trained: bool

    @classmethod
    def of(cls, prune: PruneRequest | None, init_weights: str | None) -> Pruned | None:
        """Of a training; None where nothing went."""
        if prune is None:
            return None
        return cls(prune.ratio, prune.epochs, init_weights is not None)

    @classmethod
    def of_run(cls, path: str | os.PathLike[str]) -> Pruned | None:
        """Of a run, as its config says."""
        config = read_config(path)
        training = config["training"]
        if "prune" not in training:
            return None
        request = PruneRequest.parse(
            training["prune"],
            training.get("prune_by", "magnitude"),
            training.get("prune_epochs"),
            training["epochs"],
        )
        return cls.of(request, config["model"].get("init_weights"))


@dataclass(frozen=True)
class Fit:
    """How a training went and ended.

    Attributes:
        kd: the distillation term, unweighted, mean over each epoch, in nats.
        top1: on the test set, 0 to 1.
        images: of the test set; None where that is not known.
    """

    kd: tuple[float, ...]
    top1: float
    images: int | None = None

    @property
    def epochs(self) -> int:
        """How many there were."""
        return len(self.kd)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], images: int | None = None) -> Fit | None:
        """From the lines of ``metrics.jsonl``; None where they hold no distillation."""
        if not records or "train_kd" not in records[-1]:
            return None
        kd: list[float] = []
        for record in records:  # one that stands for several epochs counts as so many
            kd += [record["train_kd"]] * (record["epoch"] - len(kd))
        return cls(tuple(kd), records[-1]["test_top1"], images)

    @classmethod
    def of_run(cls, path: str | os.PathLike[str]) -> Fit | None:
        """From a finished run."""
        return cls.of(read_metrics(path), read_summary(path).get("test_samples"))

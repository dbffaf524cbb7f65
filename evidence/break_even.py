"""When has a store paid for itself? Measured seconds of a dump and of students against online students.

    python evidence/break_even.py --dataset fashion-mnist --data-root DATA --folder fashion \
        --out evidence/break_even.json

Dump, cached epoch and online epoch are timed in turns in one process, so that what else the machine does
hits all alike. Nothing here measures accuracy: evidence/views.py measures what fewer views cost.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from methods import objectives
from study import Arm, Study

from kdcache.training.preparation import prepared
from kdcache.training.settings import Training

ROUNDS = 3


def main() -> None:
    """Measure and write one JSON file."""
    study = Study(__doc__, dataset="fashion-mnist", views=16)
    teacher = study.args.teacher or study.teacher("resnet14", 20000, 5)
    objective = objectives(study.args.epochs)["kd+std"]
    dumps, epochs = [], {"cached": [], "online": []}
    study.data()
    store = study.store(teacher=teacher, views=study.args.views)
    ways = {
        "cached": study.training(Arm(objective, {"stores": (store,)}), 0),
        "online": study.training(
            Arm(objective, {"online": (teacher,), "schedule": "epoch"}), 0
        ),
    }  # fmt: skip
    for training in ways.values():
        epoch_of(training, 1)
    for _ in range(ROUNDS):
        shutil.rmtree(store)
        begun = time.perf_counter()
        study.store(teacher=teacher, views=study.args.views)
        dumps.append(time.perf_counter() - begun)
        for name, training in ways.items():
            epochs[name].append(epoch_of(training, 2))
    study.report(account(dumps, epochs), rounds=ROUNDS, views_stored=study.args.views)


def epoch_of(training: Training, epochs: int) -> float:
    """Seconds of an epoch, the mean of some after a first one that warms up."""
    training = replace(training, optimization=replace(training.optimization, epochs=epochs + 1))
    with tempfile.TemporaryDirectory() as folder, prepared(training, Path(folder) / "run") as loop:
        records = [loop.train_epoch(epoch)[0] for epoch in range(epochs + 1)]
    return sum(record["seconds"] for record in records[1:]) / epochs


def account(dumps: list[float], epochs: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of n students of 30 and 240 epochs both ways, and where the lines cross."""
    dump, cached, online = median(dumps), median(epochs["cached"]), median(epochs["online"])
    results: dict[str, Any] = {
        "dump_seconds": [round(s, 2) for s in dumps],
        "cached_epoch_seconds": [round(s, 3) for s in epochs["cached"]],
        "online_epoch_seconds": [round(s, 3) for s in epochs["online"]],
        "student_epochs_to_break_even": round(dump / (online - cached), 1),
    }
    for length in (30, 240):
        for students in (1, 3, 10):
            both = {
                "cached": dump + students * length * cached,
                "online": students * length * online,
            }
            results[f"{students} students of {length} epochs"] = {
                name: round(seconds) for name, seconds in both.items()
            } | {"cached_over_online": round(both["cached"] / both["online"], 3)}
    return results


if __name__ == "__main__":
    main()

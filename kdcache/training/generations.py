"""Born-again networks: each generation is dumped over the same views and teaches the next one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from kdcache.dumping.job import DumpRequest, prepare_dump
from kdcache.dumping.requests import TeacherRequest
from kdcache.evaluation.scores import clean_logits, scores
from kdcache.models.taps import as_fields
from kdcache.runs import Run, load_run_model, trained_size, write_atomically
from kdcache.training.observer import TrainingObserver, Unwatched
from kdcache.training.preparation import TrainingOptions, train
from kdcache.training.settings import Training
from kdcache_stores import UsageError, begun_encodings, open_store

ENSEMBLE = "ensemble.json"


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        run: its directory.
        top1: of it alone, on the test set, after the last epoch.
        ensemble_top1: of the mean of the probabilities of all generations up to this one.
    """

    run: Path
    top1: float
    ensemble_top1: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the run by its name in the folder of all."""
        return {"run": self.run.name, "top1": self.top1, "ensemble_top1": self.ensemble_top1}


def born_again(
    training: Training,
    out: str | os.PathLike[str],
    generations: int,
    watch: TrainingObserver | None = None,
    **options: Unpack[TrainingOptions],
) -> list[Generation]:
    """Train generation after generation, each from the store of the one before.

    ``out`` holds the runs generation-1, generation-2, ... and the stores generation-1.zarr, ... of all
    but the last, and ensemble.json. Generation k has the seed of ``training`` plus k - 1. What is there
    already is not done again.

    Args:
        training: of the first generation, from the store of its teacher.
        out: the folder.
        generations: how many, 1 at least.
        watch: told of the progress of each training.
        options: see `TrainingOptions`.

    Raises:
        UsageError: no store to begin with, a teacher in the loop, or a loss that reads more than logits.
        KDCacheError: see `train` and `prepare_dump`.

    Source: Furlanello et al., Born-Again Neural Networks, ICML 2018; the ensemble is its BANE.
    """
    if generations < 1:
        raise UsageError(f"expected 1 generation at least, found {generations}")
    if not training.stores or training.online:
        raise UsageError(
            "the first generation learns from a store, and its views are those of all: give the store of "
            "its teacher, and no teacher in the loop"
        )
    if training.objective.teacher_fields != ("logits",):
        raise UsageError(
            f"a generation is dumped as logits, and {training.objective.method} reads "
            f"{', '.join(training.objective.teacher_fields)}: use ban, or another method on logits"
        )
    out, watch = Path(out), watch or Unwatched()
    first, runs = training, []
    for number in range(1, generations + 1):
        watch.note(f"generation {number} of {generations}")
        run = train(training, out / f"generation-{number}", watch, **options)
        runs.append(run)
        if number < generations:
            store = out / f"generation-{number}.zarr"
            _dump(first, run, store, watch, options.get("allow_code", False))
            training = replace(training, stores=(str(store),), seed=training.seed + 1)
    result = _ensembles(first, runs, options.get("allow_code", False))
    text = json.dumps([generation.to_dict() for generation in result], indent=2) + "\n"
    write_atomically(out / ENSEMBLE, lambda stream: stream.write(text.encode()))
    return result


def _dump(
    training: Training, run: Run, store: Path, watch: TrainingObserver, allow_code: bool
) -> None:
    """The logits of a generation, over the views and in the encoding of the store that all began with."""
    with open_store(training.stores[0]) as opened:
        views = training.views or len(opened.view_range)
    request = DumpRequest(
        dataset=training.source,
        teachers=[TeacherRequest(store, str(run.path))],
        plan_from=training.stores[0],
        augment=training.augment,
        views=views,
        encoding=begun_encodings(training.stores[0]).get("logits"),
        allow_code=allow_code,
        device=training.device,
        workers=training.workers,
        views_per_decode=training.views_per_decode,
        threads=training.threads,
    )
    with prepare_dump(request, watch.note) as prepared:
        prepared.run()


def _ensembles(training: Training, runs: Sequence[Run], allow_code: bool) -> list[Generation]:
    """Each generation with the accuracy of the mean prediction up to it."""
    testset = training.source.load("test")
    total: torch.Tensor | None = None
    result = []
    for run in runs:
        module, preprocessing, config, _ = load_run_model(run.path, allow_code)
        module, spec = module.to(training.device), config["model"]

        def network(
            images: torch.Tensor, module: Any = module, preprocessing: Any = preprocessing
        ) -> torch.Tensor:
            return as_fields(module(preprocessing(images)))["logits"]

        size = trained_size(spec)
        logits, labels = clean_logits(network, testset, size, training.device, training.workers)
        probabilities = logits.double().softmax(1)
        total = probabilities if total is None else total + probabilities
        together = scores(total.log().float(), labels)["top1"]
        result.append(Generation(run.path, scores(logits, labels)["top1"], together))
    return result

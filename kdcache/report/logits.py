"""Logits of runs and of their teacher on the test split, recomputed from the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.data.dataset import Dataset
from kdcache.dumping.recheck import teacher_of_store
from kdcache.evaluation.scores import calibration, clean_logits
from kdcache.methods.table import without_teacher
from kdcache.models.taps import as_fields
from kdcache.models.weights import load_weights, weights_digest
from kdcache.report.collect import Group, RunRecord, read_run
from kdcache.runs import WEIGHTS, is_run, load_run_model, trained_size
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache_stores import Store, open_store
from kdcache_stores.errors import DataError, KDCacheError


@dataclass(frozen=True)
class TestLogits:
    """The logits of a network on the test split.

    Attributes:
        label: of the network, for people.
        logits: float32 (N, K).
        labels: int64 (N,).
    """

    __test__ = False  # pytest: no test class, despite its name

    label: str
    logits: Tensor
    labels: Tensor


def run_logits(
    run: RunRecord, label: str, dataset: Dataset, device: str, workers: int
) -> TestLogits:
    """Of a finished run.

    Raises:
        DataError: the run has no weights, or was trained for another number of classes.
    """
    model = load_run_model(run.path)
    classes = model.config["model"]["classes"]
    if classes != dataset.classes:
        raise DataError(f"{run.path} was trained for {classes} classes, {dataset.name} has "
                        f"{dataset.classes}.")  # fmt: skip
    module = model.module.to(device)
    size = trained_size(model.config["model"])

    def network(images: Tensor) -> Tensor:
        return as_fields(module(model.preprocessing(images)))["logits"]

    return _test_logits(label, network, dataset, device, workers, size)


def teacher_logits(teacher: Teacher, dataset: Dataset, device: str, workers: int) -> TestLogits:
    """Of a teacher; images that differ in size are cropped to the usual 224 pixels."""
    size = None if dataset.image_shape or dataset.item else 224
    return _test_logits(
        f"teacher {Path(teacher.architecture).name}", teacher.logits, dataset, device, workers, size
    )


def _test_logits(
    label: str,
    network: Callable[[Tensor], Tensor],
    dataset: Dataset,
    device: str,
    workers: int,
    size: int | tuple[int, int] | None,
) -> TestLogits:
    logits, labels = clean_logits(network, dataset, size=size, device=device, workers=workers)
    return TestLogits(label, logits.cpu(), labels.cpu())


def spec_teacher(spec: str, dataset: Dataset, device: str, stores: Sequence[Store] = ()) -> Teacher:
    """A teacher as the command line names it, for the images of a dataset.

    Where it filled one of the stores, with the preprocessing and class map that this one names.
    """
    stored = teacher_of_store(stores, spec, device, dataset)
    if stored is not None:
        return stored
    channels, size = dataset.image_shape[::2] if dataset.image_shape else (3, 224)
    return load_teacher(spec, classes=dataset.classes, channels=channels, size=size, device=device,
                        fallback=dataset.item)  # fmt: skip


def run_stores(runs: Sequence[RunRecord], opened: ExitStack) -> list[Store]:
    """The stores that some runs read, where they still lie there; ``opened`` closes them."""
    stores = []
    for path in dict.fromkeys(p for run in runs for p in run.config.get("store_paths", [])):
        try:
            stores.append(opened.enter_context(open_store(path)))
        except KDCacheError:
            continue  # it was moved since: then --store names its place
    return stores


def find_teacher(runs: Sequence[RunRecord], stores: Sequence[Store]) -> RunRecord | None:
    """The run among some whose weights filled one of the stores."""
    wanted = {store.teacher.weights_sha256 for store in stores}
    for run in runs:
        alone = without_teacher(run.config["objective"]["method"])
        if alone and (run.path / WEIGHTS).is_file() and wanted:
            state = load_weights(run.path / WEIGHTS).state
            if weights_digest(state) in wanted:  # no network is made, a user's own needs no leave
                return run
    return None


def accuracy(network: TestLogits) -> float | None:
    """Top-1 in [0, 1] over the labelled samples; None without any."""
    known = network.labels >= 0
    if not known.any():
        return None
    return float((network.logits[known].argmax(1) == network.labels[known]).double().mean())


def teacher_beside(runs: Sequence[RunRecord], stores: Sequence[Store]) -> RunRecord | None:
    """The run that filled one of the stores, where it lies beside one of them or beside one of the runs.

    A store names its teacher by its network and the digest of its weights, never by a path.
    """
    networks = {store.teacher.architecture for store in stores}
    places = [*(run.path for run in runs), *(Path(store.where) for store in stores)]
    given = {run.path.resolve() for run in runs}
    records = []
    for folder in dict.fromkeys(p.resolve().parent for p in places if p.exists()):
        for path in sorted(folder.iterdir()):
            if path in given or not is_run(path):
                continue
            try:
                record = read_run(path)
            except KDCacheError:
                continue  # what else lies there is not what the report is about
            if record.config["model"]["name"] in networks:
                records.append(record)
    return find_teacher(records, stores)


def by_group(
    groups: Sequence[Group], dataset: Dataset, device: str, workers: int, left_out: list[str]
) -> dict[str, dict[int, TestLogits]]:
    """Group's label -> seed -> logits, of every finished run; what cannot be had goes to ``left_out``."""
    by_label: dict[str, dict[int, TestLogits]] = {}
    for group in groups:
        for run in group.runs:
            try:
                by_label.setdefault(group.label, {})[run.seed] = run_logits(
                    run, group.label, dataset, device, workers
                )
            except KDCacheError as error:
                left_out.append(f"Test logits of {run.path.name}: {error}")
    return {label: runs for label, runs in by_label.items() if runs}


def calibrated(
    groups: Sequence[Group], predictions: dict[str, dict[int, TestLogits]]
) -> dict[str, dict[int, dict[str, float]]]:
    """NLL and ECE at the temperature that fits the test split best, for runs that do not state it.

    Group's label -> seed -> `kdcache.evaluation.calibration`.
    """
    by_label: dict[str, dict[int, dict[str, float]]] = {}
    for group in groups:
        known = group.values("calibrated_ece")
        for seed, prediction in predictions.get(group.label, {}).items():
            if seed not in known and (prediction.labels >= 0).any():
                by_label.setdefault(group.label, {})[seed] = calibration(
                    prediction.logits, prediction.labels
                )
    return by_label


def class_means(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Mean logit vector of the samples of each true class, float64 (K, K); NaN for a class without."""
    classes = logits.shape[1]
    known = labels >= 0
    sums = torch.zeros(classes, classes, dtype=torch.float64)
    sums.index_add_(0, labels[known], logits[known].double())
    counts = torch.bincount(labels[known], minlength=classes).double()
    return (sums / counts[:, None]).numpy()

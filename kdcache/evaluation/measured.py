"""Everything that `kdcache evaluate` measures of a network: accuracy, calibration, cost, agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.item import Item
from kdcache.data.loading import DatasetSource
from kdcache.dumping.recheck import teacher_of_store
from kdcache.evaluation.agreement import agreement_with_store
from kdcache.evaluation.cost import costs, weights_file
from kdcache.evaluation.scores import calibration, clean_logits, scores
from kdcache.models.zoo import MODELS
from kdcache.preprocessing import Inputs, Preprocessing, normalisation
from kdcache.runs import SUMMARY, is_run, read_config, read_summary
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache_stores import MismatchError, Store, UsageError, open_store


@dataclass(frozen=True)
class AskedPreprocessing:
    """Of a network that is evaluated and no run, which states its own.

    Attributes:
        normalisation: mean and std; None: the store's that it filled, its own, or that of the dataset.
        size: side in pixels that images are resized to; None: as the normalisation comes.
    """

    normalisation: Preprocessing | None = None
    size: int | None = None


@dataclass(frozen=True)
class _Network:
    """A network that is evaluated.

    Attributes:
        spec: as `load_teacher` takes it.
        weights: a file, or the name of a library's own weights.
        teacher: it, loaded.
        side: height and width of the images that it was trained at.
    """

    spec: str
    weights: str | Path | None
    teacher: Teacher
    side: tuple[int, int]


def evaluate(
    model: str,
    source: DatasetSource,
    split: str = "test",
    *,
    teacher: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """`measure` on a split of a dataset by its name; networks of the zoo see its own normalisation.

    Args:
        note: told what is to be known about the split, a sentence each, and see `measure`.
        options: further arguments of `measure`.
    """
    dataset = source.load(split)
    for remark in dataset.remarks:
        note(remark)
    zoo = any(spec.partition("@")[0] in MODELS for spec in (model, teacher or ""))
    preprocessing = normalisation(source.load("train")) if zoo else None
    return measure(
        model, dataset, teacher=teacher, preprocessing=preprocessing, note=note, **options
    )


def measure(
    model: str,
    dataset: Dataset,
    *,
    weights: str | Path | None = None,
    teacher: str | None = None,
    store: str | Path | None = None,
    augment: str | None = None,
    preprocessing: Inputs | None = None,
    asked: Sequence[AskedPreprocessing] = (),
    batch_size: int = 1,
    device: str = "cpu",
    workers: int = 0,
    allow_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Accuracy, calibration and cost of a network on a dataset, and its agreement with a teacher.

    Args:
        model: as `load_teacher` takes it: a run, or a name with weights.
        weights: a file, or the name of a library's own weights.
        teacher: another network to measure beside it, its latency in turns with the model's.
        store: logits of its teacher on the same samples; a network that filled it takes its preprocessing
            and class map, and then it may be of another split too.
        augment: the store's augmentation, where it is a user's own.
        preprocessing: of a model or teacher of the zoo whose weights are a bare file, which does not
            state how it was trained; a run and a library's weights come with theirs.
        asked: of the model and the teacher, what goes before all that.
        batch_size: images per timed forward pass.
        allow_code: import the function that a run names, if its network is a user's own.
        note: told which preprocessing and which entry of a file were taken.

    Returns:
        What `scores`, `calibration` and `costs` give, "preprocessing" and "weights_entry",
        "temperature_fitted_on", and where asked for "teacher" (the same of the teacher) and "agreement"
        (`agreement_with_store`).

    Raises:
        KDCacheError: see `load_teacher`, `agreement_with_store`.
    """
    specs = [(model, weights), *([] if teacher is None else [(teacher, None)])]
    wishes = [*asked, *[AskedPreprocessing()] * (len(specs) - len(asked))]
    with ExitStack() as opened:
        stores = [] if store is None else [opened.enter_context(open_store(store))]
        networks, filled = [], False
        for (spec, file), wish in zip(specs, wishes, strict=True):
            loaded, whence = load_network(
                spec, file, dataset, stores, wish, preprocessing, device, allow_code
            )
            filled |= whence == FROM_STORE
            networks.append(_Network(spec, file, loaded, side_of(spec, dataset)))
            if loaded.weights_entry is not None:
                note(f"{loaded.architecture}: weights of the entry {loaded.weights_entry}")
            note(f"{loaded.architecture}: preprocessing {whence}: {loaded.preprocessing}")
        first = networks[0]
        views = _timed(first, batch_size).to(device)
        files = [weights_file(network.spec, network.weights) for network in networks]
        measured = costs([network.teacher for network in networks], files, views)
        results = [
            {
                "architecture": network.teacher.architecture,
                "preprocessing": network.teacher.preprocessing.to_dict(),
                "weights_entry": network.teacher.weights_entry,
            }
            | _quality(network, dataset, device, workers)
            | cost
            for network, cost in zip(networks, measured, strict=True)
        ]
        result = {"run": model, "dataset": dataset.name, "split": dataset.split,
                  "samples": len(dataset)} | results[0]  # fmt: skip
        if teacher is not None:
            result["teacher"] = results[1]
        for held in stores:
            if held.plan.split == dataset.split:
                own = make_augmentation(augment, dataset) if augment else None
                result["agreement"] = agreement_with_store(
                    first.teacher.logits, dataset, held, device, workers=workers, augmentation=own
                )
                continue
            apart = (
                f"{held.where} is over the split {held.plan.split} of {held.plan.dataset}, "
                f"evaluated is {dataset.split}"
            )
            if not filled:
                raise MismatchError(f"{apart}. Dump the teacher with --split {dataset.split}.")
            note(f"{apart}: only the preprocessing is taken from it, and no agreement measured")
    return result


FROM_STORE = "of the store that it filled"


def load_network(
    spec: str,
    weights: str | Path | None,
    dataset: Dataset,
    stores: Sequence[Store],
    asked: AskedPreprocessing,
    preprocessing: Inputs | None,
    device: str,
    allow_code: bool,
) -> tuple[Teacher, str]:
    """A network as `load_teacher` takes it, and where its preprocessing comes from.

    Arguments and errors as of `measure`.
    """
    name, given = spec.partition("@")[0], asked.normalisation
    full = spec if weights is None else f"{spec}@{weights}"
    if given is None and (
        stored := teacher_of_store(stores, full, device, dataset, allow_code=allow_code)
    ):
        network, whence = stored, FROM_STORE
    else:
        _require_images(asked, dataset)
        zoo = name in MODELS and given is None
        network = load_teacher(
            spec,
            weights,
            classes=dataset.classes,
            channels=dataset.image_shape[0] if dataset.image_shape else 3,
            size=side_of(spec, dataset)[1],
            preprocessing=preprocessing if zoo else given,
            fallback=dataset.item,
            device=device,
            allow_code=allow_code,
        )
        whence = "as given" if given else f"of {dataset.name}" if zoo else "its own"
    if asked.size is not None and isinstance(network.preprocessing, Preprocessing):
        sized = replace(network.preprocessing, size=asked.size)
        network, whence = replace(network, preprocessing=sized), f"{whence}, at the size given"
    return network, whence


def _require_images(asked: AskedPreprocessing, dataset: Dataset) -> None:
    """Refuse to prepare items that are no images."""
    if dataset.item is not None and (asked.normalisation or asked.size):
        raise UsageError(
            f"--normalize, --mean, --std and --size prepare images, and {dataset.name} holds "
            f"{dataset.item}: leave them out"
        )


def _timed(network: _Network, count: int) -> torch.Tensor:
    """What the latency of a network is measured on: views that hold nothing."""
    inputs = network.teacher.preprocessing
    if isinstance(inputs, Item):
        return inputs.examples(count, network.teacher.module)
    return torch.zeros(count, inputs.channels, *network.side, dtype=torch.uint8)


def side_of(spec: str, dataset: Dataset) -> tuple[int, int]:
    """Height and width of the images that a network was trained at."""
    name = spec.partition("@")[0]
    _, height, side = dataset.image_shape or (3, 224, 224)
    if is_run(name):
        trained = read_config(name).get("model", {})
        side = trained.get("size", side)
        height = trained.get("height", side)
    return height, side


def _quality(network: _Network, dataset: Dataset, device: str, workers: int) -> dict[str, Any]:
    logits, labels = clean_logits(network.teacher.logits, dataset, network.side, device, workers)
    return quality(network.spec, logits, labels)


def quality(spec: str, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """`scores` and `calibration` of a network, at the temperature that its run fitted to held-out samples.

    Args:
        spec: of the network: a run, or anything else, whose temperature is fitted to these samples.
        logits: float (N, K).
        labels: int64 (N,).
    """
    measured: dict[str, Any] = dict(scores(logits, labels))
    if (Path(spec) / SUMMARY).is_file():
        summary = read_summary(spec)
        if summary.get("temperature_fitted_on") == "held-out training samples":
            at = scores(logits / summary["temperature"], labels)
            return measured | {
                "temperature": summary["temperature"],
                "calibrated_nll": at["nll"],
                "calibrated_ece": at["ece"],
                "temperature_fitted_on": "training samples held out in its run",
            }
    return measured | calibration(logits, labels) | {"temperature_fitted_on": "the same samples"}

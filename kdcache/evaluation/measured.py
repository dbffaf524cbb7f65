"""Everything that `kdcache evaluate` measures of a network: accuracy, calibration, cost, agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.evaluation.agreement import agreement_with_store
from kdcache.evaluation.cost import costs, weights_file
from kdcache.evaluation.scores import calibration, clean_logits, scores
from kdcache.models.zoo import MODELS
from kdcache.preprocessing import Preprocessing, normalisation
from kdcache.runs import SUMMARY, is_run, read_config, read_summary
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache_stores import MismatchError, open_store


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
        note: told what is to be known about the split, a sentence each.
        options: further arguments of `measure`.
    """
    dataset = source.load(split)
    for remark in dataset.remarks:
        note(remark)
    zoo = any(spec.partition("@")[0] in MODELS for spec in (model, teacher or ""))
    preprocessing = normalisation(source.load("train")) if zoo else None
    return measure(model, dataset, teacher=teacher, preprocessing=preprocessing, **options)


def measure(
    model: str,
    dataset: Dataset,
    *,
    weights: str | Path | None = None,
    teacher: str | None = None,
    store: str | Path | None = None,
    augment: str | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    workers: int = 0,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Accuracy, calibration and cost of a network on a dataset, and its agreement with a teacher.

    Args:
        model: as `load_teacher` takes it: a run, or a name with weights.
        weights: a file, or the name of a library's own weights.
        teacher: another network to measure beside it, its latency in turns with the model's.
        store: logits of its teacher on the same samples.
        augment: the store's augmentation, where it is a user's own.
        preprocessing: of a model or teacher of the zoo whose weights are a bare file, which does not
            state how it was trained; a run and a library's weights come with theirs.
        batch_size: images per timed forward pass.
        allow_code: import the function that a run names, if its network is a user's own.

    Returns:
        What `scores`, `calibration` and `costs` give, "temperature_fitted_on", and where asked for
        "teacher" (the same of the teacher) and "agreement" (`agreement_with_store`).

    Raises:
        KDCacheError: see `load_teacher`, `agreement_with_store`.
    """
    network, side = _load(model, weights, dataset, preprocessing, device, allow_code)
    specs, networks, sides = [(model, weights)], [network], [side]
    if teacher is not None:
        beside, its_side = _load(teacher, None, dataset, preprocessing, device, allow_code)
        specs.append((teacher, None))
        networks.append(beside)
        sides.append(its_side)
    channels = network.preprocessing.channels
    views = torch.zeros((batch_size, channels, *side), dtype=torch.uint8, device=device)
    files = [weights_file(*spec) for spec in specs]
    results = [
        {"architecture": instance.architecture}
        | _quality(instance, its, dataset, spec, device, workers)
        | cost
        for instance, its, (spec, _), cost in zip(
            networks, sides, specs, costs(networks, files, views), strict=True
        )
    ]
    result = {"run": model, "dataset": dataset.name, "split": dataset.split,
              "samples": len(dataset)} | results[0]  # fmt: skip
    if teacher is not None:
        result["teacher"] = results[1]
    if store is not None:
        with open_store(store) as opened:
            if opened.plan.split != dataset.split:
                raise MismatchError(
                    f"{opened.where} is over the split {opened.plan.split} of {opened.plan.dataset}, "
                    f"evaluated is {dataset.split}. Dump the teacher with --split {dataset.split}."
                )
            own = make_augmentation(augment, dataset) if augment else None
            result["agreement"] = agreement_with_store(
                network.logits, dataset, opened, device, workers=workers, augmentation=own
            )
    return result


def _load(
    spec: str,
    weights: str | Path | None,
    dataset: Dataset,
    preprocessing: Preprocessing | None,
    device: str,
    allow_code: bool,
) -> tuple[Teacher, tuple[int, int]]:
    """The network, and height and width of the images that it was trained at."""
    name = spec.partition("@")[0]
    channels, height, side = dataset.image_shape or (3, 224, 224)
    if is_run(name):
        trained = read_config(name).get("model", {})
        side = trained.get("size", side)
        height = trained.get("height", side)
    network = load_teacher(
        spec,
        weights,
        classes=dataset.classes,
        channels=channels,
        size=side,
        preprocessing=preprocessing if name in MODELS else None,
        device=device,
        allow_code=allow_code,
    )
    return network, (height, side)


def _quality(
    network: Teacher, side: tuple[int, int], dataset: Dataset, spec: str, device: str, workers: int
) -> dict[str, Any]:
    logits, labels = clean_logits(network.logits, dataset, side, device, workers)
    quality: dict[str, Any] = dict(scores(logits, labels))
    if (Path(spec) / SUMMARY).is_file():
        summary = read_summary(spec)
        if summary.get("temperature_fitted_on") == "held-out training samples":
            at = scores(logits / summary["temperature"], labels)
            return quality | {
                "temperature": summary["temperature"],
                "calibrated_nll": at["nll"],
                "calibrated_ece": at["ece"],
                "temperature_fitted_on": "training samples held out in its run",
            }
    return quality | calibration(logits, labels) | {"temperature_fitted_on": "the same samples"}

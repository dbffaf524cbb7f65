"""Several networks in one table: what each takes of disk, arithmetic and time, and how well it predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.item import Item
from kdcache.data.loading import DatasetSource
from kdcache.deploying.exported import Exported, load_exported
from kdcache.evaluation.agreement import agreement, agreement_with_store
from kdcache.evaluation.cost import latencies, macs, macs_of, weights_file
from kdcache.evaluation.measured import AskedPreprocessing, load_network, quality, side_of
from kdcache.evaluation.scores import clean_logits
from kdcache.models.zoo import MODELS
from kdcache.preprocessing import normalisation
from kdcache_stores import MismatchError, Store, UsageError, open_store

#: Inputs per timed forward pass.
BATCHES = (1, 64)


@dataclass(frozen=True)
class _Network:
    """What is compared.

    Attributes:
        spec: as it was named.
        logits: inputs (N, *shape) as they are stored -> logits (N, K), on the CPU.
        side: height and width of its images.
        example: one input (1, *shape).
        facts: what is known of it without running it.
    """

    spec: str
    logits: Callable[[Tensor], Tensor]
    side: tuple[int, int] | None
    example: Tensor
    facts: dict[str, Any]


def compare(
    specs: Sequence[str],
    source: DatasetSource,
    split: str = "test",
    *,
    teacher: str | None = None,
    store: str | Path | None = None,
    augment: str | None = None,
    batch_sizes: Sequence[int] = BATCHES,
    repeats: int = 50,
    workers: int = 0,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Size, speed and accuracy of runs and exported files, on the CPU.

    Args:
        specs: directories of runs, and files of `kdcache export`.
        source: the dataset that they are measured on.
        split: of it.
        teacher: as `load_teacher` takes it; its row comes first, and the others are compared with its logits.
        store: logits of the teacher on this split, which the others are compared with in place of a live one.
        augment: the store's augmentation, where it is a user's own.
        batch_sizes: inputs per timed forward pass.
        repeats: timed passes of each size, after five that are not; networks take turns.
        allow_code: import the functions that runs name, where networks are a user's own.

    Returns:
        dataset, split, samples, threads, and "networks": a list with, of each, network (as it was named),
        teacher (whether it is that), architecture (of a file its format), runtime ("torch" or "ONNX
        Runtime"), dtype, parameters, file_bytes, macs (of one input), "latency" by batch size (`latencies`),
        what `scores` and `calibration` give, temperature_fitted_on, and "agreement" with the teacher where
        there is one.

    Raises:
        UsageError: nothing to compare, or the same twice.
        MismatchError: the store is of another split.
        KDCacheError: see `load_run_model`, `load_exported`, `agreement_with_store`.
    """
    named = [*([] if teacher is None else [teacher]), *specs]
    if not specs or len({str(Path(spec)) for spec in named}) < len(named):
        raise UsageError(
            f"expected runs or exported files, each a single time, found {', '.join(named) or 'none'}"
        )
    dataset = source.load(split)
    with ExitStack() as opened:
        held = None if store is None else opened.enter_context(open_store(store))
        if held is not None and held.plan.split != split:
            raise MismatchError(
                f"{held.where} is over the split {held.plan.split}, compared is {split}. Dump the teacher "
                f"with --split {split}."
            )
        networks = [_load(spec, source, dataset, held, allow_code) for spec in named]
        outputs = [
            clean_logits(network.logits, dataset, network.side, workers=workers)
            for network in networks
        ]
        rows: list[dict[str, Any]] = [
            {"network": network.spec, "teacher": network.spec == teacher}
            | network.facts
            | {"latency": {}}
            | quality(network.spec, *output)
            for network, output in zip(networks, outputs, strict=True)
        ]
        for size in batch_sizes:
            inputs = [n.example.expand(size, *n.example.shape[1:]).contiguous() for n in networks]
            timed = latencies([network.logits for network in networks], inputs, repeats)
            for row, latency in zip(rows, timed, strict=True):
                row["latency"][str(size)] = latency
        for network, row, (logits, _) in zip(networks, rows, outputs, strict=True):
            if held is not None:
                own = make_augmentation(augment, dataset) if augment else None
                row["agreement"] = agreement_with_store(
                    network.logits, dataset, held, workers=workers, augmentation=own
                )
            elif teacher is not None:
                row["agreement"] = agreement(logits, outputs[0][0])
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "samples": len(dataset),
        "threads": torch.get_num_threads(),
        "networks": rows,
    }


def _load(
    spec: str, source: DatasetSource, dataset: Dataset, store: Store | None, allow_code: bool
) -> _Network:
    if Path(spec).is_file():
        return _exported(load_exported(spec, allow_code))
    stores = [] if store is None else [store]
    zoo = spec.partition("@")[0] in MODELS
    preprocessing = normalisation(source.load("train")) if zoo else None
    network, _ = load_network(
        spec, None, dataset, stores, AskedPreprocessing(), preprocessing, "cpu", allow_code
    )
    inputs, side, file = network.preprocessing, side_of(spec, dataset), weights_file(spec)
    if isinstance(inputs, Item):
        example = inputs.examples(1, network.module)
    else:
        example = torch.zeros(1, inputs.channels, *side, dtype=torch.uint8)
    facts = {
        "architecture": network.architecture,
        "runtime": "torch",
        "dtype": "float32",
        "parameters": sum(p.numel() for p in network.module.parameters()),
        "file_bytes": None if file is None else file.stat().st_size,
        "macs": macs(network, example),
    }
    return _Network(spec, network.logits, side, example, facts)


def _exported(file: Exported) -> _Network:
    example = file.example
    facts = {
        "architecture": file.file.suffix.removeprefix("."),
        "runtime": file.runtime,
        "dtype": file.dtype,
        "parameters": file.parameters,
        "file_bytes": file.file.stat().st_size,
        "macs": macs_of(file.logits, example) if file.macs is None else file.macs,
    }
    side = (example.shape[2], example.shape[3]) if example.ndim == 4 else None
    return _Network(str(file.file), file.logits, side, example, facts)

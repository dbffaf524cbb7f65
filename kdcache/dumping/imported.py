"""Logits that were computed elsewhere, made a store that students train from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.dumping.opening import provenance
from kdcache.teachers.sanity import Check
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, MismatchError, Probe, Shard, Store
from kdcache_stores.write.importing import read_npz, write_arrays


def import_for(
    dataset: Dataset,
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    augment: str = "none",
    seed: int = 0,
    command: str = "",
    **options: Any,
) -> Store:
    """Write the outputs in an .npz file as a store over views of a dataset.

    What the logits were computed on cannot be seen in them: the caller says which views those were,
    "none" for the images as they are, or the ones whose parameters `export-views` writes. Probes of
    these views' pixels are kept, so a student sees the very views that were named.

    Args:
        dataset: whose keys the file names, in any order; labels are the dataset's.
        file: see `read_npz`.
        path: folder of the store.
        augment: as `make_augmentation` takes it.
        seed: of the views.
        command: to record in the store's provenance.
        options: further arguments of `write_arrays`.

    Raises:
        DataError: see `read_npz`; or keys that are given twice or are not the dataset's.
        MismatchError: another number of classes or other labels than the dataset's, or logits whose
            top-1 is what guessing gives, as those of rows in another order are.
    """
    arrays, keys, labels = read_npz(file)
    logits = arrays["logits"]
    if logits.shape[-1] != dataset.classes:
        raise MismatchError(
            f"{file} holds logits over {logits.shape[-1]} classes, {dataset.name} has {dataset.classes}"
        )
    row = {key: index for index, key in enumerate(keys)}
    if len(row) < len(keys):
        raise DataError(f"{file}: keys must be unique, {len(keys) - len(row)} are given again")
    known = set(dataset.keys)
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(keys)} keys in {file} are not of {dataset.name} "
            f"({dataset.split}), the first: {unknown[:3]}; its keys are like {dataset.keys[:3]}"
        )
    chosen = [index for index, key in enumerate(dataset.keys) if key in row]
    data = dataset if len(chosen) == len(dataset) else dataset.subset(chosen)
    order = np.array([row[key] for key in data.keys])
    if labels is not None and (np.asarray(labels)[order] != data.labels).any():
        first = int(np.flatnonzero(np.asarray(labels)[order] != data.labels)[0])
        raise MismatchError(
            f"labels in {file} are not those of {dataset.name}, the first: {data.keys[first]!r} has "
            f"{np.asarray(labels)[order][first]} there and {data.labels[first]} in the dataset"
        )
    arrays = {
        name: (values if logits.ndim == 3 else values[None])[:, order]
        for name, values in arrays.items()
    }
    predicted, truth = arrays["logits"][0].argmax(1), data.labels
    check = Check(truth[truth >= 0], predicted[truth >= 0], dataset.classes)
    if len(check.labels) and check.near_chance():
        raise MismatchError(
            f"the logits in {file} have top-1 {check.top1:.1%} on {dataset.name}, what guessing gives "
            f"({check.chance:.1%}): are rows and keys in one order, and classes numbered alike?"
        )
    plan = ViewPlan(data, make_augmentation(augment, data), seed)

    def probes(shard: Shard) -> Sequence[Probe]:
        rows = replay.probe_rows(plan, shard.view)
        rows = rows[(rows >= shard.start) & (rows < shard.stop)]
        return replay.measure(rows, shard.view, plan.images(rows, shard.view)) if len(rows) else ()

    return write_arrays(
        path, arrays, samples=plan.samples, plan=plan.to_store(), probes=probes,
        provenance=provenance(torch.device("cpu"), command), **options,
    )  # fmt: skip

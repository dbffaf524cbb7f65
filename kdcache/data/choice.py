"""Which samples of a dataset a training takes."""

from __future__ import annotations

import numpy as np

from kdcache.data.dataset import Dataset, Rows
from kdcache_stores.errors import UsageError


def choose(
    dataset: Dataset, train_samples: int | None, val_split: float, seed: int
) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out: both balanced over classes, drawn by the seed."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    shuffled = rng.permutation(len(dataset))
    # The n-th sample of each class in shuffled order, for n = 0, 1, ...: any prefix is balanced.
    labels = dataset.labels[shuffled]
    turn = np.zeros(len(shuffled), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    balanced = shuffled[np.argsort(turn, kind="stable")]
    wanted = len(dataset) if train_samples is None else train_samples
    if not 1 <= wanted <= len(dataset):
        raise UsageError(f"--train-samples {wanted}: {dataset.name} has {len(dataset)} samples.")
    held = round(wanted * val_split)
    if val_split and not 0 < held < wanted:
        raise UsageError(
            f"--val-split {val_split} of {wanted} samples is {held}: none is left to "
            f"{'hold out' if not held else 'train on'}."
        )
    chosen = balanced[:wanted]
    return np.sort(chosen[held:]), np.sort(chosen[:held])

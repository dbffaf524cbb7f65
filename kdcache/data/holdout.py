"""A test split for a dataset that comes without one."""

from __future__ import annotations

import hashlib

import numpy as np

from kdcache.data.dataset import Dataset
from kdcache_stores.errors import DataError

#: The share of each class that is held out: one in so many.
ONE_IN = 10


def hold_out(whole: Dataset, split: str) -> Dataset:
    """The split "train" or "test" of a dataset whose samples all came as one.

    Of every class a tenth is the test split, rounded, and at least one sample where there are two:
    those whose keys have the lowest SHA-256. So the split depends on the keys and labels alone, and
    a teacher's training, its dump, its students and their evaluation agree about it without being
    told; its fingerprint tells when files were added.

    Args:
        whole: all labelled samples; unlabelled ones stay in "train".
        split: "train" or "test".

    Returns:
        That part, under its split's name, with a remark that says so; where no class has two
        samples, all of them as "train".

    Raises:
        DataError: no class has two samples, so there is no "test".
    """
    order = sorted(
        range(len(whole)), key=lambda row: hashlib.sha256(whole.keys[row].encode()).digest()
    )
    by_class: dict[int, list[int]] = {}
    for row in order:
        by_class.setdefault(int(whole.labels[row]), []).append(row)
    by_class.pop(-1, None)
    held = [
        row
        for rows in by_class.values()
        for row in rows[: max(1, round(len(rows) / ONE_IN)) if len(rows) > 1 else 0]
    ]
    if not held and split == "train":
        return whole
    if not held:
        raise DataError(
            f"{whole.name} has no test split, and no class with two labelled samples of which one "
            "could be held out for it: add a test split"
        )
    is_test = np.isin(np.arange(len(whole)), held)
    part = whole.subset(np.flatnonzero(is_test == (split == "test")))
    part.split = split
    part.remarks = [
        *whole.remarks,
        f"{whole.name} has no test split: {len(held)} of its {len(whole)} samples, one in {ONE_IN} of "
        "each class, chosen by their keys, are held out of train for it",
    ]
    return part

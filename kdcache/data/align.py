"""Finding the samples of a plan in a dataset, by key: other orders and added files do no harm."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np

from kdcache.data.dataset import Dataset, Rows
from kdcache_stores import Samples
from kdcache_stores.errors import MismatchError


def find_rows(dataset: Dataset, samples: Samples, partial: bool = False) -> Rows | None:
    """Where each sample of a plan is in the dataset.

    Args:
        dataset: what is there now.
        samples: what the plan is over; their keys may be hashed.
        partial: allow samples that the dataset lacks.

    Returns:
        int64 (N,), the dataset's row of each sample, -1 where it is absent; or None when the
        dataset holds exactly these samples in this order.

    Raises:
        MismatchError: samples are missing (unless `partial`), or have other labels; names the first
            few.
    """
    if dataset.fingerprint == samples.fingerprint:
        return None
    where = {digest: row for row, digest in enumerate(dataset.samples.key_hashes)}
    rows = np.array([where.get(digest, -1) for digest in samples.key_hashes], dtype=np.int64)
    absent = np.flatnonzero(rows < 0).tolist()
    place = f"{dataset.name} ({dataset.split}, {len(dataset)} samples)"
    if len(absent) and (not partial or len(absent) == len(rows)):
        skipped = [samples.keys[row] for row in absent if samples.keys[row] in dataset.skipped]
        why = f"; {len(skipped)} of them cannot be decoded here" if skipped else ""
        forms = _other_forms(dataset)
        renamed = [row for row in absent if samples.key_hashes[row] in forms]
        if renamed:
            why += (
                f"; {len(renamed)} of them are here under names that look the same and are written "
                "in another Unicode form (NFC, NFD), as "
                f"{forms[samples.key_hashes[renamed[0]]]!a}: rename the files to the form "
                "that the plan has (convmv --nfc or --nfd does)"
            )
        raise MismatchError(
            f"{len(absent)} of the plan's {len(samples)} samples are missing in {place}, "
            f"the first: {[samples.keys[row] for row in absent[:3]]}{why}. Is it the same "
            "dataset and "
            "split, in the same version?"
        )
    here = np.where(rows >= 0, dataset.labels[rows], -1)
    changed = np.flatnonzero((rows >= 0) & (here != samples.labels)).tolist()
    if len(changed):
        first = changed[0]
        raise MismatchError(
            f"{len(changed)} samples of {place} have another label than in the plan, the first: "
            f"{samples.keys[first]!r} with {here[first]} here and {samples.labels[first]} there "
            f"({[samples.keys[row] for row in changed[:3]]}). Were classes added, renamed or "
            "reordered?"
        )
    return rows


def _other_forms(dataset: Dataset) -> dict[bytes, str]:
    """SHA-256 of each key in both Unicode normal forms -> the key as the dataset has it."""
    return {
        hashlib.sha256(form.encode()).digest(): key
        for key in dataset.keys
        if not key.isascii()
        for form in (unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key))
    }

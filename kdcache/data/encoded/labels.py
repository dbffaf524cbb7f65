"""Class numbers from labels that are texts: numbers, or names of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.data.dataset import class_numbers
from kdcache_stores.errors import DataError

_NUMBER = re.compile(r"-?\d{1,18}")


class Labels(NamedTuple):
    """int64 (N,) with -1 where unlabelled, the number of classes, and their names if they have any."""

    numbers: NDArray[np.int64]
    classes: int
    names: list[str] | None


def number_labels(
    texts: Sequence[str | None],
    train: Sequence[str | None],
    keys: Sequence[str],
    split: str,
    what: str,
    names: Sequence[str] | None = None,
    partly: bool = False,
) -> Labels:
    """Numbers of texts that are numbers, else those of sorted names; classes are those of train.

    Args:
        texts: of each sample, None where unlabelled.
        train: those of the train split.
        keys: of the samples, for errors.
        split: "unlabeled" may lack all labels; others none, unless `partly`.
        what: the dataset, for errors.
        names: of the classes that are given by number, if known.
        partly: some samples may be unlabelled.

    Raises:
        DataError: samples without a label, a class that train does not have, or fewer than two classes.
    """
    bare = [i for i, text in enumerate(texts) if not text]
    allowed = split == "unlabeled" if len(bare) == len(texts) else partly
    if bare and not allowed:
        raise DataError(
            f"{what}: {len(bare)} of {len(texts)} images have no label, the first: "
            f"{[keys[i] for i in bare[:3]]}"
        )
    given = sorted({text for text in train if text})
    if given and all(map(_NUMBER.fullmatch, given)):
        numbers = np.array([int(text) if text else -1 for text in texts], dtype=np.int64)
        known = class_numbers([int(text) for text in given], f"labels of {what}")
        classes = len(names) if names else int(known.max()) + 1
        return Labels(
            class_numbers(numbers, f"labels of {what}"), classes, list(names or []) or None
        )
    if len(given) < 2:
        raise DataError(f"{what} must have at least two classes; train has {given or 'none'}")
    number = {name: i for i, name in enumerate(given)}
    if unknown := sorted({text for text in texts if text} - number.keys()):
        raise DataError(
            f"{what} has classes that train does not have: {unknown[:5]}"
            f"{' and more' if len(unknown) > 5 else ''}; labels would mean different things"
        )
    return Labels(np.array([number[t] if t else -1 for t in texts], np.int64), len(given), given)

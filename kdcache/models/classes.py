"""Class maps: which of a teacher's classes is which of the dataset's."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from kdcache_stores.errors import DataError, naming


def load_class_map(
    path: str | Path,
    classes: int,
    class_names: Sequence[str] | None = None,
    teacher_classes: int | None = None,
    teacher_names: Sequence[str] | None = None,
) -> tuple[int, ...]:
    """The teacher's class for each class of the dataset, from a file of pairs.

    The file is a JSON object {teacher class: dataset class}, or CSV of two cells per line, teacher
    class and dataset class (a first line "teacher,dataset" is a header). A class is given by name
    or by index from 0; a name wins over an index. Teacher classes that the dataset does not have
    may be left out, classes of the dataset may not.

    Args:
        path: ending in .json or .csv.
        classes: how many the dataset has.
        class_names: the dataset's, in its order.
        teacher_classes: how many the teacher has, where that is known.
        teacher_names: the teacher's, in the order of its logits.

    Returns:
        For dataset class c at position c: the index of the teacher's logit.

    Raises:
        DataError: unreadable, an unknown or repeated class, or a class of the dataset left out.
    """
    path = Path(path)
    if teacher_classes is None and teacher_names is not None:
        teacher_classes = len(teacher_names)
    indices: dict[int, int] = {}
    for theirs, ours in _pairs(path):
        t = _index(theirs, teacher_names, teacher_classes, f"class map {path}: teacher class")
        d = _index(ours, class_names, classes, f"class map {path}: dataset class")
        if d in indices:
            raise DataError(f"class map {path}: dataset class {ours!r} is given twice")
        if t in indices.values():
            raise DataError(f"class map {path}: teacher class {theirs!r} is given twice")
        indices[d] = t
    absent = [class_names[c] if class_names else str(c) for c in range(classes) if c not in indices]
    if absent:
        raise DataError(
            f"class map {path}: {len(absent)} of {classes} dataset classes have no teacher class: "
            + ", ".join(absent[:10])
        )
    return tuple(indices[c] for c in range(classes))


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            # As pairs, so that a repeated key is seen.
            content = json.loads(text, object_pairs_hook=list)
            if not isinstance(content, list) or not all(isinstance(p, tuple) for p in content):
                raise DataError(f"class map {path}: expected an object of teacher: dataset classes")
            return [(str(theirs), str(ours)) for theirs, ours in content]
        if path.suffix != ".csv":
            raise DataError(f"class map {path}: expected a file ending in .json or .csv")
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"class map {path}: not readable ({error})") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise DataError(f"class map {path}: expected 2 cells, found {len(row)} in row {number}")
    pairs = [(row[0].strip(), row[1].strip()) for row in rows]
    return pairs[1:] if pairs[:1] == [("teacher", "dataset")] else pairs


def _index(text: str, names: Sequence[str] | None, classes: int | None, what: str) -> int:
    named = [i for i, name in enumerate(names or ()) if name == text]
    if len(named) > 1:
        raise DataError(f"{what} {text!r} is the name of {named}: give the index")
    if named:
        return named[0]
    if not text.isdecimal():
        raise DataError(f"{what} {text!r} is neither an index nor a known name")
    if classes is not None and int(text) >= classes:
        raise DataError(f"{what} {text} is out of range: there are {classes}, counted from 0")
    return int(text)


def save_class_map(path: str | Path, class_map: Sequence[int]) -> None:
    """Write a class map as JSON that `load_class_map` reads."""
    pairs = {str(teacher): dataset for dataset, teacher in enumerate(class_map)}
    with naming(path):
        Path(path).write_text(json.dumps(pairs, indent=0) + "\n", encoding="utf-8")


def best_class_map(labels: np.ndarray, predictions: np.ndarray, classes: int) -> tuple[int, ...]:
    """The permutation of the teacher's classes under which most predictions are right.

    Args:
        labels: int64 (N,), of the dataset.
        predictions: int64 (N,), the teacher's classes.
        classes: how many both have.

    Returns:
        As `load_class_map`: the teacher's class for each class of the dataset.
    """
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    _, teacher = linear_sum_assignment(confusion, maximize=True)
    return tuple(int(t) for t in teacher)

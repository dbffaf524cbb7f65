"""The nouns of a store: samples, view plan, teacher, field, probe, shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.errors import DataError, FormatError, UsageError
from kdcache_stores.format.canonical_json import Json, digest, plain

LOGITS = "logits"
"""The field whose rows are over classes: it alone has a top-1 and a fidelity in nats."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a dataset in row order: a unique key and a label each.

    Args:
        keys: one stable name per sample (relative path, published index), unique.
        labels: int64 (N,), -1 for unlabelled.
        hashed: the keys are already the SHA-256 (hex) of the real ones.
    """

    keys: Sequence[str]
    labels: NDArray[np.int64]
    hashed: bool = False

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.shape != (len(self.keys),) or (labels.size and labels.dtype.kind not in "iu"):
            raise DataError(
                f"labels must be {len(self.keys)} integers, one per key; "
                f"found {labels.dtype} of shape {labels.shape}"
            )
        if labels.size and labels.min() < -1:
            row = int(labels.argmin())
            raise DataError(
                f"labels must be -1 (unlabelled) or more, found {labels[row]} in row {row}"
            )
        if labels.size and labels.max() >= 2**63:
            row = int(labels.argmax())
            raise DataError(f"labels must be below 2^63, found {labels[row]} in row {row}")
        object.__setattr__(self, "labels", labels.astype(np.int64))
        seen: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            if not isinstance(key, str) or not key:
                raise DataError(f"keys must be non-empty strings, found {key!r} in row {row}")
            if (first := seen.setdefault(key, row)) != row:
                raise DataError(f"keys must be unique, found {key!r} in rows {first} and {row}")

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def key_hashes(self) -> list[bytes]:
        """SHA-256 of each key's UTF-8 bytes."""
        try:
            if self.hashed:
                hashes = [bytes.fromhex(key) for key in self.keys]
                if any(len(value) != 32 for value in hashes):
                    raise ValueError("a hash of another length")
                return hashes
            return [hashlib.sha256(key.encode()).digest() for key in self.keys]
        except ValueError as error:
            raise DataError(f"keys must be text, or SHA-256 in hex where hashed: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over N and then, row by row, the key's SHA-256 and the label.

        Row order counts. Hashed and plain keys of one dataset give the same fingerprint.
        """
        result = hashlib.sha256(b"kdcache samples\n" + len(self).to_bytes(8, "little"))
        table = np.empty(len(self), dtype=[("key", "V32"), ("label", "<i8")])
        if len(self):
            table["key"] = np.frombuffer(b"".join(self.key_hashes), dtype="V32")
        table["label"] = self.labels
        result.update(table.tobytes())
        return result.hexdigest()

    def hash_keys(self) -> Samples:
        """The same samples under the SHA-256 (hex) of their keys."""
        if self.hashed:
            return self
        return Samples([value.hex() for value in self.key_hashes], self.labels, hashed=True)


@dataclass(frozen=True)
class Plan:
    """A view plan: which dataset, augmented how, from which seed.

    Args:
        dataset: name, for people.
        split: name, for people.
        classes: number of classes K.
        fingerprint: `Samples.fingerprint` of the dataset.
        augmentation: the augmentation and its parameters, plain JSON.
        seed: seed of the views.
        class_names: K names, if known.
        notes: anything else worth keeping (licence, source), plain JSON; in no digest.
        item: dtype and shape of each item that a teacher is given, {"dtype": "float32", "shape": [128]},
            where they are no images (format 1.1); in no digest.
    """

    dataset: str
    split: str
    classes: int
    fingerprint: str
    augmentation: dict[str, Json]
    seed: int
    class_names: list[str] | None = None
    notes: dict[str, Json] = field(default_factory=dict)
    item: dict[str, Json] | None = None

    def __post_init__(self) -> None:
        for name in ("augmentation", "notes", "class_names", "item"):
            object.__setattr__(self, name, plain(getattr(self, name), f"Plan.{name}"))
        if self.classes < 1:
            raise UsageError(f"Plan.classes must be at least 1, found {self.classes}")
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise UsageError(
                f"Plan.class_names must be {self.classes} names, found {len(self.class_names)}"
            )
        if self.item is not None and not _is_item(self.item):
            raise UsageError(
                f"Plan.item must be a dtype and a shape of positive integers, found {self.item!r:.80}"
            )

    @property
    def digest(self) -> str:
        """Identity of the views: dataset fingerprint, augmentation and seed; not their number."""
        return digest(
            "plan",
            {
                "fingerprint": self.fingerprint,
                "augmentation": self.augmentation,
                "seed": self.seed,
            },
        )

    def to_dict(self) -> dict[str, Json]:
        """All fields, plain JSON; `item` where there is one, since format 1.0 has none."""
        return {
            name: value for name, value in vars(self).items() if (name, value) != ("item", None)
        }

    @classmethod
    def from_dict(cls, value: Json, what: str = "plan") -> Plan:
        """The inverse of `to_dict`; unknown names are ignored; raises `FormatError`, naming `what`."""
        return cls(**_known(cls, value, what))


@dataclass(frozen=True)
class StoredTeacher:
    """A frozen teacher: what its outputs depend on, and what people want to know of it.

    Args:
        architecture: name.
        weights_sha256: digest over names, dtypes, shapes and bytes of its tensors (hex).
        preprocessing: size, mean, std, ..., plain JSON.
        precision: "float32", "bfloat16", ...
        classes: number of classes K.
        file_sha256: digest of the weights file itself, if it came from one.
        clean_top1: top-1 on unaugmented splits, e.g. {"test": 0.68}, if known.
        notes: anything else worth keeping, plain JSON; in no digest.
    """

    architecture: str
    weights_sha256: str
    preprocessing: dict[str, Json]
    precision: str
    classes: int
    file_sha256: str | None = None
    clean_top1: dict[str, float] | None = None
    notes: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("preprocessing", "clean_top1", "notes"):
            object.__setattr__(self, name, plain(getattr(self, name), f"StoredTeacher.{name}"))

    @property
    def digest(self) -> str:
        """Identity of the outputs: weights, preprocessing, precision."""
        return digest(
            "teacher",
            {
                "weights_sha256": self.weights_sha256,
                "preprocessing": self.preprocessing,
                "precision": self.precision,
            },
        )

    def to_dict(self) -> dict[str, Json]:
        """All fields, plain JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, value: Json, what: str = "teacher") -> StoredTeacher:
        """The inverse of `to_dict`; unknown names are ignored; raises `FormatError`, naming `what`."""
        return cls(**_known(cls, value, what))


_TYPES: dict[str, Any] = {
    "dataset": str,
    "split": str,
    "classes": int,
    "fingerprint": str,
    "augmentation": dict,
    "seed": int,
    "class_names": (list, type(None)),
    "notes": dict,
    "architecture": str,
    "weights_sha256": str,
    "preprocessing": dict,
    "precision": str,
    "file_sha256": (str, type(None)),
    "clean_top1": (dict, type(None)),
    "item": (dict, type(None)),
}


def _is_item(value: dict[str, Json]) -> bool:
    """Whether it is what `Plan.item` must be."""
    shape = value.get("shape")
    return (
        value.keys() == {"dtype", "shape"}
        and isinstance(value["dtype"], str)
        and len(value["dtype"]) <= 16
        and isinstance(shape, list)
        and 0 < len(shape) <= 8
        and all(type(size) is int and 0 < size < 2**32 for size in shape)
    )


_LONGEST = 4096
"""Characters of a name, at most."""


def _sound(name: str, item: Json) -> bool:
    """Whether a value of the right type is one that the format allows."""
    if isinstance(item, str):
        return len(item) <= _LONGEST
    if name == "classes":
        return bool(0 < item < 2**32)
    if name == "class_names" and item is not None:
        return all(isinstance(entry, str) and len(entry) <= _LONGEST for entry in item)
    if name == "clean_top1" and item is not None:
        return all(
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            for value in item.values()
        )
    return True


def _known(cls: type, value: Json, what: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} must be a JSON object, found {type(value).__name__}")
    known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}  # type: ignore[attr-defined]
    for name, item in known.items():
        if not isinstance(item, _TYPES[name]) or isinstance(item, bool) or not _sound(name, item):
            raise FormatError(f"{what}.{name} has the wrong type: {item!r:.80}")
    try:
        cls(**known)
    except (TypeError, UsageError) as error:
        raise FormatError(f"{what} is incomplete or wrong: {error}") from None
    return known


@dataclass(frozen=True)
class FieldSpec:
    """One named output of the teacher.

    Args:
        shape: shape per row: (K,) for `logits`; (D,), (T, D) or (C, H, W) for features.
        encoding: "float16", "float32", "quantized:0.05", "topk:10", "compact:3e-4", "channels:0.05".
    """

    shape: tuple[int, ...]
    encoding: str = "float16"


@dataclass(frozen=True)
class Probe:
    """A digest of the augmented item of one (row, view), and a few of its values: see `make_probe`."""

    row: int
    view: int
    sha256: str
    coarse: bytes


@dataclass(frozen=True, order=True)
class Shard:
    """The unit of commit: rows [start, stop) of one view, for every array of every field."""

    view: int
    index: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"view {self.view}, rows {self.start} to {self.stop - 1}"

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

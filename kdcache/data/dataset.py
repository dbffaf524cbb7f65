"""What a dataset is: images, or other items, with labels and a stable key per sample."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.data.item import Item, item_tensor
from kdcache.stages import counted
from kdcache_stores import Samples
from kdcache_stores.errors import DataError

Rows = NDArray[np.int64]

#: More than this is no number of a class, but a -1 in an unsigned dtype, say.
MOST_CLASSES = 10_000_000


class Dataset(ABC):
    """N images, or other items of one dtype and shape, with keys and labels.

    Attributes:
        name: of the dataset, for people.
        split: "train", "test" or "unlabeled".
        classes: number of classes K.
        class_names: K names, or None.
        keys: one stable, unique name per sample.
        labels: int64 (N,), -1 where unlabelled.
        item: what each item is where they are no images; None where they are.
        image_shape: (C, H, W), or None when the images differ in size, and for other items.
        images: uint8 (N, C, H, W), or other items (N, *shape), when resident in memory, or None.
        flip: whether a mirrored image keeps its meaning (digits do not).
        skipped: key -> reason, for samples left out because they cannot be decoded.
        remarks: what everyone who uses the split should be told about it, a sentence each.
        remote: images lie behind a network, whose connections do not outlive a fork.
        decoder: what decodes image files here, with its version; None where nothing is decoded.
    """

    images: torch.Tensor | None = None
    item: Item | None = None
    remote: bool = False
    decoder: str | None = None

    def __init__(
        self,
        name: str,
        split: str,
        *,
        keys: Sequence[str],
        labels: NDArray[np.int64],
        classes: int,
        class_names: Sequence[str] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        flip: bool = True,
    ) -> None:
        self.name, self.split = name, split
        self.keys = list(keys)
        self.labels = class_numbers(labels, f"labels of {name} ({split})")
        self.classes = classes
        self.class_names = list(class_names) if class_names is not None else None
        self.image_shape, self.flip = image_shape, flip
        self.skipped: dict[str, str] = {}
        self.remarks: list[str] = []
        if not self.keys:
            raise DataError(f"{name} ({split}) holds no samples")
        if unwritable := [key for key in self.keys if not _is_text(key)]:
            raise DataError(
                f"{name} ({split}): the key or file name {unwritable[0]!a} is not UTF-8 text: "
                "rename it"
            )
        if self.labels.shape != (len(self.keys),):
            raise DataError(
                f"{name} ({split}) has {len(self.keys)} keys, but labels of shape "
                f"{self.labels.shape}"
            )
        if self.labels.max() >= classes:
            row = int(self.labels.argmax())
            raise DataError(
                f"{name} ({split}): label {self.labels[row]} of {self.keys[row]!r} is outside the "
                f"{classes} classes, which are numbered from 0"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def samples(self) -> Samples:
        """Keys and labels, as a store keeps them."""
        return Samples(self.keys, self.labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over keys and labels in row order."""
        return self.samples.fingerprint

    @abstractmethod
    def decode(self, row: int) -> torch.Tensor:
        """The image of a row: uint8 (C, H, W), or its item; raises `DataError` naming the key."""

    def ahead(self, rows: Rows) -> None:  # noqa: B027 (nothing to do where images are at hand)
        """These images are about to be decoded: fetch them together, where that is faster."""

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image, without decoding it where that is possible."""
        if self.image_shape is not None:
            return self.image_shape[1:]
        height, width = self.decode(row).shape[1:]
        return height, width

    def common_shape(self) -> tuple[int, int, int] | None:
        """The shape (C, H, W) that all images have, or None; stops at the first other size.

        None too where an image cannot be read: that is an error when its turn comes.
        """
        try:
            size = self.size(0)
            rows = range(1, len(self))
            what = f"reading image headers of {self.name} ({self.split})"
            if any(self.size(row) != size for row in counted(rows, what, "images", len(rows))):
                return None
            return (len(self.decode(0)), *size)
        except DataError:
            return None

    def subset(self, rows: Sequence[int] | Rows) -> Dataset:
        """The dataset of some rows, in the given order, under the same keys."""
        chosen = np.asarray(rows, dtype=np.int64)
        if len(chosen) == 0:
            raise DataError(f"no rows left of {self.name} ({self.split})")
        part = copy.copy(self)
        part.__dict__.pop("samples", None)
        part.keys = [self.keys[row] for row in chosen]
        part.labels = self.labels[chosen]
        part._select(chosen)
        return part

    @abstractmethod
    def _select(self, rows: Rows) -> None:
        """Keep the images of these rows alone (called on a copy)."""


class ResidentDataset(Dataset):
    """A dataset whose images, or other items, are one tensor in memory.

    Args:
        images: uint8 (N, C, H, W); or items (N, *shape) of another dtype, kept as float32 or int64.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        images: torch.Tensor,
        keys: Sequence[str],
        labels: NDArray[np.int64],
        classes: int,
        class_names: Sequence[str] | None = None,
        flip: bool = True,
    ) -> None:
        kept = images.dtype == torch.uint8
        if len(images) != len(keys) or images.ndim < 2 or (kept and images.ndim != 4):
            raise DataError(
                f"{name} must have images uint8 ({len(keys)}, C, H, W), or items of another dtype "
                f"({len(keys)}, ...), found {images.dtype} {tuple(images.shape)}"
            )
        images = images if kept else item_tensor(images, f"items of {name}")
        super().__init__(
            name,
            split,
            keys=keys,
            labels=labels,
            classes=classes,
            class_names=class_names,
            flip=flip,
        )
        if kept:
            channels, height, width = images.shape[1:]
            self.image_shape = channels, height, width
        else:
            self.item = Item.of(images)
        self.images: torch.Tensor = images.contiguous()

    def decode(self, row: int) -> torch.Tensor:
        """The image of a row: uint8 (C, H, W), or its item; a view of the resident tensor."""
        return self.images[row]

    def _select(self, rows: Rows) -> None:
        self.images = self.images.index_select(0, torch.from_numpy(rows))


def in_memory(dataset: Dataset) -> ResidentDataset:
    """Decode a dataset into one tensor; its images must have one shape."""
    first = dataset.decode(0)
    images = torch.empty((len(dataset), *first.shape), dtype=first.dtype)

    def put(row: int) -> None:
        image = dataset.decode(row)
        if image.shape != first.shape:
            raise DataError(
                f"image {dataset.keys[row]!r} of {dataset.name} has the shape "
                f"{tuple(image.shape)}, "
                f"others {tuple(first.shape)}: such a dataset cannot be held in memory as one "
                "tensor"
            )
        images[row] = image

    with ThreadPoolExecutor() as threads:  # Pillow decodes without the interpreter lock
        for _ in threads.map(put, range(len(dataset))):
            pass
    resident = ResidentDataset(
        dataset.name,
        dataset.split,
        images=images,
        keys=dataset.keys,
        labels=dataset.labels,
        classes=dataset.classes,
        class_names=dataset.class_names,
        flip=dataset.flip,
    )
    resident.skipped, resident.remarks = dataset.skipped, dataset.remarks
    return resident


def without_bad_images(dataset: Dataset, workers: int = 0) -> Dataset:
    """Leave out the images that cannot be decoded; decodes every image once to find them.

    Args:
        dataset: any.
        workers: processes that decode; 0: this one.

    Returns:
        The dataset itself, or a subset whose `skipped` says for each key left out why. A plan over
        it does not hold these samples; a student finds the plan's samples in its own dataset by
        key, so both stages leave out the same ones.

    Raises:
        DataError: no image can be decoded.
    """
    if dataset.images is not None:
        return dataset
    loader = torch.utils.data.DataLoader(
        _Trial(dataset),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start_method(dataset) if workers else None,
    )
    what = f"decoding every image of {dataset.name} ({dataset.split})"
    tried = counted(loader, what, "images", len(dataset))
    bad = {row: reason for row, reason in enumerate(tried) if reason is not None}
    if not bad:
        return dataset
    if len(bad) == len(dataset):
        raise DataError(f"no image of {dataset.name} ({dataset.split}) can be decoded: {bad[0]}")
    part = dataset.subset([row for row in range(len(dataset)) if row not in bad])
    part.skipped = dataset.skipped | {dataset.keys[row]: reason for row, reason in bad.items()}
    part.remarks = [
        *dataset.remarks,
        f"{len(bad)} of {len(dataset)} images of {dataset.name} ({dataset.split}) cannot be decoded "
        f"and are left out: {[dataset.keys[row] for row in list(bad)[:5]]}"
        f"{' and more' if len(bad) > 5 else ''}",
    ]
    return part


def start_method(dataset: Dataset) -> str | None:
    """How worker processes that decode a dataset must start; None: as usual."""
    return "spawn" if dataset.remote else None


class _Trial(torch.utils.data.Dataset[str | None]):
    """Whether each image can be decoded: None, or why not."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> str | None:
        try:
            self.dataset.decode(row)
        except DataError as error:
            return str(error)
        return None


def class_numbers(labels: Any, what: str) -> NDArray[np.int64]:
    """Labels of any integer dtype as int64, -1 where unlabelled.

    Raises:
        DataError: they are no integers, or one is too large for the number of a class: a -1 that
            an unsigned dtype has wrapped.
    """
    try:
        numbers = np.asarray(labels)
    except ValueError as error:  # lists of unequal length
        raise DataError(f"{what} must be class numbers (integers): {error}") from error
    if numbers.size and numbers.dtype.kind not in "biu":
        raise DataError(
            f"{what} must be class numbers (integers from 0, or -1 where unlabelled), found "
            f"{numbers.dtype}"
        )
    if numbers.size and numbers.max() > MOST_CLASSES:
        row = int(numbers.argmax())
        raise DataError(
            f"{what} must be class numbers from 0, found {numbers.flat[row]} in row {row}; "
            "unlabelled samples have -1 in a signed dtype"
        )
    return numbers.astype(np.int64)


def _is_text(key: str) -> bool:
    """Whether it has UTF-8 bytes: a file name of other bytes has none."""
    return not any("\ud800" <= letter <= "\udfff" for letter in key) if not key.isascii() else True


def index_keys(split: str, indices: Sequence[int] | Rows, total: int) -> list[str]:
    """Keys of samples known by their published index: "train/00042", as wide as the last one."""
    width = len(str(total - 1))
    return [f"{split}/{int(index):0{width}d}" for index in indices]

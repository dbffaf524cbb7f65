"""Small datasets that live in memory: scikit-learn's digits, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from kdcache.data.dataset import Dataset, ResidentDataset, index_keys
from kdcache_stores.errors import DataError, UsageError

_STL10_CLASSES = [
    "airplane",
    "bird",
    "car",
    "cat",
    "deer",
    "dog",
    "horse",
    "monkey",
    "ship",
    "truck",
]


def digits(split: str, root: Path, download: bool) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels, part of scikit-learn: every fifth is for testing."""
    from sklearn.datasets import load_digits

    only_splits("digits", split)
    data = load_digits()
    index = np.arange(len(data.target))
    rows = index[(index % 5 == 0) == (split == "test")]
    pixels = np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)[:, None]
    return ResidentDataset(
        "digits",
        split,
        images=torch.from_numpy(pixels),
        keys=index_keys("digits", rows, len(index)),
        labels=data.target[rows].astype(np.int64),
        classes=10,
        class_names=[str(digit) for digit in range(10)],
        flip=False,
    )


def cifar10(split: str, root: Path, download: bool) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels, 10 classes."""
    return _cifar("cifar10", torchvision.datasets.CIFAR10, split, root, download)


def cifar100(split: str, root: Path, download: bool) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels, 100 classes."""
    return _cifar("cifar100", torchvision.datasets.CIFAR100, split, root, download)


def mnist(split: str, root: Path, download: bool) -> Dataset:
    """MNIST: 60,000 + 10,000 grey digits of 28x28 pixels."""
    return _mnist("mnist", torchvision.datasets.MNIST, split, root, download, flip=False)


def fashion_mnist(split: str, root: Path, download: bool) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28 pixels, 10 classes."""
    return _mnist("fashion-mnist", torchvision.datasets.FashionMNIST, split, root, download)


def stl10(split: str, root: Path, download: bool) -> Dataset:
    """STL10: 5,000 + 8,000 labelled and 100,000 unlabelled colour images of 96x96 pixels."""
    only_splits("stl10", split, ("train", "test", "unlabeled"))
    data = _open("stl10", torchvision.datasets.STL10, root, split=split, download=download)
    return ResidentDataset(
        "stl10",
        split,
        images=torch.from_numpy(data.data),
        keys=index_keys(split, range(len(data.data)), len(data.data)),
        labels=np.asarray(data.labels, dtype=np.int64),
        classes=len(_STL10_CLASSES),
        class_names=_STL10_CLASSES,
    )


def _cifar(name: str, cls: Callable[..., Any], split: str, root: Path, download: bool) -> Dataset:
    only_splits(name, split)
    data = _open(name, cls, root, train=split == "train", download=download)
    return ResidentDataset(
        name,
        split,
        images=torch.from_numpy(data.data).permute(0, 3, 1, 2),
        keys=index_keys(split, range(len(data.data)), len(data.data)),
        labels=np.asarray(data.targets, dtype=np.int64),
        classes=len(data.classes),
        class_names=data.classes,
    )


def _mnist(
    name: str,
    cls: Callable[..., Any],
    split: str,
    root: Path,
    download: bool,
    flip: bool = True,
) -> Dataset:
    only_splits(name, split)
    data = _open(name, cls, root, train=split == "train", download=download)
    return ResidentDataset(
        name,
        split,
        images=data.data[:, None],
        keys=index_keys(split, range(len(data.data)), len(data.data)),
        labels=data.targets.numpy().astype(np.int64),
        classes=len(data.classes),
        class_names=data.classes,
        flip=flip,
    )


def _open(name: str, cls: Callable[..., Any], root: Path, **options: Any) -> Any:
    try:
        return cls(root, **options)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if options["download"]:
            raise DataError(f"{name} could not be downloaded to {root}: {error}") from error
        raise missing(
            name,
            root,
            f"torchvision finds no whole {getattr(cls, '__name__', name)} there ({error})",
        ) from error


def missing(name: str, root: Path, why: str) -> DataError:
    """The error for a dataset that is not there: where it was looked for and how to get it."""
    return DataError(
        f"{name} was looked for in {root}: {why}. Name its folder with --data-root (root=...), or "
        "add --download (download=True) to fetch it from its publisher"
    )


def only_splits(name: str, split: str, known: tuple[str, ...] = ("train", "test")) -> None:
    """Raise `UsageError` for a split that the dataset does not have."""
    if split not in known:
        raise UsageError(f"{name} has the splits {', '.join(known)}; asked for {split!r}")

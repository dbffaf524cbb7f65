"""Datasets by name: images, labels and a stable key per sample."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kdcache.datasets import resident
from kdcache.datasets.arrays import arrays
from kdcache.datasets.base import Dataset, ResidentDataset
from kdcache.datasets.folder import FolderDataset, image_folder
from kdcache_stores.errors import UnknownName

__all__ = [
    "DATASETS",
    "Dataset",
    "FolderDataset",
    "ResidentDataset",
    "default_root",
    "load_dataset",
]

#: name -> loader(split, root, download)
DATASETS: dict[str, Callable[[str, Path, bool], Dataset]] = {
    "digits": resident.digits,
    "mnist": resident.mnist,
    "fashion-mnist": resident.fashion_mnist,
    "cifar10": resident.cifar10,
    "cifar100": resident.cifar100,
    "stl10": resident.stl10,
}
_PREFIXES = ("arrays:FILE.npz", "folder:PATH")


def default_root() -> Path:
    """Where datasets are kept unless told otherwise: `kdcache/data` in the user's cache
    directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kdcache" / "data"


def load_dataset(
    name: str, split: str = "train", root: Path | None = None, download: bool = False
) -> Dataset:
    """Load one split of a dataset.

    Args:
        name: one of `DATASETS`, `arrays:FILE.npz` or `folder:PATH`.
        split: "train", "test" or "unlabeled".
        root: where the named datasets are kept; by default `default_root()`.
        download: fetch it from its publisher if it is not there.

    Raises:
        UnknownName: no such dataset.
        DataError: it is not there, or is not what it must be.
    """
    kind, colon, rest = name.partition(":")
    if colon and rest:
        if kind == "arrays":
            return arrays(rest, split)
        if kind == "folder":
            return image_folder(Path(rest).expanduser(), split)
    if name not in DATASETS:
        raise UnknownName("dataset", name, [*DATASETS, *_PREFIXES])
    return DATASETS[name](split, Path(root) if root is not None else default_root(), download)

"""Datasets by name: images, labels and a stable key per sample."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.augment.custom import is_import_path
from kdcache.data import small_images
from kdcache.data.arrays import arrays
from kdcache.data.dataset import Dataset, without_bad_images
from kdcache.data.encoded.parquet_rows import parquet_images
from kdcache.data.encoded.tar_shards import tar_images
from kdcache.data.folder import own_folder
from kdcache.data.foreign import hugging_face, user_dataset
from kdcache.data.imagenet import imagenet, tiny_imagenet
from kdcache.data.kept_shapes import kept_shape
from kdcache.stages import stage
from kdcache_stores.errors import UnknownName, UsageError

#: name -> loader(split, root, download)
DATASETS: dict[str, Callable[[str, Path, bool], Dataset]] = {
    "digits": small_images.digits,
    "mnist": small_images.mnist,
    "fashion-mnist": small_images.fashion_mnist,
    "cifar10": small_images.cifar10,
    "cifar100": small_images.cifar100,
    "stl10": small_images.stl10,
    "tiny-imagenet": tiny_imagenet,
    "imagenet": imagenet,
}
#: What else a name can be -> what it is.
PREFIXES = {
    "arrays:FILE.npz": "x_train, y_train, x_test, y_test and optional keys of an .npz file.",
    "folder:PATH": "A folder of images by class, in train and val or test; or train alone.",
    "tar:PATTERN": "Images in tar archives, not unpacked: WebDataset shards, or folders of classes.",
    "parquet:PATTERN": "Images in the rows of Parquet files, such as Hugging Face's; paths or URLs.",
    "hf:NAME": "An image dataset of Hugging Face `datasets` (extra `hf`); hf:NAME:CONFIG:LABEL:IMAGE.",
    "pkg.module:factory": "A dataset of your own, made by a function of the split; arrays and it may hold "
    "no images but features or token ids.",
}

_FILES = {"tar": tar_images, "parquet": parquet_images}
_COLUMNS = re.compile(r"(.*)#image=([^#=,]*),label=([^#=,]*)")


def default_root() -> Path:
    """Where datasets are kept unless told otherwise: `kdcache/data` in the user's cache
    directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kdcache" / "data"


def load_dataset(
    name: str,
    split: str = "train",
    root: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
) -> Dataset:
    """Load one split of a dataset.

    Args:
        name: one of `DATASETS`, `arrays:FILE.npz`, `folder:PATH`, `tar:PATTERN`,
            `parquet:PATTERN`, `hf:NAME` (see `with_columns`), or a user's own `pkg.module:factory`,
            which is imported: pass only what the user asked for, never what a store says.
        split: "train", "test" or "unlabeled".
        root: where the named datasets are kept; by default `default_root()`.
        download: fetch it from its publisher if it is not there.
        skip_bad: decode all images first and leave out those that cannot be, see
            `without_bad_images`; else such an image is an error when its turn comes.
        workers: processes that decode for `skip_bad`.

    Raises:
        UnknownName: no such dataset.
        DataError: it is not there, or is not what it must be.
    """
    folder = Path(root) if root is not None else default_root()
    dataset = _load(name, split, folder, download)
    with stage(
        f"hashing the keys of {dataset.name} ({dataset.split})", "keys", len(dataset)
    ) as done:
        dataset.samples.fingerprint  # noqa: B018 (raises for keys that are not unique)
        done(len(dataset))
    dataset.remarks = dataset.remarks + _empty_classes(dataset)
    if skip_bad:
        dataset = without_bad_images(dataset, workers)
    if dataset.image_shape is None and dataset.item is None:
        dataset.image_shape = kept_shape(dataset, folder / "shapes")
    return dataset


def with_columns(name: str, image: str | None, label: str | None) -> str:
    """A dataset's name that says which columns hold its images and labels: what runs keep of it.

    Args:
        name: of a dataset, `tar:`, `parquet:` or `hf:`.
        image: column of the images, or the extension of the members of archives.
        label: column of the labels, or the field of the .json members of archives.

    Raises:
        UsageError: a dataset without columns.
    """
    if not image and not label:
        return name
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        repository, config, own_label, own_image = (rest.split(":") + [""] * 3)[:4]
        return f"hf:{repository}:{config}:{label or own_label}:{image or own_image}"
    if kind not in _FILES or not rest:
        raise UsageError(f"{name} has no columns to choose: tar:, parquet: and hf: have")
    return f"{name}#image={image or ''},label={label or ''}"


def _columns(rest: str) -> tuple[str, tuple[str, str]]:
    """A pattern, and the columns that `with_columns` added to it."""
    match = _COLUMNS.fullmatch(rest)
    return (match[1], (match[2], match[3])) if match else (rest, ("", ""))


def _empty_classes(dataset: Dataset) -> list[str]:
    """Says which classes a labelled training split has no sample of."""
    counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=dataset.classes)
    empty = np.flatnonzero(counts == 0).tolist()
    if dataset.split != "train" or not empty or not counts.any():
        return []
    names = dataset.class_names
    listed = [names[label] if names else label for label in empty[:5]]
    remark = (
        f"{len(empty)} of the {dataset.classes} classes of {dataset.name} have no training sample: "
        f"{listed}{' and more' if len(empty) > 5 else ''}"
    )
    if empty == [0] and not names:
        remark += (
            f". Do its labels count from 1? Then subtract 1 from them: a network is made for "
            f"{dataset.classes} classes, numbered from 0"
        )
    return [remark]


@dataclass(frozen=True)
class DatasetSource:
    """A dataset by its name, and how its splits are loaded; the attributes are those of `load_dataset`."""

    name: str
    root: Path | None = None
    download: bool = False
    skip_bad: bool = False
    workers: int = 0

    def load(self, split: str) -> Dataset:
        """One split; see `load_dataset`."""
        return load_dataset(self.name, split, self.root, self.download, self.skip_bad, self.workers)


def _load(name: str, split: str, root: Path, download: bool) -> Dataset:
    kind, _, rest = name.partition(":")
    if rest and kind == "arrays":
        return arrays(rest, split)
    if rest and kind == "folder":
        return own_folder(Path(rest).expanduser(), split)
    if rest and kind in _FILES:
        pattern, columns = _columns(rest)
        return _FILES[kind](pattern, split, root, *columns)
    if rest and kind == "hf":
        return hugging_face(rest, split, root, download)
    if is_import_path(name):
        return user_dataset(name, split)
    if name not in DATASETS and Path(name).expanduser().exists():
        written = "folder" if Path(name).expanduser().is_dir() else "arrays"
        raise UsageError(f"{name} is a path, not the name of a dataset: write {written}:{name}")
    if name not in DATASETS:
        raise UnknownName("dataset", name, [*DATASETS, *PREFIXES])
    return DATASETS[name](split, root, download)

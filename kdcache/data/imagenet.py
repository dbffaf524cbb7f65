"""ImageNet and Tiny-ImageNet, from the folders that their archives unpack to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdcache.data.dataset import Dataset, in_memory
from kdcache.data.folder import FolderDataset, image_folder
from kdcache.data.small_images import only_splits
from kdcache_stores.errors import DataError

_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def imagenet(split: str, root: Path, download: bool) -> Dataset:
    """ImageNet-1k (ILSVRC 2012): 1,281,167 + 50,000 photographs of 1,000 classes, JPEG files.

    Read from `root`/imagenet/train and val, a folder per class; classes are numbered by their
    sorted WordNet ids, as torchvision does.
    """
    only_splits("imagenet", split)
    folder = root / "imagenet"
    if not folder.is_dir():
        raise DataError(
            f"imagenet was looked for in {folder}: there is no such folder. It cannot be "
            "downloaded "
            "without an account at image-net.org: put the archives there, unpack them with "
            "torchvision.datasets.ImageNet (once per split), or name the folder that holds "
            "imagenet/ with --data-root"
        )
    return image_folder(folder, split, "imagenet")


def tiny_imagenet(split: str, root: Path, download: bool) -> Dataset:
    """Tiny-ImageNet: 100,000 + 10,000 images of 64x64 pixels, 200 classes; decoded into memory
    once.

    The test split is the published validation set, whose labels are known.
    """
    only_splits("tiny-imagenet", split)
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise DataError(
            f"tiny-imagenet was looked for in {folder}: there is no such folder. Unpack "
            f"{_TINY_URL} in "
            f"{root}, or name the folder that holds tiny-imagenet-200/ with --data-root"
        )
    annotations = folder / "val" / "val_annotations.txt"
    if split == "train" or not annotations.is_file():
        return in_memory(image_folder(folder, split, "tiny-imagenet"))
    names = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    number = {name: index for index, name in enumerate(names)}
    lines = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
    unknown = sorted({fields[1] for fields in lines if fields[1] not in number})
    if unknown:
        raise DataError(f"{annotations} names classes that train/ does not have: {unknown[:5]}")
    return in_memory(
        FolderDataset(
            "tiny-imagenet",
            split,
            folder=folder / "val",
            keys=[f"images/{fields[0]}" for fields in lines],
            labels=np.array([number[fields[1]] for fields in lines], dtype=np.int64),
            class_names=names,
        )
    )

"""Images in files: a folder per class, decoded when they are needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdcache.data.dataset import Dataset, Rows
from kdcache.data.encoded.decoding import decode_image
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache.data.holdout import hold_out
from kdcache.stages import stage
from kdcache_stores.errors import DataError

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
    "unlabeled": ("unlabeled",),
}


class FolderDataset(EncodedDataset):
    """Image files under one folder; a key is a path relative to it, with `/`."""

    def __init__(
        self,
        name: str,
        split: str,
        *,
        folder: Path,
        keys: Sequence[str],
        labels: NDArray[np.int64],
        class_names: Sequence[str],
    ) -> None:
        super().__init__(
            name,
            split,
            keys=keys,
            labels=labels,
            classes=len(class_names),
            class_names=class_names,
        )
        self.folder = folder

    def read(self, row: int, limit: int | None = None) -> bytes:
        """The bytes of a row's file; see `EncodedDataset`."""
        return read_file(self.folder / self.keys[row], limit)

    def _select(self, rows: Rows) -> None:
        """The files stay where they are."""


def decode_file(path: Path) -> torch.Tensor:
    """Decode an image file: uint8 (3, H, W); see `decode_image`.

    Raises `DataError` for a file that is missing too.
    """
    return decode_image(read_file(path))


def read_file(path: Path, limit: int | None = None) -> bytes:
    """A file's bytes, or the first `limit` of them; raises `DataError`."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(-1 if limit is None else limit) or b""
    except FileNotFoundError as error:
        raise DataError("there is no such file") from error
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})") from error


def own_folder(path: Path, split: str) -> Dataset:
    """A split of a user's folder: `image_folder`, or `hold_out` where it has nothing for testing."""
    alone = split in ("train", "test") and path.is_dir() and not _has_test(path)
    whole = image_folder(path, "train" if alone else split)
    return hold_out(whole, split) if alone else whole


def image_folder(path: Path, split: str, name: str | None = None) -> FolderDataset:
    """A split of a folder with one sub-folder per class.

    `path` holds train/ and val/ or test/ (see `SPLITS`; Training/ and Test/ count as well where
    they hold folders), each with the classes; or the classes themselves, which then are the train
    split. Classes are numbered by their sorted names, for every split by those of train/. Hidden
    files and folders (.ipynb_checkpoints) are not looked at; what else is left out, remarks say.

    Raises:
        DataError: no such split, no images, a single class, a class of train/ without an image, a
            class that train/ does not have.
    """
    name = name or f"folder:{path.resolve().name}"
    folder = _split_folder(path, split)
    present = _class_names(folder)
    train = next(iter(_named(path, "train")), folder)
    names = _class_names(train) if folder != train else present
    unknown = [label for label in present if label not in names]
    if unknown:
        raise DataError(
            f"{folder} has classes that {train} does not have: {unknown[:5]}"
            f"{' and more' if len(unknown) > 5 else ''}; labels would mean different things"
        )
    if len(names) < 2:
        raise DataError(
            f"{folder} must hold a sub-folder per class, at least two; found {names or 'none'}"
        )
    number = {label: index for index, label in enumerate(names)}
    scan = _Scan()
    keys = []
    with stage(f"scanning {name} ({split})", "images") as advance:
        for label in present:
            files = scan.images(folder / label)
            keys += [f"{label}/{file}" for file in files]
            advance(len(files))
    if not keys:
        raise DataError(
            f"{folder} holds {len(present)} class folders, but no image ({', '.join(IMG_EXTENSIONS)})"
        )
    empty = sorted(set(present) - {key.split("/", 1)[0] for key in keys})
    if empty and split == "train":
        raise DataError(
            f"{folder} has folders without an image ({', '.join(IMG_EXTENSIONS)}): {empty[:5]}"
            f"{' and more' if len(empty) > 5 else ''}. Each would count as a class: remove or fill "
            "them"
        )
    labels = np.array([number[key.split("/", 1)[0]] for key in keys], dtype=np.int64)
    dataset = FolderDataset(name, split, folder=folder, keys=keys, labels=labels, class_names=names)
    dataset.remarks = _unused_folders(path, name) + scan.remarks(f"{name} ({split})", len(keys))
    return dataset


def _named(path: Path, split: str) -> list[Path]:
    """The folders of a split, the one to use first.

    Another spelling than in `SPLITS` may be that of a class: it must hold folders, as splits do.
    """
    order = SPLITS.get(split, (split,))
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_dir() and e.name.lower() in order]
    plain = ("train", "test", "val", "valid", "validation", "unlabeled")
    splits = [name for name in names if name in plain or _class_names(path / name)]
    return [path / n for n in sorted(splits, key=lambda n: (order.index(n.lower()), n.swapcase()))]


def _unused_folders(path: Path, name: str) -> list[str]:
    """Says which folders beside train/ belong to no split, or to one that another folder is."""
    chosen = {split: folders[0].name for split in SPLITS if (folders := _named(path, split))}
    unused = [folder for folder in _class_names(path) if folder not in chosen.values()]
    if "train" not in chosen or not (unused or set(chosen.values()) - {"train", "test", "val"}):
        return []
    taken = ", ".join(f"{split} from {folder}/" for split, folder in chosen.items())
    return [f"{name} takes {taken}" + (f"; not used: {unused[:5]}" if unused else "")]


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise DataError(f"images were looked for in {path}: there is no such folder")
    if folders := _named(path, split):
        return folders[0]
    if split == "train" and not _has_test(path):
        return path
    raise DataError(
        f"{path} has no folder {' or '.join(SPLITS.get(split, (split,)))} for the split {split!r}; "
        f"it has {sorted(entry.name for entry in path.iterdir())[:8]}"
    )


def _has_test(path: Path) -> bool:
    # Beside no train/, "valid" is a class as likely as a split.
    folders = _named(path, "test")
    return bool(folders and _named(path, "train")) or any(
        folder.name.lower() in ("test", "testing", "val") for folder in folders
    )


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


class _Scan:
    """The images under folders, and what was not taken."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.repeated: list[str] = []

    def images(self, folder: Path) -> list[str]:
        """Paths of the images under a folder, relative to it, sorted; hidden ones are left out.

        Links are followed, but no folder is entered twice, nor one that this one lies in.
        """
        paths = []
        here = Path(os.path.realpath(folder))
        entered = {str(place) for place in (here, *here.parents)}
        for base, folders, files in os.walk(folder, followlinks=True):
            shown = sorted(name for name in folders if not name.startswith("."))
            folders.clear()
            for name in sorted(shown, key=lambda n: os.path.islink(os.path.join(base, n))):
                real = os.path.realpath(os.path.join(base, name))
                if real in entered:
                    self.repeated.append(os.path.relpath(os.path.join(base, name), folder.parent))
                else:
                    entered.add(real)
                    folders.append(name)
            inner = os.path.relpath(base, folder).replace(os.sep, "/")
            prefix = "" if inner == "." else inner + "/"
            for file in files:
                if file.startswith("."):
                    continue
                if file.lower().endswith(IMG_EXTENSIONS):
                    paths.append(prefix + file)
                else:
                    self.left_out[os.path.splitext(file)[1] or "no extension"] += 1
        return sorted(paths)

    def remarks(self, what: str, taken: int) -> list[str]:
        """What was taken, repeated and left out; nothing where all was taken."""
        kinds = ", ".join(
            f"{count} with {suffix}" for suffix, count in sorted(self.left_out.items())
        )
        parts = [f"{what}: {taken} images are taken"]
        if self.left_out:
            parts.append(f"left out are files of other extensions than images have here: {kinds}")
        if self.repeated:
            parts.append(
                f"left out are links to folders that are there already: {sorted(self.repeated)[:5]}"
            )
        return ["; ".join(parts)] if len(parts) > 1 else []

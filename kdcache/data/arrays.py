"""A user's own arrays in one NumPy file: `arrays:FILE.npz`."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.data.dataset import Dataset, ResidentDataset, class_numbers, index_keys
from kdcache.data.holdout import hold_out
from kdcache.data.item import Item, item_tensor
from kdcache.data.small_images import only_splits
from kdcache_stores.errors import DataError

#: Bytes that one byte of deflate gives at most (zlib: 1032).
DEFLATED = 1032

#: What the test split's arrays may be called, the first that is there is used.
TESTS = ("test", "val", "valid", "validation")


def arrays(file: str, split: str) -> Dataset:
    """The arrays x_train, y_train, x_test, y_test of an npz file.

    x is images, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; or other items
    of any shape, see `items_or_images`; y is integers (N,). Optional: keys_train, keys_test (text),
    class_names, x_unlabeled. Other usual names are taken too, and said: train_images, images_train, images
    and labels alone, and the like. Without keys a sample is known by its
    index. The last axis holds the channels if it is 1 or 3 long; else the second one must. Without
    x_test and y_test, x_val and y_val (or valid, validation) are the test split; without either,
    see `hold_out`. A remark names the arrays that are not used.
    """
    path = Path(file).expanduser()
    only_splits(f"arrays:{file}", split, ("train", "test", "unlabeled"))
    if not path.is_file():
        raise DataError(f"arrays were looked for in {path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is not a readable .npz file: it is another kind of file, or cut short"
        )
    try:
        _check_sizes(path)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as loaded:
            names = _canonical(loaded.files)
            held = list(names)
            tests = (s for s in TESTS if {f"x_{s}", f"y_{s}"} & set(held))
            test = next(tests, None)
            alone = split in ("train", "test") and test is None
            wanted = split
            split = "train" if alone else test if split == "test" and test else split
            content = {
                name: loaded[names[name]]
                for name in (f"x_{split}", f"y_{split}", f"keys_{split}", "y_train", "class_names")
                if name in held
            }
    except DataError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    if split == "unlabeled" and f"x_{split}" in content:
        count = len(content[f"x_{split}"])
        content.setdefault(f"y_{split}", np.full(count, -1, dtype=np.int64))
    absent = [name for name in (f"x_{split}", f"y_{split}") if name not in content]
    if absent:
        given = ", ".join(f"{name}=z[...]" for name in ("x_train", "y_train", "x_test", "y_test"))
        raise DataError(
            f"{path} lacks the arrays {absent}; it has {sorted(names.values())}. Save them under these names: "
            f"z = np.load({path.name!r}); np.savez('renamed.npz', {given})"
        )
    images, remarks = items_or_images(content[f"x_{split}"], f"x_{split} of {path.name}")
    labels = content[f"y_{split}"]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"y_{split} of {path} must be {len(images)} integers, "
            f"found {labels.dtype} {labels.shape}: a class number from 0 for each row of x, as "
            "y.argmax(1) makes of one-hot rows and y.ravel() of a column"
        )
    labels = class_numbers(labels, f"y_{split} of {path}")
    class_names = [str(name) for name in content.get("class_names", [])] or None
    train = class_numbers(content.get("y_train", labels), f"y_train of {path}")
    classes = (
        len(class_names)
        if class_names
        else int(max(labels.max(initial=0), train.max(initial=0))) + 1
    )
    keys = content.get(f"keys_{split}")
    dataset = ResidentDataset(
        f"arrays:{path.name}",
        "train" if alone else wanted,
        images=images,
        keys=index_keys(split, range(len(images)), len(images))
        if keys is None
        else [str(key) for key in keys],
        labels=labels,
        classes=classes,
        class_names=class_names,
    )
    dataset.remarks = _remarks(dataset.name, names, test) + remarks
    return hold_out(dataset, wanted) if alone else dataset


def _check_sizes(path: Path) -> None:
    """Refuse arrays whose headers claim more bytes than the file holds, before making room."""
    with zipfile.ZipFile(path) as archive:
        for entry in (e for e in archive.infolist() if e.filename.endswith(".npy")):
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                first = version == (1, 0)
                read = (
                    np.lib.format.read_array_header_1_0
                    if first
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
            if dtype.hasobject and entry.filename.startswith("x_"):
                raise DataError(
                    f"{path}: {entry.filename} holds Python objects, as rows of differing length give: "
                    "pad the rows (token ids) or pool them to one length, and save numbers"
                )
            claimed = math.prod(shape) * dtype.itemsize
            held = entry.file_size
            if entry.compress_type == zipfile.ZIP_DEFLATED:  # whatever the entry says of its size
                held = min(held, DEFLATED * entry.compress_size)
            elif entry.compress_type == zipfile.ZIP_STORED:
                held = min(held, entry.compress_size)
            if claimed > held and not dtype.hasobject:
                raise DataError(
                    f"{path}: {entry.filename} claims {claimed} bytes of {dtype} {shape} and holds "
                    f"{held} at most: the file is damaged, write it anew"
                )


#: What images and labels of a split are called elsewhere; those without a split are of the training's.
X, Y = (
    ("x_{}", "X_{}", "{}_x", "{}_images", "images_{}"),
    ("y_{}", "{}_y", "{}_labels", "labels_{}"),
)
ALONE = {"x_train": ("images", "x", "X"), "y_train": ("labels", "y")}


def _canonical(held: list[str]) -> dict[str, str]:
    """The arrays of a file by the names that `arrays` documents -> their own."""
    names = {}
    for split in ("train", *TESTS, "unlabeled"):
        for part, patterns in (("x", X), ("y", Y)):
            name = f"{part}_{split}"
            usual = [pattern.format(split) for pattern in patterns]
            own = next((n for n in (*usual, *ALONE.get(name, ())) if n in held), None)
            if own is not None:
                names[name] = own
    return names | {n: n for n in held if n not in names.values()}


def _remarks(name: str, names: dict[str, str], test: str | None) -> list[str]:
    """Says which arrays were taken under another name, are the test split, and are not used."""
    held = list(names)
    renamed = [f"{own} as {of}" for of, own in names.items() if of != own]
    used = {f"{part}_{split}" for part in "xy" for split in ("train", test, "unlabeled")}
    used |= {f"keys_{split}" for split in ("train", test, "unlabeled")} | {"class_names"}
    unused = sorted(set(held) - used)
    remarks = [f"{name}: {', '.join(renamed)}"] if renamed else []
    if test not in (None, "test"):
        remarks.append(f"{name} has no x_test: x_{test} and y_{test} are its test split")
    if unused:
        remarks.append(f"{name} holds arrays that are not used: {unused[:8]}")
    return remarks


def items_or_images(x: NDArray[Any], what: str) -> tuple[torch.Tensor, list[str]]:
    """What the rows of an array are: uint8 images (N, C, H, W), or float32 or int64 items (N, *shape).

    uint8 rows are images. So are (N, H, W, C) and (N, C, H, W) of 1 or 3 channels in another dtype whose
    values are all whole numbers from 0 to 255; what else is no uint8 are items, see `item_tensor`.

    Args:
        x: as a user saved it.
        what: names it in messages.

    Returns:
        The tensor, and remarks on how the array was read, where there are two ways.

    Raises:
        DataError: neither images nor items.
    """
    if x.dtype == np.uint8:
        return channels_first(x, what), []
    if x.ndim < 2 or 0 in x.shape:
        raise DataError(
            f"{what} must have a row of numbers for each sample, (N, D) or (N, ...), found {x.shape}"
        )
    items = item_tensor(x, what)
    pictures = x.ndim == 4 and (x.shape[3] in (1, 3) or x.shape[1] in (1, 3))
    if pictures and bool(((items >= 0) & (items <= 255) & (items == items.round())).all()):
        images = channels_first(items.numpy().astype(np.uint8), what)
        return images, [f"{what} are {x.dtype} with values from 0 to 255: taken as uint8 images"]
    return items, [f"{what} are {Item.of(items).remark}"]


def channels_first(x: NDArray[np.uint8], what: str) -> torch.Tensor:
    """Images as uint8 (N, C, H, W) from (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(
            f"{what} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, "
            f"found {x.shape}. Features are float32, token ids int64"
        )
    return torch.from_numpy(np.ascontiguousarray(x))

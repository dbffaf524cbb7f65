"""Datasets of other makers: Hugging Face `datasets`, and a user's own map-style dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdcache.augment.custom import import_factory
from kdcache.data.dataset import Dataset, Rows, class_numbers, index_keys
from kdcache.data.encoded.decoding import rgb_tensor
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache.data.folder import read_file
from kdcache.data.holdout import hold_out
from kdcache.data.item import Item, item_tensor
from kdcache_stores.errors import DataError, KDCacheError, UsageError

#: Side in pixels up to which all images of a source without headers are decoded for their shape.
SMALL = 96
_HF_SPLITS = {"train": ("train",), "test": ("test", "validation", "val")}


class MapDataset(Dataset):
    """Images, or other items, taken from any object with `[row]`.

    The first one says which: a Pillow image or a uint8 tensor is an image, any other tensor or array
    of numbers an item, and all others must be of its dtype and shape.

    Args:
        source: `source[row]` is the image or item, or a tuple or mapping that holds it.
        field: name of the image in a mapping; None: the item itself, or its first element.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        source: Any,
        keys: Sequence[str],
        labels: NDArray[np.int64],
        classes: int,
        class_names: Sequence[str] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        flip: bool = True,
        field: str | None = None,
    ) -> None:
        super().__init__(
            name,
            split,
            keys=keys,
            labels=labels,
            classes=classes,
            class_names=class_names,
            image_shape=image_shape,
            flip=flip,
        )
        self.source, self.field = source, field
        self.rows: Rows = np.arange(len(self), dtype=np.int64)
        with suppress(DataError):  # an image, for all that is known; an error when its turn comes
            self.item = _kind(self._read(0))

    def decode(self, row: int) -> torch.Tensor:
        """The image: uint8 (C, H, W), Pillow images turned upright and made RGB; or the item."""
        decoded = self._read(row)
        if (here := _kind(decoded)) != self.item:
            raise DataError(
                f"sample {self.keys[row]!r} of {self.name} (row {row}) has {here or 'an image'}, others "
                f"have {self.item or 'images'}: the samples of a dataset have one dtype and shape. Pad "
                "token ids, or pool features, to one length"
            )
        return decoded

    def _read(self, row: int) -> torch.Tensor:
        where = f"sample {self.keys[row]!r} of {self.name} (row {row})"
        try:
            item = self.source[int(self.rows[row])]
            if self.field is not None:
                item = item[self.field]
            elif isinstance(item, tuple | list):
                item = item[0]
            image = rgb_tensor(item) if isinstance(item, Image.Image) else item
        except Exception as error:  # whatever a user's code raises
            raise DataError(
                f"{where} cannot be decoded ({type(error).__name__}: {error})"
            ) from error
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            return image
        if isinstance(image, torch.Tensor | np.ndarray) and 0 not in (image.ndim, *image.shape):
            return item_tensor(image, where)
        kind = getattr(image, "dtype", type(image).__name__)
        raise DataError(
            f"{where} must be a Pillow image, a uint8 tensor (C, H, W), or a tensor or array of "
            f"numbers, found {kind} {tuple(getattr(image, 'shape', ()))}"
        )

    def common_shape(self) -> tuple[int, int, int] | None:
        """As of `Dataset`, for images of at most 96 pixels.

        There are no headers to read, so all are decoded: of larger ones, which would take long, the
        source's `image_shape` says it.
        """
        try:
            shape = self.decode(0).shape
            same = max(shape) <= SMALL and all(
                self.decode(row).shape == shape for row in range(1, len(self))
            )
        except DataError:
            return None
        return (int(shape[0]), int(shape[1]), int(shape[2])) if same else None

    def _select(self, rows: Rows) -> None:
        self.rows = self.rows[rows]


def _kind(decoded: torch.Tensor) -> Item | None:
    """What an item is that is no image."""
    return None if decoded.dtype == torch.uint8 else Item.of(decoded[None])


class HubDataset(EncodedDataset):
    """A table of `datasets`, whose images stay encoded.

    Args:
        source: `source[row][field]` has the image's `bytes`, or the `path` of its file.
        field: name of the column.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        source: Any,
        keys: Sequence[str],
        labels: NDArray[np.int64],
        class_names: Sequence[str],
        field: str,
    ) -> None:
        super().__init__(
            name,
            split,
            keys=keys,
            labels=labels,
            classes=len(class_names),
            class_names=class_names,
        )
        self.source, self.field = source, field
        self.rows: Rows = np.arange(len(self), dtype=np.int64)

    def read(self, row: int, limit: int | None = None) -> bytes:
        """The bytes of a row's image; see `EncodedDataset`."""
        item = self.source[int(self.rows[row])][self.field] or {}
        data: bytes | None = item.get("bytes")
        if data is None and item.get("path"):
            return read_file(Path(item["path"]), limit)
        if data is None:
            raise DataError("the row holds no image")
        return data if limit is None else data[:limit]

    def _select(self, rows: Rows) -> None:
        self.rows = self.rows[rows]


def user_dataset(path: str, split: str) -> Dataset:
    """The dataset that a user's `pkg.module:factory` makes: `factory(split)`.

    It must have `keys` (text, unique), `labels` or `targets` (integers, -1 unlabelled),
    `class_names` or `classes` (names or their number), and `[row]`, an image, or another item, or a
    tuple that starts with it; see `MapDataset`. It may have `image_shape` (C, H, W), when all images
    are of one size, and `flip`.
    """
    factory = import_factory(path)
    try:
        source = factory(split)
    except KDCacheError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise DataError(
            f"{path}({split!r}) raised {type(error).__name__}: {error} (--debug shows where)"
        ) from error
    keys = getattr(source, "keys", None)
    labels = getattr(source, "labels", getattr(source, "targets", None))
    classes = getattr(source, "class_names", getattr(source, "classes", None))
    if keys is None or callable(keys) or labels is None or classes is None:
        raise UsageError(
            f"the dataset of {path} must have `keys`, `labels` (or `targets`) and `class_names` "
            "(or "
            f"`classes`); {type(source).__name__} has {sorted(vars(source))}"
        )
    numbers = class_numbers(labels, f"labels of {path}")
    named = not hasattr(classes, "__index__")
    dataset = MapDataset(
        path,
        split,
        source=source,
        keys=[str(key) for key in keys],
        labels=numbers,
        classes=len(classes) if named else int(classes),
        class_names=[str(name) for name in classes] if named else None,
        image_shape=getattr(source, "image_shape", None),
        flip=bool(getattr(source, "flip", True)),
    )
    if dataset.item is not None:
        dataset.remarks = [f"{path} ({split}) has {dataset.item.remark}"]
    return dataset


def hugging_face(name: str, split: str, root: Path, download: bool) -> Dataset:
    """An image dataset of the Hugging Face hub, or a local one: `hf:NAME:CONFIG:LABEL:IMAGE`.

    All but NAME may be absent or empty. Samples are known by their index; a null label is -1. Of
    several class labels (images) LABEL (IMAGE) names the column; else "label" ("image") is used,
    and a remark says so. The test split is the first of "test", "validation" and "val" that has
    labels; without one, see `hold_out`.

    Raises:
        UsageError: the package `datasets` is absent, or no such split.
        DataError: the dataset or split is not there, or which column is meant is not clear.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"hf:{name} needs the package `datasets`: pip install 'kdcache[hf]'"
        ) from error
    if split not in _HF_SPLITS:
        raise UsageError(f"hf:{name} has the splits {tuple(_HF_SPLITS)}; asked for {split!r}")
    repository, config, label_column, image_column = (name.split(":") + [""] * 3)[:4]
    try:
        with _offline(unless=download):
            cache = str(root / "huggingface")
            splits = datasets.load_dataset(repository, config or None, cache_dir=cache)
    except (OSError, ValueError, RuntimeError) as error:
        advice = "" if download else "; add --download to fetch it from the hub"
        raise DataError(
            f"hf:{name} was looked for in {root / 'huggingface'}: {error}{advice}"
        ) from error
    remarks: list[str] = []
    first = next(iter(splits.values()))
    label = _column(name, first, datasets.ClassLabel, label_column, ("label", "labels"), remarks)
    image = _column(name, first, datasets.Image, image_column, ("image", "img"), remarks)
    tests = {s: _labels(splits[s], label) for s in _HF_SPLITS["test"] if s in splits}
    unlabelled = [s for s, numbers in tests.items() if (numbers < 0).all()]
    labelled = [s for s in tests if s not in unlabelled]
    alone = "train" in splits and not labelled
    wanted = "train" if alone else split
    candidates = ("train",) if wanted == "train" else (*labelled, *unlabelled)
    chosen = next((s for s in candidates if s in splits), None)
    if chosen is None:
        raise DataError(f"hf:{name} has the splits {sorted(splits)}, none of {_HF_SPLITS[wanted]}")
    if unlabelled:
        remarks.append(f"hf:{name} has no labels in {unlabelled}, which are not used for testing")
    table = splits[chosen]
    names = table.features[label].names
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    dataset = HubDataset(
        f"hf:{name}",
        wanted,
        source=encoded,
        keys=index_keys(chosen, range(len(table)), len(table)),
        labels=_labels(table, label),
        class_names=names,
        field=image,
    )
    dataset.remarks = remarks
    return hold_out(dataset, split) if alone else dataset


def _labels(table: Any, column: str) -> NDArray[np.int64]:
    labels = [-1 if label is None else label for label in table[column][:]]
    return class_numbers(labels, f"column {column!r}")


@contextmanager
def _offline(unless: bool) -> Iterator[None]:
    """Keep the hub's libraries from asking the network, by the switches that they have for it."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches if not unless else ():
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _column(
    name: str, table: Any, kind: Any, asked: str, usual: tuple[str, ...], remarks: list[str]
) -> str:
    """The column of a kind of feature: the one asked for, the only one, or the usual one."""
    columns = [str(c) for c, feature in table.features.items() if isinstance(feature, kind)]
    if not columns:
        raise DataError(
            f"hf:{name} has no {kind.__name__} among its features {dict(table.features)}"
        )
    chosen = asked or next((c for c in (*usual, *columns) if c in columns), "")
    if chosen not in columns or not (asked or len(columns) == 1 or chosen in usual):
        wrong = f"none is {asked!r}" if asked else "which one is meant is not clear"
        raise DataError(
            f"hf:{name} has the {kind.__name__} columns {columns}, and {wrong}: name it, as in "
            f"hf:NAME:CONFIG:LABEL:IMAGE (CONFIG, LABEL and IMAGE may be empty)"
        )
    if not asked and len(columns) > 1:
        remarks.append(
            f"hf:{name} has the {kind.__name__} columns {columns}; {chosen!r} is used "
            "(hf:NAME:CONFIG:LABEL:IMAGE names another)"
        )
    return chosen

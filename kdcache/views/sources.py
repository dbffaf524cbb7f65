"""Where the pixels of a batch come from: a tensor on the device, or files decoded on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.augment.augmentation import Augmentation, Parameters
from kdcache.data.dataset import Dataset, Rows
from kdcache.data.encoded.decoding import scaled_size
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache_stores.errors import DataError


class Source(ABC):
    """Where the pixels of a batch come from; rows are those of the dataset.

    Of items that are no images, sizes are whatever follows their first axis: nothing draws from it.
    """

    @abstractmethod
    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        """Height and width of each image: int64 (B, 2)."""

    @abstractmethod
    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        """The augmented images: uint8 (B, C, H, W)."""


class Resident(Source):
    """One tensor on the device."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        """Height and width of each image."""
        size = np.array(self.images.shape[2:], dtype=np.int64)
        return np.broadcast_to(size, (len(rows), len(size)))

    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        """Gather and augment the whole batch on the device."""
        if self.images.device.type == "cpu":  # a copy this small is not worth waking threads for
            chosen = torch.from_numpy(np.take(self.images.numpy(), rows, axis=0))
        else:
            index = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
            chosen = self.images.index_select(0, index)
        return augmentation.apply(chosen, parameters)


class Decoded(Source):
    """Images decoded as they are asked for, each once; image files no larger than `side` asks for."""

    def __init__(self, dataset: Dataset, side: int | None = None) -> None:
        self.dataset, self.side = dataset, side
        self.cache: dict[int, torch.Tensor] = {}

    def image(self, row: int) -> torch.Tensor:
        """The image of a row, decoded at most once."""
        if row not in self.cache:
            if self.side is not None and isinstance(self.dataset, EncodedDataset):
                self.cache[row] = self.dataset.decode(row, self.side)
            else:
                self.cache[row] = self.dataset.decode(row)
        return self.cache[row]

    def sizes(self, rows: Rows) -> NDArray[np.int64]:
        """Height and width of each image."""
        self.dataset.ahead(rows)
        return np.array([self.image(int(row)).shape[1:] for row in rows], dtype=np.int64)

    def apply(self, augmentation: Augmentation, rows: Rows, parameters: Parameters) -> torch.Tensor:
        """Augment one by one."""
        images = [
            augmentation.apply_one(
                self.image(int(row)), {name: values[i] for name, values in parameters.items()}
            )
            for i, row in enumerate(rows)
        ]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"the images of a batch differ in shape after {augmentation.name!r}: "
                f"{sorted(shapes)[:3]} (channels, height, width). Use resized-crop-flip or, for "
                "evaluation, center-crop, which give one size"
            )
        return torch.stack(images)


def header_sizes(dataset: Dataset, rows: Rows, side: int | None = None) -> NDArray[np.int64]:
    """Height and width of images, int64 (B, 2), from their files' headers where they differ.

    Args:
        dataset: holds them.
        rows: (B,).
        side: as they are decoded with it, see `decode_image`.
    """
    if dataset.item is not None:
        return np.zeros((len(rows), 0), np.int64)
    if dataset.image_shape is not None:
        size = np.array(scaled_size(*dataset.image_shape[1:], side), dtype=np.int64)
        return np.broadcast_to(size, (len(rows), 2))
    sizes = (scaled_size(*dataset.size(int(row)), side) for row in rows)
    return np.array(list(sizes), dtype=np.int64)

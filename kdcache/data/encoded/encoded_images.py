"""A dataset of encoded images: whatever holds the bytes, they are decoded alike."""

from __future__ import annotations

from abc import abstractmethod

import torch

from kdcache.data.dataset import Dataset
from kdcache.data.encoded.decoding import decode_image, decoder, image_size
from kdcache_stores.errors import DataError

#: Bytes in which headers of images end as a rule; where one does not, the whole image is read.
HEAD = 2**16


class EncodedDataset(Dataset):
    """Images whose bytes are read and decoded when they are needed."""

    decoder = decoder()

    @abstractmethod
    def read(self, row: int, limit: int | None = None) -> bytes:
        """The bytes of a row's image, or the first `limit` of them; raises `DataError`."""

    def decode(self, row: int, side: int | None = None) -> torch.Tensor:
        """The image in RGB, upright: uint8 (3, H, W); see `decode_image`."""
        try:
            return decode_image(self.read(row), side)
        except DataError as error:
            raise DataError(
                f"image {self.keys[row]!r} of {self.name} (row {row}): {error}. Mend or remove it, or "
                "leave such images out with --skip-bad (skip_bad=True)."
            ) from error

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an upright image, from its header."""
        try:
            head = self.read(row, HEAD)
            try:
                return image_size(head)
            except DataError:
                if len(head) < HEAD:
                    raise
                return image_size(self.read(row))
        except DataError as error:
            raise DataError(f"image {self.keys[row]!r} of {self.name}: {error}") from error

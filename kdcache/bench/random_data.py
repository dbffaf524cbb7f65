"""Images to measure speed with, which does not depend on what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def random_images(file: Path, images: int) -> str:
    """An ``.npz`` of CIFAR-100's shapes with random content; its name for `load_dataset`."""
    rng = np.random.default_rng(0)
    np.savez(
        file,
        x_train=rng.integers(0, 256, (images, 32, 32, 3), np.uint8),
        y_train=np.arange(images) % 100,
        x_test=rng.integers(0, 256, (100, 32, 32, 3), np.uint8),
        y_test=np.arange(100),
        class_names=np.array([str(label) for label in range(100)]),
    )
    return f"arrays:{file}"


def random_photos(
    folder: Path, count: int, height: int = 375, width: int = 500, grain: int = 0
) -> Path:
    """A folder of JPEG files of two classes, in train and val: noise as smooth as photos are.

    Args:
        grain: added to each pixel at most. A file takes 58 kB without it, and with 24 the 110 kB that
            ImageNet's take on average.
    """
    rng = np.random.default_rng(0)
    for split, many in (("train", count), ("val", 8)):
        for number in range(many):
            coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            if grain:
                added = rng.integers(-grain, grain + 1, (height, width, 1))
                photo = Image.fromarray((np.asarray(photo) + added).clip(0, 255).astype(np.uint8))
            file = folder / split / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo.save(file, quality=90)
    return folder

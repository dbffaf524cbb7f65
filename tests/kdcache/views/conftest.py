"""Small image folders, made of noise with structure, as JPEG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A colour picture with smooth and sharp parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    image = image.copy()
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[top : top + height // 4, left : left + width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def make_folder(root: Path, per_class: int = 6, splits: tuple[str, ...] = ("train",)) -> Path:
    """`root`/split/{ant,bee}/*.jpg, in several sizes."""
    seed = 0
    for split in splits:
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                seed += 1
                size = (48 + 8 * (seed % 3), 64 - 8 * (seed % 2))
                picture(seed, *size).save(root / split / name / f"{i}.jpg", quality=92)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = make_folder(tmp_path / "images")
    (root / "val").mkdir()  # so that no test split is held out of train
    return root

"""Decoding: whichever library decodes, the pixels are Pillow's; what is damaged is refused as by Pillow."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kdcache.augment.crops import ResizedCropFlip
from kdcache.augment.specs import from_description, make_augmentation
from kdcache.data.encoded import decoding
from kdcache.data.encoded.decoding import decode_image, image_size, scaled_size
from kdcache.data.folder import image_folder
from kdcache.data.loading import load_dataset
from kdcache.views.plan import ViewPlan
from kdcache_stores.errors import DataError, UsageError


def photograph(seed: int = 0, height: int = 64, width: int = 88) -> Image.Image:
    """Smooth areas, edges and noise, so that every step of a decoder shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels[height // 3 :, width // 2 :] += 60
    return Image.fromarray(
        (pixels + rng.integers(-9, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def rotated(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


WHOLE = photograph()
FILES = {
    "420": saved(WHOLE),
    "422": saved(WHOLE, subsampling=1),
    "444": saved(WHOLE, subsampling=0, quality=97),
    "progressive": saved(WHOLE, progressive=True),
    "restarts": saved(WHOLE, restart_marker_rows=1),
    "rgb": saved(WHOLE, keep_rgb=True),
    "grey": saved(WHOLE.convert("L")),
    "cmyk": saved(WHOLE.convert("CMYK")),
    "profile": saved(WHOLE, icc_profile=b"x" * 70_000),
    "upright": saved(WHOLE, exif=rotated(1)),
    "sideways": saved(WHOLE, exif=rotated(6)),
    "trailing": saved(WHOLE) + b"\0" * 50,
    "tiny": saved(photograph(1, 3, 3)),
    "odd": saved(photograph(2, 61, 83)),
    "png": saved(WHOLE, "PNG"),
    "transparent": saved(WHOLE.convert("RGBA"), "PNG"),
    "palette": saved(WHOLE.convert("P"), "PNG"),
    "webp": saved(WHOLE, "WEBP"),
}


def by_pillow(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_of_pillow(name: str) -> None:
    pixels = decode_image(FILES[name])
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, by_pillow(FILES[name]))
    assert image_size(FILES[name]) == pixels.shape[1:]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("side", [1, 16, 31, 40, 500])
def test_scaled_pixels_do_not_depend_on_the_library(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = decode_image(FILES[name], side)
    whole = decode_image(FILES[name])
    assert pixels.shape[1:] == scaled_size(*whole.shape[1:], side)
    assert min(pixels.shape[1:]) >= min(side, *whole.shape[1:])
    scale = decoding.scale_for(*whole.shape[1:], side)
    mean = torch.nn.functional.avg_pool2d(whole.float(), scale, ceil_mode=True)
    # An inverse DCT of 1/8 takes chroma of 4:2:2 from half as many coefficients.
    assert scale == 8 or name == "tiny" or (pixels.float() - mean).abs().mean() < 10
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert torch.equal(decode_image(FILES[name], side), pixels)


def test_plain_files_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    fast = {name for name, data in FILES.items() if data[:2] == b"\xff\xd8"
            and decoding._fast_jpeg(data, None) is not None}  # fmt: skip
    assert fast == {"420", "422", "444", "progressive", "restarts", "rgb", "grey", "profile",
                    "upright", "trailing", "tiny", "odd"}  # fmt: skip
    assert decoding.decoder().startswith("simplejpeg ")
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert decoding.decoder().startswith("pillow ")


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_judged_as_by_pillow(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flipped bytes and cut ends: the same pixels or the same refusal, with simplejpeg and without."""
    rng = random.Random(seed)
    data = bytearray(FILES[rng.choice(["420", "444", "progressive", "grey"])])
    for _ in range(rng.choice([1, 1, 5])):
        data[rng.randrange(2, len(data))] = rng.randrange(256)
    damaged = bytes(data[: len(data) if seed % 3 else rng.randrange(2, len(data))])

    def outcome() -> Any:
        try:
            return decode_image(damaged).tolist()
        except DataError as error:
            return str(error)

    here = outcome()
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert outcome() == here


def test_an_enormous_header_is_refused_before_memory_is_taken() -> None:
    data = bytearray(FILES["444"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"
    with pytest.raises(DataError, match="exceeds limit"):
        decode_image(bytes(data))


def write(folder: Path) -> Path:
    for number, label in enumerate(("a", "b")):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            data = saved(photograph(10 * number + i, 80 + 40 * i, 100))
            (folder / label / f"{i}.jpg").write_bytes(data)
    return folder


def test_decode_side_is_a_part_of_the_plan(tmp_path: Path) -> None:
    dataset = image_folder(write(tmp_path / "p"), "train")
    spec = "resized-crop-flip:size=16"
    plain = ViewPlan(dataset, make_augmentation(spec, dataset), 0)
    scaled = ViewPlan(dataset, make_augmentation(spec + ",decode-side=45", dataset), 0)
    assert "decode_side" not in plain.augmentation.describe()
    assert scaled.augmentation.describe()["decode_side"] == 45
    assert plain.to_store().digest != scaled.to_store().digest
    assert from_description(scaled.augmentation.describe()).decode_side == 45
    assert scaled.to_store().notes == {"decoder": decoding.decoder()}
    rows = np.arange(6)
    parameters, _ = scaled.parameters(rows, 0)
    augmentation = ResizedCropFlip(16)
    for row in rows:
        image = decode_image((tmp_path / "p" / dataset.keys[row]).read_bytes(), 45)
        assert min(image.shape[1:]) in (80, 60, 50)
        mine = {name: values[row] for name, values in parameters.items()}
        expected = augmentation.apply_one(image, mine)
        assert torch.equal(scaled.images([row], 0)[0], expected)
    assert torch.equal(scaled.images(rows, 0), torch.cat([scaled.images([r], 0) for r in rows]))


@pytest.mark.parametrize("spec", [
    "resized-crop-flip:size=16,decode-side=45+color-jitter", "resized-crop-flip:size=16,decode-side=45+mixup",
    "weak+strong:size=16,decode-side=45", "center-crop:size=16,resize=20,decode-side=45",
])  # fmt: skip
def test_decode_side_in_every_composition(spec: str, tmp_path: Path) -> None:
    dataset = image_folder(write(tmp_path / "p"), "train")
    plan = ViewPlan(dataset, make_augmentation(spec, dataset), 0)
    assert plan.augmentation.decode_side == 45
    assert plan.images(np.arange(6), 1).shape == (6, 3, 16, 16)


def test_what_decode_side_cannot_be(tmp_path: Path) -> None:
    dataset = image_folder(write(tmp_path / "p"), "train")
    with pytest.raises(UsageError, match="decode_side >= 1, a number of pixels, found 0"):
        make_augmentation("resized-crop-flip:decode-side=0", dataset)
    with pytest.raises(UsageError, match="belongs to the first of a chain"):
        make_augmentation("color-jitter+resized-crop-flip:decode-side=9", dataset)
    digits = load_dataset("digits")
    with pytest.raises(UsageError, match="no files that kdcache decodes"):
        ViewPlan(digits, make_augmentation("resized-crop-flip:decode-side=9", digits), 0)


@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_the_size_of_a_png_file_needs_no_pixels(orientation: int | None) -> None:
    """Unless it may be turned: then Pillow decodes it to see."""
    image, exif, file = Image.new("RGB", (40, 30)), Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, "PNG", **({"exif": exif} if orientation else {}))
    data = file.getvalue()
    assert image_size(data) == decode_image(data).shape[1:]
    assert image_size(data) == ((40, 30) if orientation == 6 else (30, 40))
    if orientation is None:
        at = data.index(b"IDAT")
        damaged = data[: at + 4] + bytes(len(data) - at - 16) + data[-12:]
        assert image_size(damaged) == (30, 40)
        with pytest.raises(DataError):
            decode_image(damaged)

"""From the bytes of an image file to pixels: the same ones whichever library decodes.

Pillow decides what an image is and what its pixels are. JPEG files are decoded by simplejpeg
(libjpeg-turbo) instead, where it is installed: a third to a half faster, its pixels are Pillow's bit
for bit, and whatever it does not take without a complaint (CMYK, damage) is left to Pillow.
"""

from __future__ import annotations

import io

import numpy as np
import PIL
import PIL.features
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from kdcache_stores.errors import DataError

try:
    import simplejpeg
except ImportError:  # a platform without a wheel of it: Pillow gives the same pixels, slower
    simplejpeg = None

#: The scales at which JPEG files can be decoded: 1/s of their sides.
SCALES = (8, 4, 2)
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decoder() -> str:
    """What decodes JPEG files here, with versions: a plan keeps it in its notes."""
    pillow = f"pillow {PIL.__version__} (libjpeg {_libjpeg()})"
    return pillow if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}, {pillow}"


def _libjpeg() -> str:
    return str(PIL.features.version_feature("libjpeg_turbo") or PIL.features.version_codec("jpg"))


def decode_image(data: bytes, side: int | None = None) -> torch.Tensor:
    """Decode the bytes of an image file: uint8 (3, H, W).

    Turned upright by its EXIF orientation, converted to RGB as torchvision's ImageFolder does: grey
    is repeated, CMYK converted, transparency dropped. Of 16-bit grey the upper 8 bits are kept
    (ImageFolder clips it to white).

    Args:
        data: the file.
        side: decode at the smallest of 1/8, 1/4, 1/2 and 1 whose shorter side has at least so many
            pixels: JPEG files by a smaller inverse DCT, others by averages of boxes. None: as it is.

    Raises:
        DataError: empty, truncated, damaged or no image, or pixels of 32 bits, which have no agreed
            white.
    """
    try:
        pixels = _fast_jpeg(data, side)
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            return rgb_tensor(image, scale_for(image.height, image.width, side))
    except _ERRORS as error:
        raise DataError(_reason(error, data)) from error


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an upright image, from its header.

    Args:
        data: the file, or the beginning of it that holds the header.

    Raises:
        DataError: no header of an image.
    """
    plain = _plain_jpeg_size(data)
    if plain is not None and not _has_app1(data):
        return plain
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            plain_png = image.format == "PNG" and _is_whole_png_without_exif(data)
            sideways = not plain_png and image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
    except _ERRORS as error:
        raise DataError(_reason(error, data)) from error
    return (width, height) if sideways else (height, width)


def _is_whole_png_without_exif(data: bytes) -> bool:
    """Whether nothing can turn this image: Pillow decodes all of a PNG file to see that."""
    return data.endswith(b"IEND\xaeB`\x82") and not any(
        word in data for word in (b"eXIf", b"exif", b"EXIF", b"xmp")
    )


def scale_for(height: int, width: int, side: int | None) -> int:
    """The largest s of 8, 4, 2 and 1 for which the shorter side // s has at least `side` pixels."""
    if side is None:
        return 1
    return next((s for s in SCALES if min(height, width) // s >= side), 1)


def scaled_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Height and width of an image that was decoded with `side`."""
    scale = scale_for(height, width, side)
    return -(-height // scale), -(-width // scale)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG file that simplejpeg may decode; None where Pillow must decide."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if colours not in ("YCbCr", "Gray", "RGB") or (limit is not None and height * width > limit):
        return None
    return int(height), int(width)


def _fast_jpeg(data: bytes, side: int | None) -> torch.Tensor | None:
    """The pixels of a plain upright JPEG file; None where Pillow must decide what they are."""
    size = _plain_jpeg_size(data)
    if size is None:
        return None
    if _has_app1(data):
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                return None
    shape = scaled_size(*size, side)
    if shape != size and max(size) < 8:  # simplejpeg has scales between, of the same shape here
        return None
    least = {"min_height": shape[0], "min_width": shape[1]} if shape != size else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:  # it complains of what Pillow may take or refuse
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1) if pixels.shape[:2] == shape else None


def _has_app1(data: bytes) -> bool:
    """Whether a JPEG file has an APP1 segment: EXIF or XMP, which may say that it lies on its side."""
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker in (b"\xe1", b"\xda"):
            return marker == b"\xe1"
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True  # fill bytes, a marker without a length, or the end: Pillow reads them


def rgb_tensor(image: Image.Image, scale: int = 1) -> torch.Tensor:
    """A Pillow image, upright and in RGB, at 1/scale of its size: uint8 (3, H, W).

    Raises:
        ValueError: pixels of 32 bits; and whatever Pillow raises.
    """
    size = image.size
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    scaled = image.size != size  # a JPEG file
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have 32 bits (Pillow's mode {image.mode}), and no rule says which value is "
            "white: save it with 8 bits"
        )
    image = image if image.mode == "RGB" else image.convert("RGB")
    if scale > 1 and not scaled:
        image = image.reduce(scale)
    pixels: torch.Tensor = F.pil_to_tensor(image)
    return pixels


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "the file is no image that Pillow can read, or its header is damaged"
    return f"cannot be decoded ({error})"

"""Operations on whole batches with a parameter per image, where torchvision takes one for all.

Each follows the arithmetic of the function of `torchvision.transforms.v2.functional` that it is
named after, operation by operation, so that on a CPU its pixels are equal bit by bit. Two may
differ by 1: blends (`blend`, `sharpen`) on a GPU, and on a CPU in the last pixels of images whose
number of pixels is no multiple of 16, where torch rounds twice instead of once; and
`resized_crop`. Nothing here waits for a GPU: all that depends on the images stays there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample

#: Columns of a table of parameters, float32 (B, `COLUMNS`), as far as an operation has that many.
COLUMNS = 6


def blend(images: Tensor, settings: Tensor) -> Tensor:
    """`adjust_brightness`, `adjust_saturation` and `adjust_contrast`.

    Args:
        images: uint8 (B, 1 or 3, H, W).
        settings: float32 (B, 4 or more): the factor, 1 - the factor, and the shares of the image in
            grey and of its mean (0 or 1) in what is blended in: 0, 0 for brightness, 1, 0 for
            saturation, 0, 1 for contrast. A factor of 1 leaves an image as it is.
    """
    factor, rest, of_grey, of_mean = settings[:, :4, None, None].unbind(1)
    if images.shape[1] == 1:  # saturation leaves a grey image alone
        grey, other = images[:, 0].float(), 1 - of_grey
        factor, rest = factor * other + of_grey, rest * other
    else:
        red, green, blue = images.unbind(1)
        grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
    mean = grey.mean((1, 2), keepdim=True)  # of whole numbers, so its order does not matter
    other = grey.mul_(of_grey).addcmul_(mean, of_mean)[:, None]
    # torchvision's add with a factor is one rounding, as addcmul's is.
    blended = images.mul(factor[:, None]).addcmul_(other, rest[:, None])
    return blended.clamp_(0, 255).to(torch.uint8)


def sharpen(images: Tensor, settings: Tensor) -> Tensor:
    """`adjust_sharpness`: float32 (B, 1 or more), 1 - the factor."""
    channels, height, width = images.shape[1:]
    if height <= 2 or width <= 2:
        return images
    kernel = torch.full((channels, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    result = images.float()
    blurred = conv2d(result, kernel, groups=channels).round_()
    inner = result[:, :, 1:-1, 1:-1]
    inner.addcmul_(blurred.sub_(inner), settings[:, :1, None, None])
    return result.clamp_(0, 255).to(torch.uint8)


def warp(images: Tensor, settings: Tensor) -> Tensor:
    """`affine` and `rotate` to the nearest pixel, black outside.

    Args:
        images: uint8 (B, C, H, W).
        settings: float32 (B, 6), rows x and y of the inverse matrix in pixels from the centre,
            divided by half the width and half the height.
    """
    height, width = images.shape[2:]
    matrix = settings.view(-1, 2, 1, 1, 3)
    x, y = (
        torch.linspace((1.0 - n) * 0.5, (n - 1.0) * 0.5, n, device=images.device)
        for n in (width, height)
    )
    along = x[None, None, None] * matrix[..., 0]
    down = y[None, None, :, None] * matrix[..., 1]
    grid = along.add(down).add_(matrix[..., 2]).permute(0, 2, 3, 1)
    moved = grid_sample(images.float(), grid, "nearest", "zeros", align_corners=False)
    return moved.to(torch.uint8)


def cut_levels(images: Tensor, settings: Tensor) -> Tensor:
    """`posterize` and `solarize`: float32 (B, 2 or more), the mask of the bits and the threshold.

    A mask of 255 and a threshold of 256 leave an image as it is.
    """
    mask, threshold = settings[:, :2, None, None, None].unbind(1)
    images = images & mask.to(torch.uint8)
    return torch.where(images >= threshold, 255 - images, images)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """`adjust_hue`: uint8 (B, 1 or 3, H, W), the shift float32 (B,) in turns; grey stays as it is."""
    if images.shape[1] == 1:
        return images
    image = images.float().mul_(1 / 255)
    red, green, _ = image.unbind(1)
    least, value = torch.aminmax(image, dim=1)
    spread, flat = value - least, value == least
    saturation = spread / torch.where(flat, 1.0, value)
    spread = torch.where(flat, 1.0, spread)
    rc, gc, bc = value[:, None].sub(image).div_(spread[:, None]).unbind(1)
    hue = torch.where(value == green, rc.add(2.0).sub_(bc), gc.add(4.0).sub_(rc))
    hue = torch.where(value == red, bc - gc, hue)
    hue = hue.mul_(1 / 6).add_(1.0).fmod_(1.0)
    hue = hue.add_(shift[:, None, None]).remainder_(1.0).mul_(6)
    sector = hue.floor()
    part = hue.sub_(sector).mul_(saturation)
    pale = 1.0 - saturation
    q = (1.0 - part).mul_(value).clamp_(0.0, 1.0)
    t = part.add_(pale).mul_(value).clamp_(0.0, 1.0)
    p = pale.mul_(value).clamp_(0.0, 1.0)
    choice = _sectors(images.device)[:, sector.to(torch.int32).remainder_(6)].moveaxis(0, 1)
    return torch.stack((value, p, q, t), 1).gather(1, choice).mul_(256 - 1e-3).to(torch.uint8)


@lru_cache(maxsize=16)
def _sectors(device: torch.device) -> Tensor:
    """Which of v, p, q, t is red, green and blue in each sixth of the circle: int64 (3, 6)."""
    with torch.inference_mode(False):
        table = [[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]]
        return torch.tensor(table, device=device)


def resized_crop(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """`resized_crop` with antialiasing, as two products with matrices.

    May differ by 1 from torchvision on a CPU, which also rounds between the two axes.

    Args:
        images: uint8 (B, C, H, W).
        boxes: float32 (B, 4): top, left, height, width in pixels.
        size: side of the results.
        mode: "bilinear" or "bicubic".
    """
    height, width = images.shape[2:]
    top, left, tall, wide = boxes.unbind(1)
    down = _resampling(top, tall, height, size, mode)[:, None]
    across = _resampling(left, wide, width, size, mode)[:, None]
    narrow = (images.float() @ across.transpose(2, 3)).clamp_(0, 255)
    return (down @ narrow).round_().clamp_(0, 255).to(torch.uint8)


def _resampling(start: Tensor, extent: Tensor, length: int, size: int, mode: str) -> Tensor:
    """Weights (B, size, length) of the pixels of an axis in those of the result."""
    start, extent = start[:, None, None], extent[:, None, None]
    scale = extent / size
    pixel = torch.arange(length, device=start.device) - start
    place = torch.arange(size, device=start.device)[:, None]
    distance = (pixel + 0.5 - scale * (place + 0.5)).abs_() / scale.clamp(min=1)
    if mode == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:  # Keys' cubic with a = -0.5, which Pillow and torch take where they antialias
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((pixel >= 0) & (pixel < extent))
    return weights / weights.sum(2, keepdim=True)

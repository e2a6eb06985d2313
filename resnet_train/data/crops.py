"""Crops and resizing of images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_train.data.decode import decode, jpeg_size

LONGEST = 16  # largest ratio of sides: only the middle of a longer image is resized, to bound the result's size


def middle(image: Tensor) -> Tensor:
    """An image (3, H, W), or its middle if one side is more than `LONGEST` times the other."""
    from torchvision.transforms.v2 import functional as TF

    height, width = image.shape[-2:]
    longest = LONGEST * min(height, width)
    longest += (max(height, width) - longest) % 2  # so that both ends lose the same number of pixels
    return TF.center_crop(image, [min(height, longest), min(width, longest)])


def whole_view(image: Tensor, size: int) -> Tensor:
    """Resize an image (3, H, W) to shorter side `size` and crop the center, as for data sets in memory."""
    from torchvision.transforms.v2 import functional as TF

    resized = TF.resize(middle(image).float(), [size], antialias=True).round().to(torch.uint8)  # as for the digits
    return TF.center_crop(resized, [size, size])


def scaled_view(image: Tensor, side: int) -> Tensor:
    """A photograph (3, H, W) with its shorter side at `side`."""
    from torchvision.transforms.v2 import functional as TF

    return TF.resize(middle(image), [side], antialias=True)


def center_side(size: int) -> int:
    """The shorter side that center crops of `size` are taken at, as in figure 4: 256 for crops of 224."""
    return round(size * 256 / 224)


def center_view(image: Tensor, size: int) -> Tensor:
    """The center crop of a photograph (3, H, W)."""
    from torchvision.transforms.v2 import functional as TF

    return TF.center_crop(scaled_view(image, center_side(size)), [size, size])


Box = tuple[int, int, int, int]  # top, left, height, width, in pixels of the photograph


def scaled_box(height: int, width: int, *, size: int, side: int, place: Sequence[float]) -> Box:
    """The box that becomes the crop of `size` at `place` when the shorter side is resized to `side`.

    `place`: vertical and horizontal, in [0, 1). All offsets are equally likely, including the first and the last.
    """
    edge = max(1, min(round(size * min(height, width) / side), height, width))
    down, across = place
    return int(down * (height - edge + 1)), int(across * (width - edge + 1)), edge, edge


def area_box(
    height: int, width: int, *, area: Sequence[float], tries: Sequence[Sequence[float]], place: Sequence[float]
) -> Box:
    """A box with a fraction of the photograph's area between the two of `area`, sides from 3:4 to 4:3, at `place`.

    As torchvision's RandomResizedCrop: of ten `tries`, each an area and a ratio in [0, 1), the first that fits into
    the photograph; else the largest such box in the middle.
    """
    for size, shape in tries:
        pixels = height * width * (area[0] + size * (area[1] - area[0]))
        ratio = (3 / 4) ** (1 - 2 * shape)  # uniform in its logarithm
        across, down = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(place[0] * (height - down + 1)), int(place[1] * (width - across + 1)), down, across
    down, across = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - down) // 2, (width - across) // 2, down, across


def cut(data: bytes, name: str, size: int, box_of: Callable[[int, int], Box]) -> Tensor:
    """The box `box_of(height, width)` of an encoded image, resized to `size`: (S, S, 3) uint8. Raises ImageError.

    Only the box is resized. A JPEG (see `jpeg_size`) whose box is at least twice `size` is decoded at a half, a
    quarter or an eighth of its size, never below `size`.
    """
    whole = jpeg_size(data)
    shorter = min(box_of(*whole)[2:]) if whole else 0
    image = decode(data, name, max(factor for factor in (1, 2, 4, 8) if factor == 1 or shorter >= factor * size))
    return resized_part(image, box_of(*image.shape[:2]), size)


def resized_part(image: Tensor, box: Box, size: int) -> Tensor:
    """A box of an image (H, W, 3) uint8, resized to `size`: (S, S, 3) uint8."""
    top, left, height, width = box
    part = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    part = part.contiguous(memory_format=torch.channels_last)  # torch does not recognise it for a batch of one
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)

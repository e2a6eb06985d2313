"""Masks as COCO writes them, run lengths in text; all of it is faster-coco-eval's code (the extra `detection`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from resnet_train.data.decode import LARGEST_IMAGE
from resnet_train.detection.annotations import NO_MASK, Example, Fault
from resnet_train.errors import UserError

# Each pixel along the edges of an object's polygons takes memory. Their length together is limited to this many times
# the width and height of the image,
LONGEST = 50
# and to this many pixels in an image of any size.
LONGEST_OF_ALL = 5_000_000


def mask_code() -> Any:
    """The package's functions of masks. Raises UserError where it is missing."""
    try:
        from faster_coco_eval.core import mask  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("masks: need faster-coco-eval: pip install 'resnet-train[detection]'") from error
    return mask


def rle(counts: bytes, shape: Sequence[int]) -> dict[str, Any]:
    """The mask of an image of `shape` (H, W) as COCO's tools take it."""
    return {"size": list(shape), "counts": counts}


def read_mask(segmentation: Any, size: tuple[int, int], where: str) -> bytes:
    """The run lengths of an annotation's polygons or of its RLE, in an image of `size` (W, H). Raises Fault."""
    code, (width, height) = mask_code(), size
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise Fault(NO_MASK, f"{where}: its RLE is not of the size [{height}, {width}] of its image")
        packed = isinstance(segmentation.get("counts"), str)
        try:
            runs = segmentation if packed else code.frPyObjects(segmentation, height, width)
            return code.encode(code.decode(runs))["counts"]  # of what it says, in whatever way
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise Fault(NO_MASK, f"{where}: its RLE is not one of {width}x{height} pixels") from error
    if type(segmentation) is not list or not segmentation:
        raise Fault(NO_MASK, f"{where}: has no segmentation")
    length = 0.0
    for polygon in segmentation:
        numbers = polygon if type(polygon) is list and all(type(n) in (int, float) for n in polygon) else []
        if len(numbers) < 6 or len(numbers) % 2:
            raise Fault(NO_MASK, f"{where}: its segmentation is not of polygons, x, y of three points or more")
        for place, side in ((0, width), (1, height)):  # each pixel along an edge takes memory
            if not all(-side <= number <= 2 * side for number in numbers[place::2]):
                raise Fault(NO_MASK, f"{where}: its segmentation lies far outside of its image, {width}x{height}")
        length += _length(numbers)
        if length > min(LONGEST * (width + height), LONGEST_OF_ALL):
            raise Fault(NO_MASK, f"{where}: the edges of its segmentation are too long for {width}x{height}")
    return code.merge(code.frPyObjects(segmentation, height, width))["counts"]


def _length(polygon: Sequence[float]) -> float:
    """The pixels along the edges of x, y, x, y, …"""
    xs, ys = polygon[::2], polygon[1::2]
    return sum(max(abs(xs[n] - xs[n - 1]), abs(ys[n] - ys[n - 1])) for n in range(len(xs)))


def training_shape(shape: Sequence[int], min_size: int, max_size: int) -> tuple[int, int]:
    """What torchvision's detectors bring an image of `shape` (H, W) to."""
    scale = min(min_size / min(shape), max_size / max(shape))
    return math.floor(shape[0] * scale), math.floor(shape[1] * scale)


def check_masks(example: Example, min_size: int, max_size: int) -> None:
    """Refuse an image whose masks take more than any image may. Raises UserError."""
    height, width = training_shape((example.height, example.width), min_size, max_size)
    if (count := int((~example.ignored).sum())) * height * width > LARGEST_IMAGE:
        raise UserError(
            f"{example.path}: {count} masks of {width}x{height} are above {LARGEST_IMAGE:,} pixels together; use a"
            " lower min_size= and max_size="
        )


def training_masks(counts: Sequence[bytes], shape: Sequence[int], sides: tuple[int, int], *, flip: bool) -> Tensor:
    """Masks of an image of `shape`, mirrored or not, at the size of the training: (n, H, W) uint8.

    One after another: only one of them is ever there at the size of the photograph. `sides`: min_size and max_size.
    """
    code, small = mask_code(), training_shape(shape, *sides)
    masks = torch.empty(len(counts), *small, dtype=torch.uint8)
    for place, text in enumerate(counts):
        mask = torch.from_numpy(code.decode(rle(text, shape)))
        masks[place] = F.interpolate((mask.flip(1) if flip else mask)[None, None], small)[0, 0]
    return masks


def paste(probabilities: Tensor, boxes: Tensor, shape: Sequence[int]) -> list[bytes]:
    """Masks (n, 1, M, M) over their boxes (n, 4) in an image of `shape` (H, W), set where they are 0.5 or more."""
    code, texts = mask_code(), []
    for place in range(len(boxes)):
        (whole,) = paste_masks_in_image(probabilities[place, None], boxes[place, None], tuple(shape))
        texts.append(code.encode((whole[0] >= 0.5).numpy().astype("uint8", order="F"))["counts"])
    return texts


def mask_of(counts: bytes, shape: Sequence[int]) -> Tensor:
    """A mask (H, W) bool."""
    return torch.from_numpy(mask_code().decode(rle(counts, shape))).bool()

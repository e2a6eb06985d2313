"""Detections drawn on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import remove_small_boxes
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from resnet_train.detection.masks import mask_of

# Distinct on most pictures; the sixth class reuses the first, and its name is written beside it.
COLOURS = ("#00ff40", "#ff3030", "#30a0ff", "#ffd000", "#ff60ff")
DARK = ("#006018", "#a01010", "#104880", "#705800", "#800080")  # the same hues, as background of white text
SMALLEST = 480  # pixels of the longer side; smaller pictures are enlarged by a whole factor, to be readable


def likely(detections: Mapping[str, Any], score: float) -> dict[str, Any]:
    """The detections with at least `score`, and at least a pixel wide and high."""
    keep = torch.zeros(len(detections["scores"]), dtype=torch.bool)
    keep[remove_small_boxes(detections["boxes"], 1)] = True
    keep &= detections["scores"] >= score
    likely_detections = {name: value[keep] for name, value in detections.items() if name != "masks"}
    if "masks" in detections:
        likely_detections["masks"] = [text for text, one in zip(detections["masks"], keep.tolist(), strict=True) if one]
    return likely_detections


def enlarged(shape: Sequence[int]) -> int:
    """The factor by which a picture of `shape` (H, W) is enlarged."""
    return -(-SMALLEST // max(shape))


def draw_detections(image: Tensor, detections: Mapping[str, Any], classes: Sequence[str], score: float) -> Tensor:
    """An image (3, H, W) uint8 with the boxes of at least `score`, their classes and scores; a small one `enlarged`.

    `detections`: boxes (n, 4) in pixels, labels from 1 and scores; masks as run lengths, if it has any, are drawn too.
    """
    detections, times = likely(detections, score), enlarged(image.shape[1:])
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels]
    for text, colour in zip(detections.get("masks", ()), colours, strict=False):
        mask = mask_of(text, image.shape[1:])
        if mask.any():
            image = draw_segmentation_masks(image, mask, alpha=0.5, colors=colour)
    image = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    if not labels:
        return image
    size = max(12, max(image.shape) // 60)
    edges = (times * detections["boxes"]).round() - torch.tensor([0, 0, 1, 1])  # the last drawn pixel is inside
    edges[:, 2:] = edges[:, 2:].maximum(edges[:, :2])
    image = draw_bounding_boxes(image, edges.to(torch.int64), colors=colours, width=size // 6)
    words = [f"{classes[label - 1]} {value:.2f}" for label, value in zip(labels, scores, strict=True)]
    return _write(image, words, edges.tolist(), [DARK[(label - 1) % len(COLOURS)] for label in labels], size)


Box = Sequence[float]  # left, top, right, bottom


def _write(image: Tensor, words: Sequence[str], boxes: Sequence[Box], colours: Sequence[str], size: int) -> Tensor:
    """Write `words` in white at `boxes`, each where it hides least of the other words and of the boxes."""
    canvas, font = to_pil_image(image), ImageFont.load_default(size)
    draw, taken = ImageDraw.Draw(canvas), list[Box]()
    for text, box, colour in zip(words, boxes, colours, strict=True):
        _, _, width, height = draw.textbbox((2, 0), text, font=font)
        candidates = _text_boxes(box, width + 2, height + 2, canvas.size)
        chosen = min(
            candidates,
            key=lambda one: [sum(_overlap(one, other) for other in others) for others in (taken, boxes)],
        )
        taken.append(chosen)
        draw.rectangle(tuple(chosen), fill=colour)
        draw.text((chosen[0] + 2, chosen[1]), text, fill="white", font=font)
    return pil_to_tensor(canvas)


def _text_boxes(box: Box, width: float, height: float, size: tuple[int, int]) -> list[Box]:
    """The positions for text of this size in a picture of `size` (W, H): above, below, beside and inside a box."""
    left, top, right, bottom = box
    corners = [(left, top - height), (left, bottom + 1), (right + 1, top), (left - width, top), (left, top)]
    corners = [(max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))) for x, y in corners]
    return [(x, y, x + width - 1, y + height - 1) for x, y in corners]


def _overlap(one: Box, other: Box) -> float:
    """The pixels that two rectangles have in common."""
    sides = [min(one[side + 2], other[side + 2]) - max(one[side], other[side]) + 1 for side in (0, 1)]
    return max(0, sides[0]) * max(0, sides[1])

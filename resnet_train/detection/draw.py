"""Detections drawn on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

# Told apart on most pictures; the sixth class takes the first again, with its name beside it.
COLOURS = ("#00ff40", "#ff3030", "#30a0ff", "#ffd000", "#ff60ff")


def draw_detections(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str], score: float) -> Tensor:
    """An image (3, H, W) uint8 with the boxes of at least `score`, their classes and scores: the same shape.

    `found`: boxes (n, 4) in pixels, labels from 1 and scores.
    """
    kept = found["scores"] >= score
    if not kept.any():
        return image
    labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
    edges = found["boxes"][kept].round() - torch.tensor([0, 0, 1, 1])  # the last pixel that is drawn is inside
    edges[:, 2:] = edges[:, 2:].maximum(edges[:, :2])
    return draw_bounding_boxes(
        image,
        edges.to(torch.int64),
        [f"{classes[label - 1]} {value:.2f}" for label, value in zip(labels, scores, strict=True)],
        colors=[COLOURS[(label - 1) % len(COLOURS)] for label in labels],
        width=max(1, min(image.shape[1:]) // 200),
    )

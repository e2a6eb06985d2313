"""Detections drawn on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from resnet_train.detection.masks import mask_of

# Told apart on most pictures; the sixth class takes the first again, with its name beside it.
COLOURS = ("#00ff40", "#ff3030", "#30a0ff", "#ffd000", "#ff60ff")
DARK = ("#006018", "#a01010", "#104880", "#705800", "#800080")  # the same, for white words to be read on


def likely(detections: Mapping[str, Any], score: float) -> dict[str, Any]:
    """Those of the detections that have at least `score`."""
    kept = detections["scores"] >= score
    some = {name: value[kept] for name, value in detections.items() if name != "masks"}
    if "masks" in detections:
        some["masks"] = [text for text, one in zip(detections["masks"], kept.tolist(), strict=True) if one]
    return some


def draw_detections(image: Tensor, detections: Mapping[str, Any], classes: Sequence[str], score: float) -> Tensor:
    """An image (3, H, W) uint8 with the boxes of at least `score`, their classes and scores: the same shape.

    `detections`: boxes (n, 4) in pixels, labels from 1 and scores; masks as run lengths, if it has any, are drawn too.
    """
    detections = likely(detections, score)
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    if not labels:
        return image
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels]
    for text, colour in zip(detections.get("masks", ()), colours, strict=False):
        mask = mask_of(text, image.shape[1:])
        if mask.any():
            image = draw_segmentation_masks(image, mask, alpha=0.5, colors=colour)
    edges = detections["boxes"].round() - torch.tensor([0, 0, 1, 1])  # the last pixel that is drawn is inside
    edges[:, 2:] = edges[:, 2:].maximum(edges[:, :2])
    return draw_bounding_boxes(
        image,
        edges.to(torch.int64),
        [f"{classes[label - 1]} {value:.2f}" for label, value in zip(labels, scores, strict=True)],
        colors=colours,
        label_colors="white",
        label_background_colors=[DARK[(label - 1) % len(COLOURS)] for label in labels],
        fill_labels=True,
        width=max(1, min(image.shape[1:]) // 200),
    )

"""Box refinement (appendix B): regressed boxes are looked at as regions once more, and detections vote."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

VOTERS = 0.5  # the overlap from which on a box has a say (Gidaris and Komodakis 2015)


def regressed(scores: Tensor, boxes: Tensor) -> Tensor:
    """Of each region the box of its likeliest class, the background aside: (n, K + 1), (n, K + 1, 4) to (n, 4)."""
    best = scores[:, 1:].argmax(1) + 1
    return boxes[torch.arange(len(boxes), device=boxes.device), best]


def vote(boxes: Tensor, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Where the detections `kept` (k,) of all (n,) come to lie: (k, 4).

    Each is the mean, weighted by score, of all boxes of its class that overlap it by VOTERS or more, itself included.
    """
    says = (box_iou(boxes[kept], boxes) >= VOTERS) & (labels[kept][:, None] == labels)
    weights = (says * scores)[:, :, None]
    return (weights * boxes).sum(1) / weights.sum(1)

"""Box refinement (appendix B): regressed boxes are used as regions once more, and detections vote."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

VOTERS = 0.5  # the least overlap of a box that votes (Gidaris and Komodakis 2015)


def regressed(scores: Tensor, boxes: Tensor) -> Tensor:
    """The box of each region's likeliest class, without the background: (n, K + 1), (n, K + 1, 4) to (n, 4)."""
    best = scores[:, 1:].argmax(1) + 1
    return boxes[torch.arange(len(boxes), device=boxes.device), best]


def vote(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """The boxes (k, 4) of the detections with indices `keep` (k,), after box voting.

    Each is the mean, weighted by score, of all boxes of its class that overlap it by VOTERS or more, itself included.
    """
    votes = (box_iou(boxes[keep], boxes) >= VOTERS) & (labels[keep][:, None] == labels)
    weights = (votes * scores)[:, :, None]
    return (weights * boxes).sum(1) / weights.sum(1)

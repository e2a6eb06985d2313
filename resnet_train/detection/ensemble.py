"""What detectors find together in a test (appendix B): all look at the union of their proposals, and are averaged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from resnet_train.detection.model import Detector
from resnet_train.engine.compute import autocast

Maps = dict[str, Tensor]  # feature maps by level, "0" alone without a pyramid
Shape = tuple[int, int]  # of an image, (H, W)


@dataclass(frozen=True)
class Look:
    """What a detector sees of an image that was brought to `shape`, in whose pixels its boxes are."""

    maps: Maps
    shape: Shape
    proposals: Tensor  # (n, 4)


class Ensemble(nn.Module):
    """One or more detectors of the same classes as one, which finds in an image (3, H, W) what they find together.

    In evaluation mode it is called as one of them, and one alone finds what it would, bit for bit. Boxes are in pixels
    of the image as the first has it. Each computes in its own of `precisions`.
    """

    def __init__(self, members: Sequence[Detector], precisions: Sequence[str]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)
        self.precisions = precisions

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        looks = []
        for member, precision in zip(self.members, self.precisions, strict=True):
            with autocast(image.device, precision):
                looks.append(look(member, image))
        shape = looks[0].shape
        regions = union([resize_boxes(seen.proposals, seen.shape, shape) for seen in looks])
        scores, boxes = self._judge(looks, regions, shape)
        heads = self.members[0].roi_heads
        boxes, scores, labels = candidates(boxes, scores, heads.score_thresh)
        kept = batched_nms(boxes, scores, labels, heads.nms_thresh)[: heads.detections_per_img]
        whole = resize_boxes(boxes[kept], shape, tuple(image.shape[-2:]))
        return {"boxes": whole, "labels": labels[kept], "scores": scores[kept]}

    def _judge(self, looks: list[Look], regions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Each class's score (n, K + 1), the background's first, and box (n, K + 1, 4): the members' means."""
        scores, boxes = [], []
        for member, precision, seen in zip(self.members, self.precisions, looks, strict=True):
            heads = member.roi_heads
            with autocast(regions.device, precision):
                logits, moves = heads.box_predictor(region_features(member, seen, regions, shape))
            scores.append(logits.softmax(1))
            boxes.append(clip_boxes_to_image(heads.box_coder.decode(moves, [regions]), shape))
        return torch.stack(scores).mean(0), torch.stack(boxes).mean(0)


def look(member: Detector, image: Tensor) -> Look:
    """An image (3, H, W) in 0 to 1 as a detector sees it, with its proposals."""
    images, _ = member.transform([image])
    maps = member.backbone(images.tensors)
    maps = OrderedDict([("0", maps)]) if isinstance(maps, Tensor) else maps
    (proposals,), _ = member.rpn(images, maps)
    return Look(maps, images.image_sizes[0], proposals)


def region_features(member: Detector, seen: Look, regions: Tensor, shape: Shape) -> Tensor:
    """What a detector hands its class and box layers of each of `regions` (n, 4), boxes in an image of `shape`: (n, C).

    They are pooled from the feature maps that are there: no layer before the pooling is computed again.
    """
    heads = member.roi_heads
    pooled = heads.box_roi_pool(seen.maps, [resize_boxes(regions, shape, seen.shape)], [seen.shape])
    return heads.box_head(pooled)


def union(proposals: Sequence[Tensor]) -> Tensor:
    """The boxes of all, (n, 4): of the second and later ones those that are not there yet."""
    found = proposals[0]
    for more in proposals[1:]:
        known = (more[:, None] == found).all(2).any(1)
        found = torch.cat([found, more[~known]])
    return found


def candidates(boxes: Tensor, scores: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each class's box (n, K + 1, 4) and score (n, K + 1) as a detection of its own: boxes (m, 4), scores, labels (m,).

    Without the background, scores of `least` or below and boxes without an area, as torchvision has it.
    """
    labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)[:, 1:].flatten()
    boxes, scores = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].flatten()
    likely = scores > least
    boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
    large = remove_small_boxes(boxes, min_size=1e-2)
    return boxes[large], scores[large], labels[large]

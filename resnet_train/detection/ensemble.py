"""Ensembles of detectors (appendix B): each member scores the union of all proposals, and the results are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from resnet_train.detection.model import Detector
from resnet_train.detection.multiscale import ImageFeatures, Shape, extract, region_features
from resnet_train.detection.refine import regressed, vote
from resnet_train.engine.compute import autocast


class Ensemble(nn.Module):
    """One or more detectors of the same classes, called in evaluation mode like a single one.

    An ensemble of one gives the detections of its member, bit for bit. Regions are in pixels of the image as the first
    member scales it. Each member computes in its own precision. With `refine` the regressed boxes are scored
    and regressed once more, both results go into non-maximum suppression, and detections vote. `scales`: the shorter
    sides from which region features are taken; none is that of training.
    """

    def __init__(
        self,
        members: Sequence[Detector],
        precisions: Sequence[str],
        *,
        refine: bool = False,
        scales: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)
        self.precisions, self.refine, self.scales = precisions, refine, scales

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        features = []
        for member, precision in zip(self.members, self.precisions, strict=True):
            with autocast(image.device, precision):
                features.append(extract(member, image, self.scales))
        shape = features[0].shape
        regions = union([resize_boxes(part.proposals, part.shape, shape) for part in features])
        scores, boxes = self._score(features, regions, shape)
        if self.refine:
            refined = self._score(features, regressed(scores, boxes), shape)
            scores, boxes = torch.cat([scores, refined[0]]), torch.cat([boxes, refined[1]])
        heads = self.members[0].roi_heads
        boxes, scores, labels = candidates(boxes, scores, heads.score_thresh)
        keep = batched_nms(boxes, scores, labels, heads.nms_thresh)[: heads.detections_per_img]
        final_boxes = vote(boxes, scores, labels, keep) if self.refine else boxes[keep]
        detections = {
            "boxes": resize_boxes(final_boxes, shape, tuple(image.shape[-2:])),
            "labels": labels[keep],
            "scores": scores[keep],
        }
        if heads.has_mask():
            detections["masks"] = self._predict_masks(features, final_boxes, labels[keep], shape)
        return detections

    def _score(self, features: list[ImageFeatures], regions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Each class's score (n, K + 1), the background's first, and box (n, K + 1, 4): the members' means."""
        scores, boxes = [], []
        for member, precision, own in zip(self.members, self.precisions, features, strict=True):
            heads = member.roi_heads
            with autocast(regions.device, precision):
                logits, moves = heads.box_predictor(region_features(member, own, regions, shape))
            scores.append(logits.softmax(1))
            decoded = heads.box_coder.decode(moves, [regions]).view(*logits.shape, 4)  # flat without regions
            boxes.append(clip_boxes_to_image(decoded, shape))
        return torch.stack(scores).mean(0), torch.stack(boxes).mean(0)

    def _predict_masks(self, features: list[ImageFeatures], boxes: Tensor, labels: Tensor, shape: Shape) -> Tensor:
        """The masks (n, 1, M, M) of detected boxes (n, 4), each over its box: the members' means, at one scale."""
        masks = []
        for member, precision, own in zip(self.members, self.precisions, features, strict=True):
            heads, (view,) = member.roi_heads, own.views
            with autocast(boxes.device, precision):
                pooled = heads.mask_roi_pool(view.maps, [resize_boxes(boxes, shape, view.shape)], [view.shape])
                logits = heads.mask_predictor(heads.mask_head(pooled))
            masks += maskrcnn_inference(logits, [labels])
        return torch.stack(masks).mean(0)


def union(proposals: Sequence[Tensor]) -> Tensor:
    """The distinct boxes of all members, (n, 4): all of the first, then those of the others that are new."""
    boxes = proposals[0]
    for more in proposals[1:]:
        _, number = torch.cat([boxes, more]).unique(dim=0, return_inverse=True)  # equal boxes have equal numbers
        boxes = torch.cat([boxes, more[~torch.isin(number[len(boxes) :], number[: len(boxes)])]])
    return boxes


def candidates(boxes: Tensor, scores: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each class's box (n, K + 1, 4) and score (n, K + 1) as a detection of its own: boxes (m, 4), scores, labels (m,).

    The background, scores of `least` or below and boxes without an area are dropped, as in torchvision.
    """
    labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)[:, 1:].flatten()
    boxes, scores = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].flatten()
    likely = scores > least
    boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
    large = remove_small_boxes(boxes, min_size=1e-2)
    return boxes[large], scores[large], labels[large]

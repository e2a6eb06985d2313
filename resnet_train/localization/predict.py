"""Locate objects of given classes in one image by a trained RPN, with or without R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, nms, remove_small_boxes
from torchvision.transforms.v2 import functional as TF

from resnet_train.data.crops import center_side, scaled_view
from resnet_train.data.views import SCALES
from resnet_train.engine.compute import autocast
from resnet_train.localization.model import CODERS, Localizer, anchors_of, warp

NMS = 0.7  # of an RPN's proposals: Faster R-CNN's threshold of overlap
BEFORE_NMS = 6000  # the likeliest that non-maximum suppression looks at, as in Faster R-CNN
AT_ONCE = 128  # regions that R-CNN looks at together


@dataclass(frozen=True)
class Predictor:
    """A trained localizer, on its device, and what its images are like."""

    model: Localizer
    precision: str
    crop: int
    stride: int
    anchors: Sequence[int]
    proposals: int


class View(NamedTuple):
    """A scaled part of an image, (H, W, 3) uint8; its boxes (x, y, x, y) * scale + offset are in the image's pixels."""

    pixels: Tensor
    scale: Tensor
    offset: Tensor


def dense_sides(crop: int, scales: Sequence[int] | None) -> list[int]:
    """The shorter sides of a dense test: `scales` or, as section 3.4 has them for crops of 224, in proportion."""
    return list(scales or (round(crop * side / 224) for side in SCALES))


def views(image: Tensor, crop: int, sides: Sequence[int] | None) -> list[View]:
    """The views of an image (3, H, W): its center, as `data.crops.center_view` has it, or the whole at each of `sides`.

    Not of one that is longer than `data.crops.LONGEST` allows.
    """
    result = []
    for side in sides or [center_side(crop)]:
        whole = scaled_view(image, side)
        pixels = whole if sides else TF.center_crop(whole, [crop, crop])
        (height, width), (high, wide) = image.shape[1:], whole.shape[1:]
        scale = torch.tensor([width / wide, height / high] * 2)
        corner = [round((wide - pixels.shape[2]) / 2), round((high - pixels.shape[1]) / 2)]
        result.append(View(pixels.permute(1, 2, 0), scale, torch.tensor(corner * 2) * scale))
    return result


@torch.no_grad()
def score_anchors(rpn: Predictor, image: Tensor, labels: Tensor, sides: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The boxes of every anchor in every view of an image (3, H, W), (K, P, 4) in its pixels, and their scores (K, P).

    `labels` (K,): the classes, from 0, to score.
    """
    scores, boxes = [], []
    for view in views(image, rpn.crop, sides):
        with autocast(image.device, rpn.precision):
            score, moves = rpn.model(view.pixels[None], labels[None])
        anchors = anchors_of(rpn.anchors, view.pixels.shape[:2], rpn.stride).to(image.device)
        decoded = CODERS["rpn"].decode_single(moves.flatten(0, 2), anchors.repeat(len(labels), 1))
        decoded = decoded.view(len(labels), -1, 4) * view.scale.to(decoded) + view.offset.to(decoded)
        boxes.append(clip_boxes_to_image(decoded, tuple(image.shape[1:])))
        scores.append(score[0])
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def best(boxes: Tensor, scores: Tensor) -> Tensor:
    """The likeliest box of each class: (K, P, 4) and (K, P) to (K, 4)."""
    return boxes[torch.arange(len(boxes), device=boxes.device), scores.argmax(1)]


def propose(boxes: Tensor, scores: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """At most `count` boxes of a class, the likeliest first: (P, 4) and (P,) to (n, 4), n at least 1.

    Boxes that overlap a likelier one by 0.7 or are narrower than a pixel are dropped; if none is left, the whole image
    of `shape` (H, W) is returned.
    """
    candidates = scores.topk(min(BEFORE_NMS, len(scores))).indices
    candidates = candidates[remove_small_boxes(boxes[candidates], 1.0)]
    keep = candidates[nms(boxes[candidates], scores[candidates], NMS)][:count]
    return boxes[keep] if len(keep) else boxes.new_tensor([[0, 0, shape[1], shape[0]]])


@torch.no_grad()
def rescore(rcnn: Predictor, image: Tensor, regions: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The regions (n, 4) of an image as R-CNN regresses them for a class, (n, 4), and their scores (n,)."""
    scores, moves = [], []
    for chunk in regions.split(AT_ONCE):
        with autocast(image.device, rcnn.precision):
            score, move = rcnn.model(warp(image, chunk, rcnn.crop), label.expand(len(chunk), 1))
        scores.append(score[:, 0, 0])
        moves.append(move[:, 0, 0])
    boxes = CODERS["rcnn"].decode_single(torch.cat(moves), regions)
    return clip_boxes_to_image(boxes, tuple(image.shape[1:])), torch.cat(scores)


def locate(
    rpn: Predictor, rcnn: Predictor | None, image: Tensor, labels: Tensor, sides: Sequence[int] | None = None
) -> Tensor:
    """The box of each class in `labels` (K,) in an image (3, H, W) uint8: (K, 4).

    In a center crop or, with `sides`, in the whole image at these shorter sides. It is the RPN's likeliest box or, with
    `rcnn`, the likeliest of the RPN's proposals after regression by R-CNN.
    """
    boxes, scores = score_anchors(rpn, image, labels, sides)
    if rcnn is None:
        return best(boxes, scores)
    answers = []
    for label, own_boxes, own_scores in zip(labels, boxes, scores, strict=True):
        regions = propose(own_boxes, own_scores, rcnn.proposals, image.shape[1:])
        moved, moved_scores = rescore(rcnn, image, regions, label)
        answers.append(moved[moved_scores.argmax()])
    return torch.stack(answers)


def is_right(labels: Tensor, boxes: Tensor, label: int, targets: Tensor) -> bool:
    """ILSVRC's rule: whether an answer has the class `label` and overlaps one of that class's boxes by half or more.

    `labels` (K,) and `boxes` (K, 4): the answers; `targets` (M, 4): the true boxes.
    """
    return bool(((labels == label) & (box_iou(boxes, targets) >= 0.5).any(1)).any())

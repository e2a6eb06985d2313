"""Where a trained RPN, and R-CNN behind it, find the objects of given classes in one image."""

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
    """What of an image is looked at: (H, W, 3) uint8, and the way back: pixels * scale + offset, (x, y, x, y)."""

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
    shown = []
    for side in sides or [center_side(crop)]:
        whole = scaled_view(image, side)
        pixels = whole if sides else TF.center_crop(whole, [crop, crop])
        (height, width), (high, wide) = image.shape[1:], whole.shape[1:]
        scale = torch.tensor([width / wide, height / high] * 2)
        corner = [round((wide - pixels.shape[2]) / 2), round((high - pixels.shape[1]) / 2)]
        shown.append(View(pixels.permute(1, 2, 0), scale, torch.tensor(corner * 2) * scale))
    return shown


@torch.no_grad()
def score_anchors(rpn: Predictor, image: Tensor, labels: Tensor, sides: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The boxes of every anchor in every view of an image (3, H, W), (K, P, 4) in its pixels, and their scores (K, P).

    `labels` (K,): the classes, from 0, whose boxes these are.
    """
    scores, boxes = [], []
    for view in views(image, rpn.crop, sides):
        with autocast(image.device, rpn.precision):
            score, moves = rpn.model(view.pixels[None], labels[None])
        anchors = anchors_of(rpn.anchors, view.pixels.shape[:2], rpn.stride).to(image.device)
        placed = CODERS["rpn"].decode_single(moves.flatten(0, 2), anchors.repeat(len(labels), 1))
        placed = placed.view(len(labels), -1, 4) * view.scale.to(placed) + view.offset.to(placed)
        boxes.append(clip_boxes_to_image(placed, tuple(image.shape[1:])))
        scores.append(score[0])
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def best(boxes: Tensor, scores: Tensor) -> Tensor:
    """The likeliest box of each class: (K, P, 4) and (K, P) to (K, 4)."""
    return boxes[torch.arange(len(boxes), device=boxes.device), scores.argmax(1)]


def propose(boxes: Tensor, scores: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """At most `count` boxes of a class, the likeliest first: (P, 4) and (P,) to (n, 4), n at least 1.

    Those that overlap a likelier one by 0.7 or are narrower than a pixel are none; where nothing is left, the image of
    `shape` (H, W) as a whole is.
    """
    first = scores.topk(min(BEFORE_NMS, len(scores))).indices
    first = first[remove_small_boxes(boxes[first], 1.0)]
    kept = first[nms(boxes[first], scores[first], NMS)][:count]
    return boxes[kept] if len(kept) else boxes.new_tensor([[0, 0, shape[1], shape[0]]])


@torch.no_grad()
def rescore(rcnn: Predictor, image: Tensor, regions: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Where R-CNN moves regions (n, 4) of an image for a class, and how likely each is then: (n, 4), (n,)."""
    scores, moves = [], []
    for some in regions.split(AT_ONCE):
        with autocast(image.device, rcnn.precision):
            score, move = rcnn.model(warp(image, some, rcnn.crop), label.expand(len(some), 1))
        scores.append(score[:, 0, 0])
        moves.append(move[:, 0, 0])
    boxes = CODERS["rcnn"].decode_single(torch.cat(moves), regions)
    return clip_boxes_to_image(boxes, tuple(image.shape[1:])), torch.cat(scores)


def locate(
    rpn: Predictor, rcnn: Predictor | None, image: Tensor, labels: Tensor, sides: Sequence[int] | None = None
) -> Tensor:
    """The box of each class in `labels` (K,) in an image (3, H, W) uint8: (K, 4).

    In a center crop or, with `sides`, in the whole image at these shorter sides. The RPN's likeliest box, or of its
    likeliest ones that which `rcnn` finds likeliest.
    """
    boxes, scores = score_anchors(rpn, image, labels, sides)
    if rcnn is None:
        return best(boxes, scores)
    answers = []
    for label, places, likely in zip(labels, boxes, scores, strict=True):
        regions = propose(places, likely, rcnn.proposals, image.shape[1:])
        moved, again = rescore(rcnn, image, regions, label)
        answers.append(moved[again.argmax()])
    return torch.stack(answers)


def is_right(labels: Tensor, boxes: Tensor, label: int, truth: Tensor) -> bool:
    """ILSVRC's rule: whether one of the answers is of the class `label` and overlaps one of its boxes by half.

    `labels` (K,) and `boxes` (K, 4): the answers; `truth` (M, 4).
    """
    return bool(((labels == label) & (box_iou(boxes, truth) >= 0.5).any(1)).any())

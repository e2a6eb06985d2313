"""An image as a detector sees it, at one size or at several, of which each region takes two (appendix B).

After Ren et al., "Object detection networks on convolutional feature maps": of the sizes, the two neighbours at which
the region's area is nearest to 224x224 pixels; pooling and the layers behind it on both, then the greater value of each
feature. Proposals come from the size of the training alone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import box_area

from resnet_train.detection.model import Detector

Shape = tuple[int, int]  # of an image, (H, W)
AREA = 224 * 224  # pixels: that of the images that the backbone was trained on


@dataclass(frozen=True)
class View:
    """An image brought to `shape` and its feature maps by level, "0" alone without a pyramid."""

    maps: dict[str, Tensor]
    shape: Shape


@dataclass(frozen=True)
class ImageFeatures:
    """What a detector sees of an image: proposals (n, 4) in one of `shape`, and the views that regions are cut of."""

    proposals: Tensor
    shape: Shape
    views: list[View]


def longest(scale: int, min_size: int, max_size: int) -> float:
    """How long the longer side may be where the shorter is to be `scale`: as much longer as in training."""
    return max_size * scale / min_size


def extract(member: Detector, image: Tensor, scales: Sequence[int] = ()) -> ImageFeatures:
    """An image (3, H, W) in 0 to 1 as a detector sees it; regions are cut of views of `scales`, if any, alone."""
    base, (least,), most = member.transform, member.transform.min_size, member.transform.max_size
    images, _ = base([image])
    own = View(_maps(member, images.tensors), images.image_sizes[0])
    (proposals,), _ = member.rpn(images, own.maps)
    views = []
    for scale in scales:
        resize: GeneralizedRCNNTransform = copy.copy(base)
        resize.min_size, resize.max_size = (scale,), longest(scale, least, most)
        images, _ = resize([image])
        views.append(own if scale == least else View(_maps(member, images.tensors), images.image_sizes[0]))
    return ImageFeatures(proposals, own.shape, views or [own])


def _maps(member: Detector, images: Tensor) -> dict[str, Tensor]:
    maps = member.backbone(images)
    return OrderedDict([("0", maps)]) if isinstance(maps, Tensor) else maps


def lower_scales(areas: Tensor) -> Tensor:
    """The lower of the two neighbouring scales that a region takes, by its area at each scale: (n, S) to (n,).

    Areas rise from scale to scale, so that the two in which one is nearest to AREA are neighbours.
    """
    away = (areas - AREA).abs()
    return (away[:, :-1] + away[:, 1:]).argmin(1)


def region_features(member: Detector, image: ImageFeatures, regions: Tensor, shape: Shape) -> Tensor:
    """What a detector hands its class and box layers of each of `regions` (n, 4), boxes in an image of `shape`: (n, C).

    They are cut of the feature maps that are there: no layer before the pooling is computed again.
    """
    heads = member.roi_heads
    places = [resize_boxes(regions, shape, view.shape) for view in image.views]
    if len(places) == 1:
        return heads.box_head(heads.box_roi_pool(image.views[0].maps, places, [image.views[0].shape]))
    lower = lower_scales(torch.stack([box_area(boxes) for boxes in places], 1))
    pooled: Tensor | None = None
    for number, (view, boxes) in enumerate(zip(image.views, places, strict=True)):
        here = (lower == number) | (lower + 1 == number)
        features = heads.box_head(heads.box_roi_pool(view.maps, [boxes[here]], [view.shape]))
        if pooled is None:
            pooled = features.new_full((len(regions), features.shape[1]), -torch.inf)
        pooled[here] = pooled[here].maximum(features)
    assert pooled is not None
    return pooled

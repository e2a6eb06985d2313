"""torchvision's mask branch (He et al. 2017, Mask R-CNN) behind the paper's arrangement, or behind a pyramid."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform

CHANNELS = 256  # of Mask R-CNN's own layers


class MaskPredictor(MaskRCNNPredictor):
    """Its result in float32 also where it computes in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class MaskTransform(GeneralizedRCNNTransform):
    """torchvision's, but for masks.

    Those of the training come at its size already. Those found stay (n, 1, M, M), each over its box: as wholes of the
    image they would take four bytes a pixel for each detection.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image (3, H, W) and its boxes at the size of the training."""
        if target is None:
            return super().resize(image)
        masks = target["masks"]
        image, target = super().resize(image, {name: value for name, value in target.items() if name != "masks"})
        return image, {**target, "masks": masks}

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes in pixels of the image as it came."""
        masks = [detections.pop("masks") for detections in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        return [{**detections, "masks": own} for detections, own in zip(result, masks, strict=True)]


def add_mask_branch(detector: Any, classes: int, pool: nn.Module, width: int | None) -> None:
    """Have `detector` learn and find masks, of `classes` without the background.

    `width`: the channels of conv5_x, whose maps of each region the branch shares with class and box (Mask R-CNN's C4);
    None: behind a pyramid, with four layers of its own on regions that `pool` cuts.
    """
    old, heads = detector.transform, detector.roi_heads
    detector.transform = MaskTransform(old.min_size, old.max_size, old.image_mean, old.image_std)
    if width is None:
        heads.mask_roi_pool, heads.mask_head = pool, MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1)
    else:
        # A function: as a module conv5_x would stand twice in the checkpoint.
        heads.mask_roi_pool, heads.mask_head = functools.partial(_shared_maps, heads, pool), nn.Identity()
        heads.box_head.keep = True
    heads.mask_predictor = MaskPredictor(width or CHANNELS, CHANNELS, classes + 1)


def _shared_maps(
    heads: RoIHeads, pool: nn.Module, maps: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
) -> Tensor:
    """conv5_x of `boxes`; in training of the sampled regions with an object, which the box head has computed."""
    if not heads.training:
        return heads.box_head.conv5(pool(maps, boxes, shapes))
    maps_of_regions, heads.box_head.maps = heads.box_head.maps, None
    positive = heads.fg_bg_sampler.positive
    return maps_of_regions[: len(positive)][positive]  # behind the regions there may be those of whole images

"""Regions cut of feature maps."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, RoIPool
from torchvision.ops.poolers import initLevelMapper


class Pool(RoIPool):
    """RoI pooling (Fast R-CNN, section 2.1) of the one feature map, as torchvision's detector calls it."""

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _: list[tuple[int, int]]) -> Tensor:
        return super().forward(maps["0"], boxes)


Pooled = tuple[Tensor, Tensor, list[int]]  # regions of all images, each image as a whole, the regions of each


class ContextPool(nn.Module):
    """What `pool` makes of regions, and of the whole image as a region besides (appendix B)."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Pooled:
        wholes = [boxes[0].new_tensor([[0, 0, width, height]]) for height, width in shapes]
        regions, context = (self.pool(maps, places, shapes) for places in (boxes, wholes))
        return regions, context, [len(places) for places in boxes]


def align(strides: list[int], size: int) -> MultiScaleRoIAlign:
    """RoIAlign of maps "0", "1", … of these strides to `size`.

    torchvision would guess the strides from the first image that it sees, and guess wrong from a small one.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], size, sampling_ratio=2)
    first, last = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pool.scales, pool.map_levels = [1 / stride for stride in strides], initLevelMapper(first, last)
    return pool

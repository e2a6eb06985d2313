"""The test of a detector: every image once, alone, so that nothing depends on how they are dealt to processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

from resnet_train.classification.evaluate import eval_mode
from resnet_train.detection.annotations import Example
from resnet_train.detection.loader import test_images
from resnet_train.detection.metrics import coco_map, voc_map
from resnet_train.engine.compute import autocast
from resnet_train.engine.distributed import is_main, on_rank_zero, rank, world_size
from resnet_train.errors import UserError

Found = dict[str, Tensor]  # boxes (n, 4) in pixels of the image, labels from 1, scores


def detections(model: nn.Module, images: Iterable[Tensor], precision: str) -> Iterator[Found]:
    """What `model`, a Detector or an Ensemble, finds in each image, (3, H, W) uint8 on its device; on the CPU."""
    with eval_mode(model):
        for image in images:
            with autocast(image.device, precision):
                (found,) = model([image.float() / 255])
            found["boxes"] = clip_boxes_to_image(found["boxes"], image.shape[1:])  # scaled back they may end beyond
            yield {name: value.cpu() for name, value in found.items()}


def check_shape(name: str, shape: Sequence[int], min_size: int, max_size: float) -> None:
    """Refuse an image of `shape` (H, W) that is so long that nothing is left of its width. Raises UserError."""
    if min(shape) * min(min_size / min(shape), max_size / max(shape)) < 1:
        raise UserError(
            f"{name}: is {shape[1]}x{shape[0]}; brought to {max_size:.0f} pixels, nothing is left of its width"
        )


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    classes: list[str],
    category_ids: list[int],
    precision: str,
    device: torch.device,
    workers: int,
) -> tuple[dict[str, Any], list[Found]]:
    """Average precision by VOC's and by COCO's rules, in %, and what was found in the first process's images.

    Of several processes each takes every so-manieth image, and all get the same figures, those of one process.
    """
    mine = examples[rank() :: world_size()]
    images = test_images(mine, workers=workers, device=device)
    bar = tqdm(images, total=len(mine), desc="test", unit="image", leave=False, disable=None if is_main() else True)
    found = list(detections(model, bar, precision))
    shares: list[list[Found]] = [found]
    if world_size() > 1:
        shares = [[] for _ in range(world_size())]
        dist.all_gather_object(shares, found)
    whole: list[Found] = [{} for _ in examples]
    for start, share in enumerate(shares):
        whole[start :: world_size()] = share
    return on_rank_zero(lambda: _measured(examples, whole, classes, category_ids)), found


def _measured(
    examples: Sequence[Example], found: list[Found], classes: list[str], category_ids: list[int]
) -> dict[str, Any]:
    return voc_map(examples, found, classes) | coco_map(examples, found, classes, category_ids)

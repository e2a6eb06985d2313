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
from resnet_train.detection.loader import tell_skipped, test_images
from resnet_train.detection.masks import paste
from resnet_train.detection.metrics import coco_map, voc_map
from resnet_train.engine.compute import autocast
from resnet_train.engine.distributed import is_main, on_rank_zero, rank, world_size
from resnet_train.errors import UserError

# Boxes (n, 4) in pixels of the image, labels from 1, scores, and of a detector with masks these, as run lengths.
ImageDetections = dict[str, Any]


def detections(model: nn.Module, images: Iterable[Tensor | str], precision: str) -> Iterator[ImageDetections]:
    """What `model`, a Detector or an Ensemble, finds in each image, (3, H, W) uint8 on its device; on the CPU.

    For the line of a broken image nothing, {}.
    """
    with eval_mode(model):
        for image in images:
            if isinstance(image, str):
                yield {}
                continue
            with autocast(image.device, precision):
                (detected,) = model([image.float() / 255])
            # Scaled back they may end beyond it.
            detected["boxes"] = clip_boxes_to_image(detected["boxes"], image.shape[1:])
            detected = {name: value.cpu() for name, value in detected.items()}
            if "masks" in detected:
                detected["masks"] = paste(detected["masks"], detected["boxes"], image.shape[1:])
            yield detected


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
    skip: bool = False,
) -> tuple[dict[str, Any], list[ImageDetections]]:
    """Average precision by VOC's and by COCO's rules, in %, and what was found in this process's images.

    Of several processes each takes its share of the images, and all get the same figures, those of one process. With
    `skip` images whose pixels are broken are left out and counted (`skipped`); otherwise one raises UserError.
    """
    mine = examples[rank() :: world_size()]
    images = test_images(mine, workers=workers, device=device, skip=skip)
    bar = tqdm(images, total=len(mine), desc="test", unit="image", leave=False, disable=None if is_main() else True)
    detected = list(detections(model, _tell_broken(bar), precision))
    shares: list[list[ImageDetections]] = [detected]
    if world_size() > 1:
        shares = [[] for _ in range(world_size())]
        dist.all_gather_object(shares, detected)
    whole: list[ImageDetections] = [{} for _ in examples]
    for start, share in enumerate(shares):
        whole[start :: world_size()] = share
    measured = on_rank_zero(lambda: _measured(examples, whole, classes, category_ids))
    return measured | ({"skipped": whole.count({})} if skip else {}), detected


def _tell_broken(images: Iterable[Tensor | str]) -> Iterator[Tensor | str]:
    """The same, the lines of broken images printed."""
    for image in images:
        if isinstance(image, str):
            tell_skipped([image])
        yield image


def _measured(
    examples: Sequence[Example], detected: list[ImageDetections], classes: list[str], category_ids: list[int]
) -> dict[str, Any]:
    seen = [example for example, row in zip(examples, detected, strict=True) if row]
    detected = [row for row in detected if row]
    if not seen:
        raise UserError("data.test: has no image whose pixels can be read")
    if all(example.ignored.all() for example in seen):
        raise UserError("data.test: no image whose pixels can be read has an object that counts")
    measured = voc_map(seen, detected, classes) | coco_map(seen, detected, classes, category_ids)
    if all("masks" in row for row in detected):
        masks = coco_map(seen, detected, classes, category_ids, masks=True)
        measured |= {f"mask_{name}": value for name, value in masks.items()}
    return measured

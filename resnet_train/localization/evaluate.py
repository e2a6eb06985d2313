"""The localization error by ILSVRC's rule, counted in integers; every image alone, however they are dealt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.classification.evaluate import eval_mode
from resnet_train.engine.distributed import all_reduce_sum, for_all_ranks, is_main, rank, world_size
from resnet_train.errors import RunError, UserError
from resnet_train.localization.loader import whole_images
from resnet_train.localization.predict import Predictor, is_right, locate
from resnet_train.localization.tree import Photos

NAMED = ("error1", "error5", "class_error1", "class_error5")  # what is measured of the classes that are named
Names = Callable[[Tensor], Tensor]  # of an image (3, H, W), its likeliest classes, from 0, the first one first: (K,)


def evaluate(
    rpn: Predictor,
    rcnn: Predictor | None,
    photos: Photos,
    *,
    device: torch.device,
    workers: int,
    skip: bool = False,
    sides: Sequence[int] | None = None,
    classify: Names | None = None,
) -> dict[str, Any]:
    """Errors in %: `error` with the true class given and, of the classes that `classify` names, those of ILSVRC.

    `error5`: no answer of five has the true class and half of one of its boxes; `error1`: the first has not. Beside
    them the error of the classes alone. Of several processes each takes its share of the images, and all get the same
    figures; `images` is the number of those that could be read. Raises UserError for one that cannot, if none is to be
    skipped.
    """
    mine = range(rank(), len(photos), world_size())
    images = whole_images(photos, mine, workers=workers, skip=skip, device=device)
    bar = tqdm(images, total=len(mine), desc="test", unit="image", leave=False, disable=None if is_main() else True)
    counts = torch.zeros(6, dtype=torch.int64)  # of images, and of those that are wrong in each way
    with eval_mode(rpn.model), eval_mode(rcnn.model if rcnn else rpn.model):
        for example, image in bar:
            label = int(example.labels[0]) - 1
            named = classify(image).cpu() if classify is not None else torch.empty(0, dtype=torch.int64)
            labels = torch.cat([torch.tensor([label]), named[named != label]])
            boxes = locate(rpn, rcnn, image, labels.to(device), sides).cpu()
            if not boxes.isfinite().all():
                raise RunError(f"{example.name}: a box found is not finite; try an earlier checkpoint or a lower lr=")
            place = {int(one): box for one, box in zip(labels, boxes, strict=True)}
            answers = torch.stack([place[int(one)] for one in named]) if len(named) else boxes[:0]
            truth = example.boxes
            counts[0] += 1
            counts[1] += not is_right(labels[:1], boxes[:1], label, truth)
            for row, count in ((2, 1), (3, 5)):
                counts[row] += not is_right(named[:count], answers[:count], label, truth)
                counts[row + 2] += label not in named[:count].tolist()
    seen, given, *others = all_reduce_sum(counts).tolist()
    if not seen:
        raise for_all_ranks(UserError(f"none of the {len(photos)} test images can be read"))
    wrong = {"error": given} if classify is None else {"error": given, **dict(zip(NAMED, others, strict=True))}
    return {name: 100 * count / seen for name, count in wrong.items()} | {"images": seen}

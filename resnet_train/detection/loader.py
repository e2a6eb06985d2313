"""Pictures and their boxes as batches: which, in what order, mirrored or not, is a function of seed and iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet_train.data.loader import checked_batches, leave_signals
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.detection.annotations import Example, load

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]  # images (3, H, W) uint8, and the boxes and labels in each


class _Training(Dataset[Batch]):
    """This process's share of the batch of each iteration."""

    def __init__(self, examples: Sequence[Example], seed: int, batch_size: int, rank: int, world: int) -> None:
        self.examples, self.seed, self.batch_size, self.rank, self.world = examples, seed, batch_size, rank, world

    def __getitem__(self, iteration: int) -> Batch:
        indices = batch_indices(self.seed, iteration, self.batch_size, len(self.examples))
        flips = torch.randint(0, 2, (self.batch_size,), generator=generator(self.seed, "flips", iteration)).bool()
        share = slice(self.rank, None, self.world)
        images, targets = [], []
        for index, flip in zip(indices[share].tolist(), flips[share].tolist(), strict=True):
            example = self.examples[index]
            image, boxes = load(example), example.boxes[~example.ignored]
            if flip:
                image, boxes = image.flip(2), mirrored(boxes, example.width)
            images.append(image)
            targets.append({"boxes": boxes, "labels": example.labels[~example.ignored]})
        return images, targets


class _Images(Dataset[Tensor]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tensor:
        return load(self.examples[index])


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes (n, 4) of an image of `width` as they are in its mirror image."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], 1)


def training_batches(
    examples: Sequence[Example],
    *,
    seed: int,
    batch_size: int,
    iterations: range,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """This process's share of the batches of `iterations`, on `device`; half of the images are mirrored.

    What is ignored (difficult objects, crowds) is left out. Raises UserError for an image that cannot be read.
    """
    data = _Training(examples, seed, batch_size, rank, world)
    for images, targets in _loaded(data, iterations, workers, device):
        yield (
            [image.to(device, non_blocking=True) for image in images],
            [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets],
        )


def test_images(examples: Sequence[Example], *, workers: int, device: torch.device) -> Iterator[Tensor]:
    """Each image, (3, H, W) uint8, on `device`, in order. Raises UserError for one that cannot be read."""
    for image in _loaded(_Images(examples), range(len(examples)), workers, device):
        yield image.to(device, non_blocking=True)


def _loaded(data: Dataset[Any], order: range, workers: int, device: torch.device) -> Iterator[Any]:
    """The items of `data` as they are: images of different sizes make no tensor."""
    return checked_batches(
        DataLoader(
            data,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals,
        )
    )

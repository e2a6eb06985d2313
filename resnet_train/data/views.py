"""Batches of images, and several views of each for the tests of section 3.4."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resnet_train.data.sampler import held_out
from resnet_train.errors import UserError

Batches = Iterator[tuple[Tensor, Tensor]]
# Of a batch of images: views of them (V times N, 3, H, W), which N images of the batch these show, V times over, and
# the labels of all.
Views = tuple[list[tuple[Tensor, Tensor]], Tensor]
PROTOCOLS = {"tencrop": "10-crop", "multiscale": "multi-scale, fully convolutional"}


def split_sizes(train: int, validation: int) -> tuple[Tensor, Tensor]:
    """The indices of the training part and of the part held out. Raises UserError if nothing would be left."""
    if validation >= train:
        raise UserError(f"data.validation={validation}: the training set has {train} images; hold out fewer")
    return held_out(train, validation)


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that process `rank` of `world` takes."""
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def single_views(batches: Batches) -> Iterator[Views]:
    """Batches as views: of each image one."""
    for images, labels in batches:
        yield [(images, torch.arange(len(labels), device=images.device))], labels

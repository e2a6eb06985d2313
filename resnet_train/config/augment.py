"""Augmentation of training images: the augment.* keys, as a value that the data sets take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from resnet_train.config.keys import OnlyFor, Range


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images: zero padding and crop, flip, scale or area, colour."""

    pad: Annotated[int, Range(0, 16), OnlyFor("cifar")]
    flip: bool
    shorter_side: Annotated[list[int] | None, Range(0, 4096), OnlyFor("imagenet")]
    area: Annotated[list[float] | None, Range(0, 1), OnlyFor("imagenet")]
    colour_jitter: Annotated[float, Range(0, 1), OnlyFor("imagenet")]
    colour_noise: Annotated[float, Range(0, 1), OnlyFor("imagenet")]

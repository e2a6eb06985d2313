"""Batches of images, and several views of each image for the evaluation of section 3.4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from resnet_train.config.augment import Augment
from resnet_train.data.crops import Box, center_view, cut, scaled_view
from resnet_train.data.decode import ImageError
from resnet_train.data.imagefolder import ImageSource, image_of
from resnet_train.data.sampler import held_out
from resnet_train.errors import UserError

T = TypeVar("T")
Batches = Iterator[tuple[Tensor, Tensor]]
# A batch of images: views (V times N, 3, H, W), each with the indices (N,) of the images that they show, and the labels
# of all images. The views of N images are repeated V times in the same order.
Views = tuple[list[tuple[Tensor, Tensor]], Tensor]
# An index, and the crop: a function from height and width to a box, or None for the center crop of evaluation.
View = tuple[int, Callable[[int, int], Box] | None]
TRIES = 100  # broken images in a row that raise an error in spite of skipping
SCALES = (224, 256, 384, 480, 640)  # shorter sides of the fully convolutional test (section 3.4)
PROTOCOLS = {"tencrop": "10-crop", "multiscale": "multi-scale, fully convolutional"}


def split_sizes(train: int, validation: int) -> tuple[Tensor, Tensor]:
    """The indices of the training part and of the part held out. Raises UserError if no training image is left.

    Of a test part alone, without training images, both are empty.
    """
    if not train:
        return held_out(0, 0)
    if validation >= train:
        raise UserError(f"data.validation={validation}: the training set has {train} images; hold out fewer")
    return held_out(train, validation)


@dataclass(frozen=True)
class BatchOrder:
    """The sequence of training batches of `seed` from iteration `start` on, and the share of one process.

    `batch_size` is the global batch size of all `world` processes.
    """

    seed: int
    batch_size: int
    augment: Augment
    start: int = 0
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> slice:
        """The part of each batch that process `rank` takes."""
        return slice(self.rank * self.batch_size // self.world, (self.rank + 1) * self.batch_size // self.world)


def single_views(batches: Batches) -> Iterator[Views]:
    """Batches as views, one of each image."""
    for images, labels in batches:
        yield [(images, torch.arange(len(labels), device=images.device))], labels


def skip_broken(read: Callable[[int], T], index: int, size: int, *, skip: bool) -> tuple[T, str]:
    """`read(index)` and "", or, with `skip`, the result for the next intact image and a line for each broken one.

    Raises ImageError for a broken image, with `skip` only for TRIES of them in a row. `size`: the number of images.
    """
    broken: list[str] = []
    tries = min(size, TRIES) if skip else 1
    for step in range(tries):
        item = read_or_fault(read, (index + step) % size, skip=skip)
        if not isinstance(item, ImageError):
            return item, "\n".join(broken)
        broken.append(str(item))
    raise ImageError(broken[0] if tries == 1 else f"{broken[0]}; and so are the {tries - 1} after it")


def read_or_fault(read: Callable[[int], T], index: int, *, skip: bool) -> T | ImageError:
    """`read(index)` or, with `skip`, the error of a broken image; without, raises ImageError with advice."""
    try:
        return read(index)
    except ImageError as error:
        if skip:
            return error
        raise ImageError(f"{error}; remove it, or train with data.broken=skip, which leaves such out") from error


def image_or_blank(part: ImageSource, index: int, *, skip: bool) -> tuple[Tensor, int, str]:
    """`image_of` and ""; with `skip`, for a broken image, a black pixel, label -1, and a line about it."""
    item = read_or_fault(lambda index: image_of(part, index), index, skip=skip)
    return (torch.zeros(3, 1, 1, dtype=torch.uint8), -1, str(item)) if isinstance(item, ImageError) else (*item, "")


class CenterViews(Dataset[tuple[Tensor, int, str]]):
    """Square uint8 center crops (S, S, 3) of photographs, decoded at full size, with labels, as in evaluation.

    With `skip` a broken image has label -1, and a line about it.
    """

    def __init__(self, part: ImageSource, size: int, *, skip: bool = False) -> None:
        self.part, self.size, self.skip = part, size, skip

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        image, label, broken = image_or_blank(self.part, index, skip=self.skip)
        return center_view(image, self.size).permute(1, 2, 0).contiguous(), label, broken


class CroppedViews(Dataset[tuple[Tensor, int, str]]):
    """Square uint8 crops (S, S, 3) of photographs, given by views, with labels and lines about broken images."""

    def __init__(self, part: ImageSource, size: int, broken: str = "stop") -> None:
        self.part, self.size, self.skip = part, size, broken == "skip"

    def __getitem__(self, view: View) -> tuple[Tensor, int, str]:
        index, box_of = view
        (image, label), broken = skip_broken(lambda i: self._cut(i, box_of), index, len(self.part), skip=self.skip)
        return image, label, broken

    def _cut(self, index: int, box_of: Callable[[int, int], Box] | None) -> tuple[Tensor, int]:
        if box_of is None:
            image, label = image_of(self.part, index)
            return center_view(image, self.size).permute(1, 2, 0).contiguous(), label
        name, data, label = self.part.read(index)
        return cut(data, name, self.size, box_of), label


class WholeViews(Dataset[tuple[list[Tensor], int, str]]):
    """Photographs as uint8 (V, H, W, 3) at several shorter sides: whole, or corners and center of size `crop`.

    With `skip` a broken image has label -1, and a line about it.
    """

    def __init__(self, part: ImageSource, sides: list[int], crop: int | None, *, skip: bool = False) -> None:
        self.part, self.sides, self.crop, self.skip = part, sides, crop, skip

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        from torchvision.transforms.v2 import functional as TF

        (image, label, broken), scales = image_or_blank(self.part, index, skip=self.skip), []
        for side in self.sides:
            resized = scaled_view(image, side)
            views = TF.five_crop(resized, [self.crop, self.crop]) if self.crop else (resized,)
            scales.append(torch.stack(views).permute(0, 2, 3, 1).contiguous())
        return scales, label, broken


def same_shape(images: list[list[Tensor]], pixels: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Group views of one shape on `device`, at most `pixels` together: (V times N, H, W, 3), the N images' indices.

    `images` has for each image its views (V, H, W, 3) at each scale, which are stacked on the device, since a stack of
    pinned tensors would not be pinned. The order of images is kept.
    """
    for scale in zip(*images, strict=True):
        for shape in dict.fromkeys(views.shape for views in scale):
            indices = [number for number, views in enumerate(scale) if views.shape == shape]
            at_once = max(1, pixels // (2 * shape[0] * shape[1] * shape[2]))
            for start in range(0, len(indices), at_once):
                chunk = indices[start : start + at_once]
                views = [scale[number].to(device, non_blocking=True) for number in chunk]
                yield torch.stack(views, 1).flatten(0, 1), torch.tensor(chunk, device=device)

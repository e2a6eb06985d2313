"""Batches of images, and several views of each for the tests of section 3.4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from resnet_train.config.augment import Augment
from resnet_train.data.crops import Box, center_view, cut, middle
from resnet_train.data.decode import ImageError
from resnet_train.data.imagefolder import ImageSource, image_of
from resnet_train.data.sampler import held_out
from resnet_train.errors import UserError

T = TypeVar("T")
Batches = Iterator[tuple[Tensor, Tensor]]
# Of a batch of images: views of them (V times N, 3, H, W), which N images of the batch these show, V times over, and
# the labels of all.
Views = tuple[list[tuple[Tensor, Tensor]], Tensor]
# An index, and what to cut: the part that a function of height and width gives, or for a test the center.
View = tuple[int, Callable[[int, int], Box] | None]
TRIES = 100  # broken images in a row after which nothing is skipped any more
SCALES = (224, 256, 384, 480, 640)  # shorter sides of the fully convolutional test (section 3.4)
PROTOCOLS = {"tencrop": "10-crop", "multiscale": "multi-scale, fully convolutional"}


def split_sizes(train: int, validation: int) -> tuple[Tensor, Tensor]:
    """The indices of the training part and of the part held out. Raises UserError if nothing would be left."""
    if validation >= train:
        raise UserError(f"data.validation={validation}: the training set has {train} images; hold out fewer")
    return held_out(train, validation)


@dataclass(frozen=True)
class BatchOrder:
    """Which training batches: those of `seed` from iteration `start` on, of which a process takes its share.

    `batch_size` is that of all `world` processes together.
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
    """Batches as views: of each image one."""
    for images, labels in batches:
        yield [(images, torch.arange(len(labels), device=images.device))], labels


def skip_broken(read: Callable[[int], T], index: int, size: int, *, skip: bool) -> tuple[T, str]:
    """What `read` makes of the image `index` of `size`, and "".

    With `skip`, in place of one that is broken what it makes of the next that is not, and a line of each broken one.
    Raises ImageError for one that is broken, or for TRIES of them in a row.
    """
    broken: list[str] = []
    tries = min(size, TRIES) if skip else 1
    for step in range(tries):
        try:
            return read((index + step) % size), "\n".join(broken)
        except ImageError as error:
            broken.append(str(error))
    raise ImageError(broken[0] if tries == 1 else f"{broken[0]}; and so are the {tries - 1} after it")


class CroppedViews(Dataset[tuple[Tensor, int, str]]):
    """Square uint8 crops (S, S, 3) of photographs, as each view says, their labels, and which were broken, if any."""

    def __init__(self, part: ImageSource, size: int, broken: str = "stop") -> None:
        self.part, self.size, self.skip = part, size, broken == "skip"

    def __getitem__(self, view: View) -> tuple[Tensor, int, str]:
        index, what = view
        (image, label), broken = skip_broken(
            lambda place: self._cut(place, what), index, len(self.part), skip=self.skip
        )
        return image, label, broken

    def _cut(self, index: int, what: Callable[[int, int], Box] | None) -> tuple[Tensor, int]:
        if what is None:  # as exact as can be
            image, label = image_of(self.part, index)
            return center_view(image, self.size).permute(1, 2, 0).contiguous(), label
        name, data, label = self.part.read(index)
        return cut(data, name, self.size, what), label


class WholeViews(Dataset[tuple[list[Tensor], int]]):
    """Photographs as uint8 (V, H, W, 3) at several shorter sides: whole, or corners and center of size `crop`."""

    def __init__(self, part: ImageSource, sides: list[int], crop: int | None) -> None:
        self.part, self.sides, self.crop = part, sides, crop

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        from torchvision.transforms.v2 import functional as TF

        (image, label), found = image_of(self.part, index), []
        for side in self.sides:
            resized = TF.resize(middle(image), [side], antialias=True)
            views = TF.five_crop(resized, [self.crop, self.crop]) if self.crop else (resized,)
            found.append(torch.stack(views).permute(0, 2, 3, 1).contiguous())
        return found, label


def same_shape(found: list[list[Tensor]], pixels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of one shape together, at most `pixels` of them: (V times N, H, W, 3) and which N images they show.

    `found` holds for each image its (V, H, W, 3) at each scale. Images keep their order.
    """
    for scale in zip(*found, strict=True):
        for shape in dict.fromkeys(views.shape for views in scale):
            whose = [number for number, views in enumerate(scale) if views.shape == shape]
            at_once = max(1, pixels // (2 * shape[0] * shape[1] * shape[2]))
            for start in range(0, len(whose), at_once):
                some = whose[start : start + at_once]
                yield torch.stack([scale[number] for number in some], 1).flatten(0, 1), torch.tensor(some)

"""Pictures and their boxes as batches: which, in what order, mirrored or not, is a function of seed and iteration."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from resnet_train.data.decode import ImageError
from resnet_train.data.loader import load_in_workers
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.data.views import read_or_fault, skip_broken
from resnet_train.detection.annotations import Example, load
from resnet_train.detection.masks import training_masks
from resnet_train.engine.limits import share_of_cores
from resnet_train.terminal import printable

Target = dict[str, Tensor]


class Batch(NamedTuple):
    """One process's images of an iteration."""

    images: list[Tensor]  # (3, H, W) uint8
    targets: list[Target]  # per image: boxes (n, 4), labels (n,) and, if requested, masks
    broken: list[str]  # error lines of images that could not be decoded and were replaced


class _Training(Dataset[Batch]):
    """This process's share of the batch of each iteration."""

    def __init__(
        self,
        examples: Sequence[Example],
        seed: int,
        batch_size: int,
        share: slice,
        masks: tuple[int, int] | None,
        skip: bool,
    ) -> None:
        self.examples, self.seed, self.batch_size, self.share = examples, seed, batch_size, share
        self.masks, self.skip = masks, skip

    def __getitem__(self, iteration: int) -> Batch:
        indices = batch_indices(self.seed, iteration, self.batch_size, len(self.examples))
        flips = torch.randint(0, 2, (self.batch_size,), generator=generator(self.seed, "flips", iteration)).bool()
        images, targets, lines = [], [], list[str]()
        for index, flip in zip(indices[self.share].tolist(), flips[self.share].tolist(), strict=True):
            read = functools.partial(self._read, flip=flip)
            (image, target), broken = skip_broken(read, index, len(self.examples), skip=self.skip)
            images.append(image)
            targets.append(target)
            lines += broken.splitlines()
        return Batch(images, targets, lines)

    def _read(self, index: int, flip: bool) -> tuple[Tensor, Target]:
        """An image and its target, mirrored or not."""
        example = self.examples[index]
        keep = ~example.ignored
        image, boxes = load(example), example.boxes[keep]
        target = {"boxes": mirrored(boxes, example.width) if flip else boxes, "labels": example.labels[keep]}
        if self.masks:
            texts = [text for text, one in zip(example.masks, keep.tolist(), strict=True) if one]
            target["masks"] = training_masks(texts, image.shape[1:], self.masks, flip=flip)
        return image.flip(2) if flip else image, target


class _Images(Dataset[Tensor | str]):
    def __init__(self, examples: Sequence[Example], skip: bool) -> None:
        self.examples, self.skip = examples, skip

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tensor | str:
        image = read_or_fault(lambda index: load(self.examples[index]), index, skip=self.skip)
        return str(image) if isinstance(image, ImageError) else image


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes (n, 4) of an image of `width`, mirrored with it."""
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
    masks: tuple[int, int] | None = None,
    skip: bool = False,
) -> Iterator[Batch]:
    """This process's share of the batches of `iterations`, on `device`; half of the images are mirrored.

    Ignored objects (difficult, crowds) are left out. `masks`: min_size and max_size of the masks. With `skip` the next
    image replaces one whose pixels are broken; otherwise that raises UserError.
    """
    data = _Training(examples, seed, batch_size, slice(rank, None, world), masks, skip)
    for batch in loaded(data, iterations, workers, device):
        yield Batch(
            [image.to(device, non_blocking=True) for image in batch.images],
            [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets],
            batch.broken,
        )


def test_images(
    examples: Sequence[Example], *, workers: int, device: torch.device, skip: bool
) -> Iterator[Tensor | str]:
    """Each image, (3, H, W) uint8, on `device`, in order.

    With `skip`, an image whose pixels are broken gives its error line; otherwise it raises UserError.
    """
    for image in loaded(_Images(examples, skip), range(len(examples)), workers, device):
        yield image if isinstance(image, str) else image.to(device, non_blocking=True)


def tell_skipped(lines: Iterable[str]) -> None:
    """Print the error lines of broken images without disturbing a progress bar."""
    for line in lines:
        tqdm.write(printable(f"skipped: {line}"), file=sys.stderr)


def loaded(data: Dataset[Any], order: range, workers: int, device: torch.device) -> Iterator[Any]:
    """The items of `data` as they are, by worker processes: images of different sizes make no tensor."""
    workers = min(workers, share_of_cores())  # more would only wait for each other
    return load_in_workers(data, workers, device, batch_size=None, sampler=order)

"""A data set of photographs, decoded by worker processes as it is trained on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from resnet_train.config.layout import name_data
from resnet_train.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    colour_jitter,
    colour_noise,
    draw_crops,
    draw_jitter,
    flip_some,
    normalise,
)
from resnet_train.data.cache import cache_folder, keep
from resnet_train.data.crops import Box, area_box, scaled_box
from resnet_train.data.imagefolder import ImageSource, open_image_splits
from resnet_train.data.loader import checked_batches, leave_signals
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.data.views import (
    SCALES,
    Batches,
    BatchOrder,
    CroppedViews,
    View,
    Views,
    WholeViews,
    same_shape,
    single_views,
    split_sizes,
)
from resnet_train.engine import checkpoint
from resnet_train.engine.limits import check_open_files
from resnet_train.errors import UserError
from resnet_train.terminal import printable

MEAN_OF = 10_000  # training images that the mean image is the mean of


class StreamingDataset:
    """Photographs in class folders or packed, decoded in worker processes (section 3.4).

    A training image that is broken stops all with its name, or, with `broken="skip"`, is replaced by the next one of
    its part that is not, cut alike; `skipped` counts those of the last training batch of this process.
    """

    protocol = "center crop"

    def __init__(
        self,
        *,
        root: str,
        size: int,
        validation: int,
        workers: int,
        broken: str = "stop",
        subtract: str = "channels",
    ) -> None:
        self.size, self.workers, self.subtract, self.broken, self.skipped = size, workers, subtract, broken, 0
        self.told: set[str] = set()  # the broken images of which a line has been printed
        found = open_image_splits(root)
        self.left_out = found.left_out
        self.classes, self.digest, self.label = found.classes, found.digest, name_data("imagenet", root)
        self.top5 = len(self.classes) > 5  # of five, all are among the five
        kept, self.val_indices = split_sizes(len(found.train), validation)
        self.parts = {
            "train": found.train.part(kept),
            "val": found.train.part(self.val_indices),
            "test": found.test,
        }
        self.sizes = {split: len(part) for split, part in self.parts.items()}
        check_open_files(workers)
        import torchvision.transforms.v2.functional  # noqa: F401  (here, once, and not in every worker)

        self._mean: Tensor | None = None

    def mean_image(self) -> Tensor:
        """What is subtracted, in 0 to 255: ImageNet's channel means (1, 1, 3), or the mean image (S, S, 3).

        The mean image is that of the center crops of `MEAN_OF` training images, evenly spread over the classes; made
        once, then from the cache folder.
        """
        if self._mean is None:
            self._mean = self._read_mean() if self.subtract == "image" else torch.tensor(IMAGENET_MEAN).view(1, 1, 3)
        return self._mean

    def _read_mean(self) -> Tensor:
        """The mean image from the cache folder, or made."""
        part = self.parts["train"]
        key = hashlib.sha256(f"{self.digest} {self.size} {len(self.val_indices)}".encode()).hexdigest()[:16]
        path = cache_folder() / "means" / f"{key}.pt"
        with contextlib.suppress(UserError):
            kept = checkpoint.read(path)
            if isinstance(kept, Tensor) and kept.shape == (self.size, self.size, 3):
                return kept
        indices = torch.linspace(0, len(part) - 1, min(MEAN_OF, len(part))).long().tolist()
        views: list[list[View]] = [
            [(index, None) for index in indices[start : start + 100]] for start in range(0, len(indices), 100)
        ]
        total = torch.zeros(self.size, self.size, 3, dtype=torch.int64)
        loader = self._loader(CroppedViews(part, self.size, self.broken), views, torch.device("cpu"))
        for images, _, broken in tqdm(loader, total=len(views), desc="mean image", disable=None):
            self._tell(broken)
            total += images.sum(0, dtype=torch.int64)
        found = (total.double() / len(indices)).float()
        keep(path, found)
        return found

    def names(self, split: str) -> list[str | int]:
        """What to call each image of a part: CLASS/FILE."""
        part = self.parts[split]
        return [part.name(index) for index in range(len(part))]

    def picture(self, split: str, index: int) -> Tensor:
        """An image of a part as the net sees it in the test of its center: (S, S, 3) uint8."""
        return CroppedViews(self.parts[split], self.size)[index, None][0]

    def _divisor(self, device: torch.device) -> Tensor | None:
        """The std that what is left is divided by: (1, 3, 1, 1) float64."""
        std = torch.tensor(IMAGENET_STD, dtype=torch.float64, device=device).view(1, 3, 1, 1)
        return std if self.subtract == "standard" else None

    def train_batches(self, mean: Tensor, device: torch.device, order: BatchOrder) -> Batches:
        """Augmented batches without end: (B, 3, S, S) float32 channels last, (B,) int64.

        B is the batch size of all processes divided by their number.
        """
        part, std, train = order.share, self._divisor(device), self.parts["train"]
        augment, batch_size, iteration = order.augment, order.batch_size, order.start
        sampler = _RandomViews(train, self.size, order)
        for images, labels, broken in self._loader(CroppedViews(train, self.size, self.broken), sampler, device):
            self._tell(broken)
            draw = generator(order.seed, "device augment", iteration)
            flips = draw_crops(draw, batch_size, 0, augment.flip)[2][part].to(device, non_blocking=True)
            noise = torch.randn(batch_size, 3, generator=draw)[part] * augment.colour_noise
            batch = flip_some(images.to(device, non_blocking=True), flips)
            if augment.colour_jitter:
                jitter = draw_jitter(draw, batch_size, augment.colour_jitter)
                batch = colour_jitter(batch, *(part_of[part].to(device, non_blocking=True) for part_of in jitter))
            # Noise is in units of the full range: before it is divided by the std, where it is.
            batch = colour_noise(normalise(batch, mean), noise)
            yield batch if std is None else batch / std.to(batch), labels.to(device, non_blocking=True)
            iteration += 1

    def eval_batches(
        self, split: str, mean: Tensor, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
    ) -> Batches:
        """The center crop of every image once, shorter side at 256 for crops of 224. What fills up has label -1."""
        part = self.parts[split]
        starts = range(rank * batch_size, len(part), world * batch_size)
        views: list[list[View]] = [[(min(i, len(part) - 1), None) for i in range(s, s + batch_size)] for s in starts]
        place, std = torch.arange(batch_size), self._divisor(device)
        loader = self._loader(CroppedViews(part, self.size), views, device)
        for start, (images, labels, _) in zip(starts, loader, strict=True):
            labels = torch.where(place + start < len(part), labels, -1).to(device, non_blocking=True)
            yield normalise(images.to(device, non_blocking=True), mean, std), labels

    def eval_views(
        self,
        protocol: str,
        split: str,
        mean: Tensor,
        device: torch.device,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Views]:
        """Every image once, in the views of `protocol`, about `batch_size` of them at a time.

        center: one view. tencrop: the corners and the center of the image, whose shorter side is 256 for crops of
        224, and their mirror images. multiscale: the whole image at each of `SCALES`, likewise in proportion to the
        size of crops, and its mirror image.
        """
        if protocol == "center":
            yield from single_views(self.eval_batches(split, mean, device, batch_size, rank, world))
            return
        part, count = self.parts[split], max(1, batch_size // 10)
        sides = (256,) if protocol == "tencrop" else SCALES
        wholes = [round(self.size * side / 224) for side in sides]
        batches = [range(s, min(s + count, len(part))) for s in range(rank * count, len(part), world * count)]
        data = WholeViews(part, wholes, self.size if protocol == "tencrop" else None)
        std = self._divisor(device)
        for found in self._loader(data, batches, device, collate=list):
            labels = torch.tensor([label for _, label in found], device=device)
            views = []
            for images, whose in same_shape([images for images, _ in found], batch_size * self.size**2):
                images = normalise(images.to(device, non_blocking=True), mean, std)
                views.append((torch.cat([images, images.flip(3)]), whose.to(device)))
            yield views, labels

    def _tell(self, broken: list[str]) -> None:
        """Count the images of a batch that others stand in for, and print the line of each broken one once."""
        self.skipped = sum(map(bool, broken))
        for line in sorted({line for lines in broken for line in lines.splitlines()} - self.told):
            tqdm.write(printable(f"skipped: {line}"), file=sys.stderr)
            self.told.add(line)

    def _loader(
        self, data: Dataset[Any], views: Any, device: torch.device, collate: Callable[..., Any] | None = None
    ) -> Iterator[Any]:
        return checked_batches(
            DataLoader(
                data,
                batch_sampler=views,
                collate_fn=collate,
                num_workers=self.workers,
                pin_memory=device.type == "cuda",
                worker_init_fn=leave_signals,
            )
        )


def random_views(part: ImageSource, size: int, order: BatchOrder, count: int) -> DataLoader:
    """The first `count` batches of one worker as training takes them, before they go to the device; to measure."""
    views = list(itertools.islice(_RandomViews(part, size, order), count))
    return DataLoader(CroppedViews(part, size), batch_sampler=views, num_workers=1)


class _RandomViews(Sampler[list[View]]):
    """Endless training batches of views of `part`, this process's share, with a random scale or area and place."""

    def __init__(self, part: ImageSource, size: int, order: BatchOrder) -> None:
        self.count, self.blocks, self.size, self.order = len(part), part.blocks, size, order

    def __iter__(self) -> Iterator[list[View]]:
        order = self.order
        for iteration in itertools.count(order.start):
            indices = batch_indices(order.seed, iteration, order.batch_size, self.count, self.blocks)
            boxes = self._boxes(generator(order.seed, "augment", iteration))
            yield list(zip(indices[order.share].tolist(), boxes, strict=True))

    def _boxes(self, draw: torch.Generator) -> list[Callable[[int, int], Box] | None]:
        """What is cut from each photograph of this process's share; the numbers are drawn for the whole batch."""
        count, share = self.order.batch_size, self.order.share
        area, scales = self.order.augment.area, self.order.augment.shorter_side
        if area is not None:
            tries = torch.rand(count, 10, 2, generator=draw)[share].tolist()
            places = torch.rand(count, 2, generator=draw)[share].tolist()
            return [
                functools.partial(area_box, area=area, tries=t, place=p) for t, p in zip(tries, places, strict=True)
            ]
        assert scales is not None  # check_train has seen to it
        low, high = scales
        sides = torch.randint(low, high + 1, (count,), generator=draw)[share].tolist()
        places = torch.rand(count, 2, generator=draw)[share].tolist()
        return [
            functools.partial(scaled_box, size=self.size, side=side, place=place)
            for side, place in zip(sides, places, strict=True)
        ]

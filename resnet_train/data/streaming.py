"""A data set of photographs, decoded by worker processes during training."""

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
from resnet_train.data.loader import load_in_workers
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.data.views import (
    SCALES,
    Batches,
    BatchOrder,
    CenterViews,
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

MEAN_OF = 10_000  # training images over which the mean image is averaged


class StreamingDataset:
    """Photographs in class folders or packed, decoded in worker processes (section 3.4).

    A broken image raises an error with its name or, with `broken="skip"`, is left out of an evaluation, where its label
    is -1, and replaced in training by the next intact one, cropped alike; `skipped` is the number of those in the last
    training batch of this process.
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
        self.unreadable: dict[str, list[str]] = {}  # known only as they are read
        self.reported: set[str] = set()  # lines of broken images that have been printed
        splits = open_image_splits(root)
        self.left_out = splits.left_out
        self.classes, self.digest, self.label = splits.classes, splits.digest, name_data("imagenet", root)
        self.top5 = len(self.classes) > 5  # of five classes, all are in the top five
        train_indices, self.val_indices = split_sizes(len(splits.train), validation)
        self.parts = {
            "train": splits.train.part(train_indices),
            "val": splits.train.part(self.val_indices),
            "test": splits.test,
        }
        self.sizes = {split: len(part) for split, part in self.parts.items()}
        check_open_files(workers)
        import torchvision.transforms.v2.functional  # noqa: F401  (here, once, and not in every worker)

        self._mean: Tensor | None = None

    def mean_image(self) -> Tensor:
        """The mean to subtract, in 0 to 255: ImageNet's channel means (1, 1, 3), or the mean image (S, S, 3).

        The mean image is over the center crops of `MEAN_OF` training images, evenly spread over the classes; it is
        computed once and cached.
        """
        if self._mean is None:
            self._mean = self._read_mean() if self.subtract == "image" else torch.tensor(IMAGENET_MEAN).view(1, 1, 3)
        return self._mean

    def _read_mean(self) -> Tensor:
        """The mean image, cached."""
        part = self.parts["train"]
        key = hashlib.sha256(f"{self.digest} {self.size} {len(self.val_indices)}".encode()).hexdigest()[:16]
        path = cache_folder() / "means" / f"{key}.pt"
        with contextlib.suppress(UserError):
            cached = checkpoint.read(path)
            if isinstance(cached, Tensor) and cached.shape == (self.size, self.size, 3):
                return cached
        indices = torch.linspace(0, len(part) - 1, min(MEAN_OF, len(part))).long().tolist()
        views: list[list[View]] = [
            [(index, None) for index in indices[start : start + 100]] for start in range(0, len(indices), 100)
        ]
        total = torch.zeros(self.size, self.size, 3, dtype=torch.int64)
        loader = self._loader(CroppedViews(part, self.size, self.broken), views, torch.device("cpu"))
        for images, _, broken in tqdm(loader, total=len(views), desc="mean image", disable=None):
            self._name_broken(broken)
            total += images.sum(0, dtype=torch.int64)
        mean = (total.double() / len(indices)).float()
        keep(path, mean)
        return mean

    def names(self, split: str) -> list[str | int]:
        """The name of each image of a part: CLASS/FILE."""
        part = self.parts[split]
        return [part.name(index) for index in range(len(part))]

    def picture(self, split: str, index: int) -> Tensor:
        """The center crop of an image of a part, as the net sees it: (S, S, 3) uint8."""
        return CenterViews(self.parts[split], self.size)[index][0]

    def _divisor(self, device: torch.device) -> Tensor | None:
        """The std by which images are divided after the mean: (1, 3, 1, 1) float64, or None."""
        std = torch.tensor(IMAGENET_STD, dtype=torch.float64, device=device).view(1, 3, 1, 1)
        return std if self.subtract == "standard" else None

    def train_batches(self, mean: Tensor, device: torch.device, order: BatchOrder) -> Batches:
        """Endless augmented batches: (B, 3, S, S) float32 channels last, (B,) int64.

        B is the global batch size divided by the number of processes.
        """
        part, std, train = order.share, self._divisor(device), self.parts["train"]
        augment, batch_size, iteration = order.augment, order.batch_size, order.start
        sampler = _RandomViews(train, self.size, order)
        for images, labels, broken in self._loader(CroppedViews(train, self.size, self.broken), sampler, device):
            self._name_broken(broken)
            self.skipped = sum(map(bool, broken))
            draw = generator(order.seed, "device augment", iteration)
            flips = draw_crops(draw, batch_size, 0, augment.flip)[2][part].to(device, non_blocking=True)
            noise = torch.randn(batch_size, 3, generator=draw)[part] * augment.colour_noise
            batch = flip_some(images.to(device, non_blocking=True), flips)
            if augment.colour_jitter:
                jitter = draw_jitter(draw, batch_size, augment.colour_jitter)
                batch = colour_jitter(batch, *(part_of[part].to(device, non_blocking=True) for part_of in jitter))
            # Noise is in units of the full range, so it is added before the division by std.
            batch = colour_noise(normalise(batch, mean), noise)
            yield batch if std is None else batch / std.to(batch), labels.to(device, non_blocking=True)
            iteration += 1

    def eval_batches(
        self, split: str, mean: Tensor, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
    ) -> Batches:
        """The center crop of every image once, shorter side 256 for crops of 224.

        Padding has label -1, and so have broken images with `broken="skip"`.
        """
        part = self.parts[split]
        starts = range(rank * batch_size, len(part), world * batch_size)
        indices = [[min(i, len(part) - 1) for i in range(s, s + batch_size)] for s in starts]
        positions, std = torch.arange(batch_size), self._divisor(device)
        loader = self._loader(CenterViews(part, self.size, skip=self.broken == "skip"), indices, device)
        for start, (images, labels, broken) in zip(starts, loader, strict=True):
            self._name_broken(broken)
            labels = torch.where(positions + start < len(part), labels, -1).to(device, non_blocking=True)
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
        224, and their mirror images. multiscale: the whole image with its shorter side at each of `SCALES` (scaled
        likewise for other crops), and its mirror image.
        """
        if protocol == "center":
            yield from single_views(self.eval_batches(split, mean, device, batch_size, rank, world))
            return
        part, count = self.parts[split], max(1, batch_size // 10)
        sides = (256,) if protocol == "tencrop" else SCALES
        wholes = [round(self.size * side / 224) for side in sides]
        batches = [range(s, min(s + count, len(part))) for s in range(rank * count, len(part), world * count)]
        data = WholeViews(part, wholes, self.size if protocol == "tencrop" else None, skip=self.broken == "skip")
        std = self._divisor(device)
        for batch in self._loader(data, batches, device, collate=list):
            self._name_broken([broken for _, _, broken in batch])
            labels = torch.tensor([label for _, label, _ in batch], device=device)
            views = []
            for images, indices in same_shape([images for images, _, _ in batch], batch_size * self.size**2, device):
                mirrored = torch.cat([images, images.flip(2)])  # before a mean image is subtracted, as in training
                views.append((normalise(mirrored, mean, std), indices))
            yield views, labels

    def _name_broken(self, broken: list[str]) -> None:
        """Print a line for each broken image of a batch once."""
        for line in sorted({line for lines in broken for line in lines.splitlines()} - self.reported):
            tqdm.write(printable(f"skipped: {line}"), file=sys.stderr)
            self.reported.add(line)

    def _loader(
        self, data: Dataset[Any], views: Any, device: torch.device, collate: Callable[..., Any] | None = None
    ) -> Iterator[Any]:
        return load_in_workers(data, self.workers, device, batch_sampler=views, collate_fn=collate)


def random_views(part: ImageSource, size: int, order: BatchOrder, count: int) -> DataLoader:
    """A loader of `count` training batches with one worker, before they are copied to the device; for benchmarks."""
    views = list(itertools.islice(_RandomViews(part, size, order), count))
    return DataLoader(CroppedViews(part, size), batch_sampler=views, num_workers=1)


class _RandomViews(Sampler[list[View]]):
    """Endless training batches of this process: indices of `part` with random crops."""

    def __init__(self, part: ImageSource, size: int, order: BatchOrder) -> None:
        self.count, self.blocks, self.size, self.order = len(part), part.blocks, size, order

    def __iter__(self) -> Iterator[list[View]]:
        order = self.order
        for iteration in itertools.count(order.start):
            indices = batch_indices(order.seed, iteration, order.batch_size, self.count, self.blocks)
            boxes = self._boxes(generator(order.seed, "augment", iteration))
            yield list(zip(indices[order.share].tolist(), boxes, strict=True))

    def _boxes(self, draw: torch.Generator) -> list[Callable[[int, int], Box] | None]:
        """The crop of each photograph in this process's share; random numbers are drawn for the whole batch."""
        count, share = self.order.batch_size, self.order.share
        area, scales = self.order.augment.area, self.order.augment.shorter_side
        if area is not None:
            tries = torch.rand(count, 10, 2, generator=draw)[share].tolist()
            places = torch.rand(count, 2, generator=draw)[share].tolist()
            return [
                functools.partial(area_box, area=area, tries=t, place=p) for t, p in zip(tries, places, strict=True)
            ]
        assert scales is not None  # ensured by check_train
        low, high = scales
        sides = torch.randint(low, high + 1, (count,), generator=draw)[share].tolist()
        places = torch.rand(count, 2, generator=draw)[share].tolist()
        return [
            functools.partial(scaled_box, size=self.size, side=side, place=place)
            for side, place in zip(sides, places, strict=True)
        ]

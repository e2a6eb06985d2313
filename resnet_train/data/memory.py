"""A data set of small images on the training device, which augments whole batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from resnet_train.config.layout import left_out, name_data
from resnet_train.data.augment import (
    crop_and_normalise,
    draw_crops,
    mean_image,
    normalise,
    pad_and_mirror,
)
from resnet_train.data.image_set import CIFAR10_FINGERPRINT, ImageSet
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.data.source import file_names, load
from resnet_train.data.views import Batches, BatchOrder, Views, single_views, split_sizes


class MemoryDataset:
    """Images of one small size, as uint8 on the training device.

    A broken image raises an error with its name or, with `broken="skip"`, is left out and listed as `unreadable`.
    """

    protocol = "single view"
    top5 = False
    skipped = 0
    _mean: Tensor | None = None

    def __init__(self, *, name: str, root: str | None, size: int, validation: int, broken: str = "stop") -> None:
        data = load(name, root, size, skip=broken == "skip")
        self.unreadable = data.unreadable
        self.left_out = left_out(name, root)
        self.classes, self.digest = data.classes, data.digest
        self.label = "cifar10" if data.digest == CIFAR10_FINGERPRINT else name_data(name, root)
        self.name, self.root = name, root
        train, self.val_indices = split_sizes(len(data.train), validation)
        self.indices = {"train": train, "val": self.val_indices, "test": torch.arange(len(data.test))}
        self.parts = {
            "train": data.train.part(train) if validation else data.train,
            "val": data.train.part(self.val_indices),
            "test": data.test,
        }
        self.sizes = {split: len(part) for split, part in self.parts.items()}

    def mean_image(self) -> Tensor:
        """The per-pixel mean of the training part (section 4.2): (H, W, 3) in 0 to 255."""
        if self._mean is None:
            self._mean = mean_image(self.parts["train"].images)
        return self._mean

    def names(self, split: str) -> list[str | int]:
        """The name of each image of a part: CLASS/FILE, or its index in the set if it has no file of its own.

        Indices of CIFAR-10 are in the order of `make_data_set`.
        """
        indices, part = self.indices[split].tolist(), "test" if split == "test" else "train"
        files = file_names(self.name, self.root, self.classes, part)
        if files is None or self.digest == CIFAR10_FINGERPRINT:
            return indices
        unreadable = {*self.unreadable.get(part, ())}
        files = [file for file in files if file not in unreadable]
        return [files[index] for index in indices]

    def picture(self, split: str, index: int) -> Tensor:
        """An image of a part as the net sees it: (H, W, 3) uint8."""
        return self.parts[split].images[index]

    def _on(self, device: torch.device, split: str) -> ImageSet:
        self.parts[split] = self.parts[split].to(device)
        return self.parts[split]

    def train_batches(self, mean: Tensor, device: torch.device, order: BatchOrder) -> Batches:
        """Endless augmented batches: (B, 3, H, W) float32 channels last, (B,) int64.

        B is the global batch size divided by the number of processes.
        """
        make = self.batch_maker(mean, device, order.augment.pad)
        for draws in self.draw_batches(device, order):
            yield make(draws.to(device, non_blocking=True))

    def draw_batches(self, device: torch.device, order: BatchOrder) -> Iterator[Tensor]:
        """The random draws of training batches: (4, B) int64, image indices, offsets from top and left, flips.

        On the CPU, pinned for a GPU, so that the one copy per iteration is asynchronous.
        """
        augment = order.augment
        for iteration in itertools.count(order.start):
            indices = batch_indices(order.seed, iteration, order.batch_size, self.sizes["train"])
            draw = generator(order.seed, "augment", iteration)
            draws = draw_crops(draw, order.batch_size, augment.pad, augment.flip)
            rows = torch.stack([indices, *draws])[:, order.share]
            yield rows.pin_memory() if device.type == "cuda" else rows

    def batch_maker(self, mean: Tensor, device: torch.device, pad: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function that makes images and labels from draws on the device."""
        train, padded_mean = self._on(device, "train"), pad_and_mirror(mean[None], pad)

        def make(draws: Tensor) -> tuple[Tensor, Tensor]:
            indices, tops, lefts, flips = draws
            images = train.images.index_select(0, indices)  # many times faster than images[indices]
            labels = train.labels.index_select(0, indices)
            return crop_and_normalise(images, padded_mean, tops, lefts, flips.bool(), pad), labels

        return make

    def eval_batches(
        self, split: str, mean: Tensor, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
    ) -> Batches:
        """Every image once, without augmentation. All batches are full: padding of the last has label -1."""
        data = self._on(device, split)
        for start in range(rank * batch_size, len(data), world * batch_size):
            indices = torch.arange(start, start + batch_size, device=device)
            real = indices < len(data)
            indices = indices.clamp(max=len(data) - 1)
            images = normalise(data.images.index_select(0, indices), mean)
            yield images, torch.where(real, data.labels[indices], -1)

    def eval_views(
        self, _: str, split: str, mean: Tensor, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[Views]:
        """`eval_batches`, each image as its only view."""
        return single_views(self.eval_batches(split, mean, device, batch_size, rank, world))

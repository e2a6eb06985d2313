"""Random images in place of a data set, for benchmarks: speed does not depend on their content."""

from __future__ import annotations

import torch

from resnet_train.data.image_set import ImageSet
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.sampler import generator


class SyntheticDataset(MemoryDataset):
    """Random images: 50,000 for training and 10,000 for the test at 32 px, fewer at larger sizes."""

    def __init__(self, *, family: str, size: int) -> None:
        self.classes, self.digest = [str(name) for name in range(1000 if family == "imagenet" else 10)], ""
        self.label = "random images"
        self.sizes = {"train": min(50_000, 50_000 * 32**2 // size**2), "val": 0, "test": 0}
        self.sizes["test"] = self.sizes["train"] // 5
        self.parts = {name: self._part(count, size) for name, count in self.sizes.items()}

    def _part(self, count: int, size: int) -> ImageSet:
        draw = generator(0, "made up", count)
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
        return ImageSet(images, torch.randint(0, len(self.classes), (count,), generator=draw))

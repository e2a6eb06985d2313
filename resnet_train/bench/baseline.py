"""The reference of resnet-bench, a conventional PyTorch training loop.

As in most trainers with torchvision: one PIL image at a time through transforms in DataLoader workers, float32,
contiguous tensors, no compiler, `.item()` in every step.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnet_train.data.decode import FORMATS
from resnet_train.data.image_set import ImageSet
from resnet_train.data.imagefolder import ImageSource

NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """An image set that transforms one PIL image at a time, as torchvision.datasets.CIFAR10."""

    def __init__(self, data: ImageSet, *, train: bool) -> None:
        self.images, self.labels = data.images.cpu().numpy(), data.labels.tolist()
        random = [transforms.RandomCrop(data.images.shape[1], padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*(random if train else []), transforms.ToTensor(), NORMALISE])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class TransformedPhotographs(Dataset[tuple[Tensor, int]]):
    """Photographs with torchvision's transforms for ImageNet, random resized crop and flip, one PIL image at a time."""

    def __init__(self, part: ImageSource, size: int) -> None:
        self.part = part
        random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*random, transforms.ToTensor(), NORMALISE])

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        _, data, label = self.part.read(index)
        return self.transform(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")), label


def loader(data: ImageSet, batch_size: int, device: torch.device, *, train: bool) -> DataLoader:
    """A loader with one worker per core; shuffled and without the incomplete last batch if `train`."""
    return DataLoader(
        TransformedImages(data, train=train),
        batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=os.cpu_count() or 1,
        persistent_workers=train,
        pin_memory=device.type == "cuda",
    )


def endless(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """PyTorch's default for float32 convolutions on a GPU, TF32, which is otherwise switched off in this process."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Trainer:
    """A network with torch.optim.SGD and running sums of loss and accuracy."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.net, self.device = net.to(device), device
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.criterion = nn.CrossEntropyLoss()
        self.loss, self.right = 0.0, 0.0

    def steps(self, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
        """Run `count` iterations."""
        for _ in range(count):
            self.step(*next(batches))

    @defaults()
    def step(self, images: Tensor, labels: Tensor) -> None:
        """One iteration, which waits for loss and accuracy."""
        images, labels = images.to(self.device), labels.to(self.device)
        logits = self.net(images)
        loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._note(logits, labels, loss)

    def _note(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        self.loss += loss.item() * len(labels)
        self.right += (logits.argmax(1) == labels).sum().item()

    @defaults()
    @torch.no_grad()
    def evaluate(self, batches: DataLoader) -> None:
        """One pass in evaluation mode."""
        self.net.eval()
        for images, labels in batches:
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.net(images)
            self._note(logits, labels, self.criterion(logits, labels))
        self.net.train()

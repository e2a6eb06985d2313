"""Photographs in a tree of class folders: listed and read.

A part of a data set is an `ImageSource`; this file has the one for files in folders, packed.py that for packed shards.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.layout import IMAGE_SUFFIXES, class_folders, images_in, is_packed, part_for_test, parts_of
from resnet_train.data.cache import cache_folder, keep
from resnet_train.data.decode import LARGEST_FILE, ImageError, decode
from resnet_train.engine import checkpoint
from resnet_train.errors import RunError, UserError
from resnet_train.files import Unfit, read_regular

LISTERS = 16  # folders that are listed at once: on a file server listing is bound by latency
OUTAGES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN)
SETTLED = 10.0  # seconds: a folder that changed more recently may change again within the same time stamp


class ImageSource(Protocol):
    """Encoded images with labels, in files or shards."""

    blocks: tuple[int, ...]  # the number of images in each shard, in order; empty: each image is a file

    def __len__(self) -> int:
        """The number of images."""

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The name of an image, for errors, the image as it is stored, and its label. Raises UserError."""

    def name(self, index: int) -> str:
        """CLASS/FILE of an image."""

    def part(self, indices: Tensor) -> ImageSource:
        """The images at `indices`, perhaps in another order."""


@dataclass
class ImageSplits:
    """A training and a test part with the names of their classes and a digest of both."""

    train: ImageSource
    test: ImageSource
    classes: list[str]
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)  # files that are not used, counted by kind


def open_image_splits(root: str) -> ImageSplits:
    """Open the data at `root`: a tree of class folders, or a pack, which may be remote. Raises UserError."""
    if is_packed(root):
        from resnet_train.data.packed import open_packed

        return open_packed(root)
    return _open_tree(Path(root))


class Files:
    """Image files below folder/<class>/. Compact: a million of them take 60 MB, which workers share."""

    blocks: tuple[int, ...] = ()

    def __init__(self, folder: Path, classes: list[str], listing: dict[str, Tensor]) -> None:
        """`listing` has the concatenated names, the end of each, sizes in bytes, and labels."""
        self.folder, self.classes = folder, classes
        self.names, self.ends = listing["names"].numpy().tobytes(), listing["ends"].numpy()
        self.sizes, self.labels = listing["sizes"].numpy(), listing["labels"].numpy()
        self.indices = np.arange(len(self.ends))

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, indices: Tensor) -> Files:
        """The files at `indices`, in that order."""
        part = object.__new__(Files)
        part.__dict__.update(self.__dict__, indices=self.indices[indices.numpy()])
        return part

    def entry(self, index: int) -> tuple[str, int, int]:
        """Path, size and label of a file, as listed."""
        position = self.indices[index]
        name = os.fsdecode(self.names[self.ends[position - 1] if position else 0 : self.ends[position]])
        label = int(self.labels[position])
        return os.path.join(self.folder, self.classes[label], name), int(self.sizes[position]), label

    def name(self, index: int) -> str:
        """CLASS/FILE of a file."""
        return os.path.relpath(self.entry(index)[0], self.folder)

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The path, the content and the label of a file. Raises UserError if it is not what was listed."""
        path, size, label = self.entry(index)
        return path, read_file(path, size), label


def read_file(path: str, size: int) -> bytes:
    """The content of a file that was listed with `size` bytes. Raises UserError if its size has changed.

    Raises ImageError if it is not a regular file or too large, and RunError, after which `max_restarts=` restarts, if
    the disk or the file server fails.
    """
    try:
        data = read_regular(path, LARGEST_FILE)
    except Unfit as error:
        raise ImageError(f"{path}: is not an image that can be read ({error.strerror})") from error
    except OSError as error:
        if error.errno in OUTAGES:
            raise RunError(f"{path}: cannot be read ({error.strerror}); the same command resumes") from error
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) != size:
        raise UserError(
            f"{path}: has {len(data)} bytes and had {size} when the tree was listed; touch {os.path.dirname(path)} and"
            " start again"
        )
    return data


def _open_tree(root: Path) -> ImageSplits:
    """Open a train/<class>/*, val/<class>/* tree; the listing is cached until one of its folders changes.

    The test part of an undivided tree, <class>/*, is chosen by `part_for_test`. Without train/ that part is empty.
    """
    classes, test = class_folders(root, train=False)
    here = parts_of(root, test)
    real_path = os.path.realpath(root)
    path = cache_folder() / "listings" / f"{root.name}-{hashlib.sha256(os.fsencode(real_path)).hexdigest()[:16]}.pt"
    folders = [root / part / name for part in here for name in classes]
    stamp, newest = _stamp(folders)
    listing: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # missing, damaged or of another kind: made again
        cached = checkpoint.read(path)
        listing = cached if isinstance(cached, dict) else {}
    if listing.get("stamp") != stamp:
        left_out = Counter[str]()
        if test:
            parts = {part: _list_images([root / part / name for name in classes], left_out) for part in here}
        else:
            parts = _divide(_list_images(folders, left_out), classes)
        digest = hashlib.sha256(repr(classes).encode())
        for part, files in parts.items():
            for label, name, size in files:
                digest.update(os.fsencode(f"{part}/{classes[label]}/{name} {size}\n"))
        listing = {"stamp": stamp, "digest": digest.hexdigest(), "left_out": dict(left_out)}
        listing |= {part: _compact(files) for part, files in parts.items()}
        if _stamp(folders)[0] != stamp:
            raise UserError(f"data.root={root}: changed while it was listed; start again when it is complete")
        if time.time() - newest > SETTLED:
            keep(path, listing)
    tested = Files(root / test, classes, listing[test or "test"])
    train = tested.part(torch.empty(0, dtype=torch.int64))
    if "train" in listing:
        train = Files(root / "train" if test else root, classes, listing["train"])
    return ImageSplits(train, tested, classes, listing["digest"], listing["left_out"])


def _divide(files: list[tuple[int, str, int]], classes: list[str]) -> dict[str, list[tuple[int, str, int]]]:
    """The training and the test part of an undivided tree."""
    names: dict[int, list[str]] = {}
    for label, name, _ in files:
        names.setdefault(label, []).append(name)
    tested = {(label, name) for label, group in names.items() for name in part_for_test(classes[label], group)}
    return {part: [file for file in files if (file[:2] in tested) == (part == "test")] for part in ("train", "test")}


def _stamp(folders: Sequence[Path]) -> tuple[str, float]:
    """A digest that changes when files are added to or removed from `folders`, and the time of the newest change.

    Files that change in place are noticed when they are read, by their size.
    """
    stamp, newest = hashlib.sha256(repr(IMAGE_SUFFIXES).encode()), 0.0
    for folder in folders:
        try:
            status = os.stat(folder)
        except OSError as error:
            raise UserError(f"data.root: {folder}: {error.strerror}") from error
        stamp.update(os.fsencode(f"{folder.parent.name}/{folder.name}"))
        stamp.update(f" {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\n".encode())
        newest = max(newest, status.st_mtime, status.st_ctime)
    return stamp.hexdigest(), newest


def _list_images(folders: list[Path], left_out: Counter[str]) -> list[tuple[int, str, int]]:
    """The label, name and size of every image in `folders`, one per class, in order; other files go to `left_out`."""

    def scan(folder: Path) -> tuple[list[tuple[str, int]], Counter[str]]:
        try:
            images, other = images_in(folder)
            return [(entry.name, entry.stat().st_size) for entry in images], other
        except OSError as error:
            raise UserError(f"data.root: {error.filename}: {error.strerror}") from error

    with ThreadPoolExecutor(LISTERS) as pool:
        bar = tqdm(pool.map(scan, folders), total=len(folders), desc=f"listing {folders[0].parent.name}", disable=None)
        entries = []
        for label, (files, other) in enumerate(bar):
            entries += [(label, name, size) for name, size in files]
            left_out.update(other)
    return entries


def _compact(files: list[tuple[int, str, int]]) -> dict[str, Tensor]:
    names = [os.fsencode(name) for _, name, _ in files]
    return {
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "ends": torch.tensor([len(name) for name in names]).cumsum(0),
        "sizes": torch.tensor([size for _, _, size in files]),
        "labels": torch.tensor([label for label, _, _ in files]),
    }


def image_of(part: ImageSource, index: int) -> tuple[Tensor, int]:
    """An image of a part, decoded at full size, as (3, H, W) uint8, and its label. Raises ImageError and UserError."""
    name, data, label = part.read(index)
    return decode(data, name).permute(2, 0, 1), label

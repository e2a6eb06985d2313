"""Photographs: found in a tree of class folders, read, decoded, and cut.

A part of a data set is a source with `len()`, `read(index)` (name, encoded image, label) and `part(indices)`; this
file has the kind that lies in folders, packed.py the other.
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

from resnet_train.config.layout import IMAGE_SUFFIXES, class_folders, images_in, is_packed, part_for_test
from resnet_train.data.cache import cache_folder, keep
from resnet_train.data.decode import ImageError, decode
from resnet_train.engine import checkpoint
from resnet_train.errors import RunError, UserError
from resnet_train.files import NotRegular, read_regular

LISTERS = 16  # folders that are listed at once: on a file server each waits for its answers
OUTAGES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN)
SETTLED = 10.0  # seconds: a folder that changed less than these ago may change again without a new time


class ImageSource(Protocol):
    """Encoded images with labels, of any kind."""

    blocks: tuple[int, ...]  # how many images, in order, lie together in each shard; empty: each lies by itself

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
    left_out: dict[str, int] = field(default_factory=dict)  # files that are not taken, counted by kind


def open_image_splits(root: str) -> ImageSplits:
    """What lies at `root`: a tree of class folders, or a packed one, which may be remote. Raises UserError."""
    if is_packed(root):
        from resnet_train.data.packed import open_packed

        return open_packed(root)
    return _open_tree(Path(root))


class Files:
    """Image files below folder/<class>/. Compact: a million of them take 60 MB, which workers share."""

    blocks: tuple[int, ...] = ()

    def __init__(self, folder: Path, classes: list[str], found: dict[str, Tensor]) -> None:
        """`found`: the names, one after another, the end of each, sizes in bytes, labels."""
        self.folder, self.classes = folder, classes
        self.names, self.ends = found["names"].numpy().tobytes(), found["ends"].numpy()
        self.sizes, self.labels = found["sizes"].numpy(), found["labels"].numpy()
        self.indices = np.arange(len(self.ends))

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, indices: Tensor) -> Files:
        """The files at `indices`, in that order."""
        chosen = object.__new__(Files)
        chosen.__dict__.update(self.__dict__, indices=self.indices[indices.numpy()])
        return chosen

    def __getitem__(self, index: int) -> tuple[Path, int]:
        """The path and the label of a file."""
        path, _, label = self.entry(index)
        return Path(path), label

    def entry(self, index: int) -> tuple[str, int, int]:
        """Path, size and label of a file, as listed."""
        place = self.indices[index]
        name = os.fsdecode(self.names[self.ends[place - 1] if place else 0 : self.ends[place]])
        label = int(self.labels[place])
        return os.path.join(self.folder, self.classes[label], name), int(self.sizes[place]), label

    def name(self, index: int) -> str:
        """CLASS/FILE of a file."""
        return os.path.relpath(self.entry(index)[0], self.folder)

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The path, the content and the label of a file. Raises UserError if it is not what was listed."""
        path, size, label = self.entry(index)
        return path, read_file(path, size), label


def read_file(path: str, size: int) -> bytes:
    """The content of a file that was listed with `size` bytes. Raises UserError if it is another by now.

    Raises ImageError for what is no file, and RunError where the disk or the file server fails, for which
    `max_restarts=` starts again.
    """
    try:
        data = read_regular(path)
    except NotRegular as error:
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
    """A train/<class>/*, val/<class>/* tree, listed once and then, as long as its folders stay as they are, known.

    Of an undivided tree, <class>/*, `part_for_test` is the test part.
    """
    classes, test = class_folders(root)
    place = os.path.realpath(root)
    listing = cache_folder() / "listings" / f"{root.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.pt"
    folders = [root / part / name for part in (("train", test) if test else ("",)) for name in classes]
    stamp, newest = _stamp(folders)
    found: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # not there yet, or damaged: made again
        found = checkpoint.read(listing)
    if found.get("stamp") != stamp:
        left_out = Counter[str]()
        if test:
            parts = {part: _listed([root / part / name for name in classes], left_out) for part in ("train", test)}
        else:
            parts = _divide(_listed(folders, left_out), classes)
        digest = hashlib.sha256(repr(classes).encode())
        for part, files in parts.items():
            for label, name, size in files:
                digest.update(os.fsencode(f"{part}/{classes[label]}/{name} {size}\n"))
        found = {"stamp": stamp, "digest": digest.hexdigest(), "left_out": dict(left_out)}
        found |= {part: _compact(files) for part, files in parts.items()}
        if _stamp(folders)[0] != stamp:
            raise UserError(f"data.root={root}: changed while it was listed; start again when it is complete")
        if time.time() - newest > SETTLED:
            keep(listing, found)
    train, tested = (Files(root / part if test else root, classes, found[part]) for part in ("train", test or "test"))
    return ImageSplits(train, tested, classes, found["digest"], found["left_out"])


def _divide(files: list[tuple[int, str, int]], classes: list[str]) -> dict[str, list[tuple[int, str, int]]]:
    """The training and the test part of an undivided tree."""
    names: dict[int, list[str]] = {}
    for label, name, _ in files:
        names.setdefault(label, []).append(name)
    tested = {(label, name) for label, found in names.items() for name in part_for_test(classes[label], found)}
    return {part: [file for file in files if (file[:2] in tested) == (part == "test")] for part in ("train", "test")}


def _stamp(folders: Sequence[Path]) -> tuple[str, float]:
    """What changes when a file comes into one of `folders` or leaves it, or the folder is another; the newest change.

    Contents that change in place show when they are read: by their size.
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


def _listed(folders: list[Path], left_out: Counter[str]) -> list[tuple[int, str, int]]:
    """The label, name and size of every image in `folders`, one for each class, in order. Counts in `left_out`."""

    def one(folder: Path) -> tuple[list[tuple[str, int]], Counter[str]]:
        try:
            entries, other = images_in(folder)
            return [(entry.name, entry.stat().st_size) for entry in entries], other
        except OSError as error:
            raise UserError(f"data.root: {error.filename}: {error.strerror}") from error

    with ThreadPoolExecutor(LISTERS) as pool:
        bar = tqdm(pool.map(one, folders), total=len(folders), desc=f"listing {folders[0].parent.name}", disable=None)
        found = []
        for label, (files, other) in enumerate(bar):
            found += [(label, name, size) for name, size in files]
            left_out.update(other)
    return found


def _compact(files: list[tuple[int, str, int]]) -> dict[str, Tensor]:
    names = [os.fsencode(name) for _, name, _ in files]
    return {
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "ends": torch.tensor([len(name) for name in names]).cumsum(0),
        "sizes": torch.tensor([size for _, _, size in files]),
        "labels": torch.tensor([label for label, _, _ in files]),
    }


def image_of(part: ImageSource, index: int) -> tuple[Tensor, int]:
    """An image of a part, whole and exact, as (3, H, W) uint8, and its label. Raises ImageError and UserError."""
    name, data, label = part.read(index)
    return decode(data, name).permute(2, 0, 1), label

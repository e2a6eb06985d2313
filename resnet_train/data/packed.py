"""Packed photographs of `resnet-pack`: JPEG shards in litdata's format, local or in object storage.

A pack has train/ and val/ (or test/), each with litdata's index.json and shards, and pack.json, written last, with
class names and the size and checksum of each shard. litdata can read the two folders; here images are read with pread
at the offsets in the shards' tables, in the order of our own sampler.
"""

from __future__ import annotations

import functools
import os
import struct
import weakref
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_train.data.fetch import local_folder
from resnet_train.data.imagefolder import ImageSplits
from resnet_train.data.pack_schema import LEAST, PackPart, check_shard, count_items, read_about
from resnet_train.data.sampler import generator
from resnet_train.errors import UserError

OPEN = 64  # shards that a process keeps open


def stored_order(part: str, count: int) -> Tensor:
    """The order in which the images of a listing are packed: training images are shuffled, with a fixed seed.

    A shard is thus a random sample of the training set, and a few shards together have all classes.
    """
    return torch.randperm(count, generator=generator(0, "pack", count)) if part == "train" else torch.arange(count)


class Shard:
    """An open shard, with a table of the offsets of its images."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file with an invalid table."""
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self.file)
        size, count = os.fstat(self.file).st_size, count_items(self.file)
        start = 4 * count + 8  # of the first image, after the table
        table = os.pread(self.file, start - 4, 4) if start <= size else b""
        self.ends = np.frombuffer(table, dtype="<u4")
        whole = len(self.ends) == count + 1 and self.ends[0] == start and self.ends[-1] == size
        if not whole or not (np.diff(self.ends.astype(np.int64)) > LEAST - 4).all():
            raise UserError(f"{path}: is cut short or damaged; pack it again")
        if hasattr(os, "posix_fadvise"):  # all of it will be read, in random order
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_WILLNEED)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def item(self, position: int) -> tuple[str, bytes, int]:
        """Name, encoded image and label of an item, which begins with the three sizes. Raises UserError."""
        start, end = int(self.ends[position]), int(self.ends[position + 1])
        record = os.pread(self.file, end - start, start)
        image, label, name = struct.unpack_from("<III", record) if len(record) == end - start else (0, 0, 0)
        if label != 8 or 12 + image + label + name != end - start:
            raise UserError(f"{self.path}: is damaged at its image {position}; pack it again")
        number = struct.unpack_from("<q", record, 12 + image)[0]
        return f"{self.path}: {record[20 + image :].decode(errors='replace')}", record[12 : 12 + image], number

    def name(self, position: int) -> str:
        """The name of an image, without reading the image."""
        start, end = int(self.ends[position]), int(self.ends[position + 1])
        image, label, name = struct.unpack("<III", os.pread(self.file, 12, start))
        return os.pread(self.file, min(name, end - start), start + 12 + image + label).decode(errors="replace")


open_shard = functools.lru_cache(maxsize=OPEN)(Shard)


class Shards:
    """The images of one part of a packed folder, in the order in which they are stored."""

    def __init__(
        self, paths: list[Path], counts: list[int], classes: int, listed: Tensor, chosen: Tensor | None = None
    ) -> None:
        """`listed`: the place of each stored image in the listing. `chosen`: indices of stored images, default all."""
        self.paths, self.counts, self.classes, self.listed = paths, counts, classes, listed
        self.firsts = list(accumulate(counts, initial=0))
        self.stored = torch.arange(len(listed)) if chosen is None else chosen
        shards = torch.searchsorted(torch.tensor(self.firsts), self.stored, right=True)
        self.blocks = tuple(Counter(shards.tolist()).values())

    def __len__(self) -> int:
        return len(self.stored)

    def part(self, indices: Tensor) -> Shards:
        """The images at `indices` of the original listing, the same as for the tree that was packed."""
        mask = torch.zeros(len(self.listed), dtype=torch.bool)
        mask[indices] = True
        return Shards(self.paths, self.counts, self.classes, self.listed, mask[self.listed].nonzero().flatten())

    def _where(self, index: int) -> tuple[Shard, int]:
        """The shard of an image, and its place there."""
        position = int(self.stored[index])
        number = bisect_right(self.firsts, position) - 1
        return open_shard(self.paths[number]), position - self.firsts[number]

    def name(self, index: int) -> str:
        """CLASS/FILE of an image, as it was packed."""
        shard, position = self._where(index)
        return shard.name(position)

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The name, the content and the label of an image. Raises UserError."""
        shard, position = self._where(index)
        name, data, label = shard.item(position)
        check_label(name, label, self.classes)
        return name, data, label


def open_packed(root: str) -> ImageSplits:
    """Open the parts of a pack; a remote one is downloaded first. Raises UserError."""
    folder = local_folder(root)
    pack = read_about(folder)
    parts = {}
    for name, part in pack.parts.items():
        paths = [folder / name / shard.name for shard in part.shards]
        for path, shard in zip(paths, part.shards, strict=True):
            check_shard(path, shard)
        # Allocate memory for the order only once the shards have as many images as pack.json declares.
        counts = [shard.images for shard in part.shards]
        parts[name] = Shards(paths, counts, len(pack.classes), _listing_positions(name, part))
    return ImageSplits(parts["train"], parts[pack.test], pack.classes, pack.digest)


def _listing_positions(name: str, part: PackPart) -> Tensor:
    """The place of each stored image in the listing without the skipped ones."""
    stored = torch.ones(part.listed, dtype=torch.bool)
    stored[torch.tensor(part.skipped, dtype=torch.int64)] = False
    order = stored_order(name, part.listed)
    return (stored.cumsum(0) - 1)[order[stored[order]]]


def check_label(name: str, label: int, classes: int) -> None:
    """Raises UserError for a label that is not the index of a class."""
    if not 0 <= label < classes:
        raise UserError(f"{name}: there is no class {label}; pack it again")

"""Packed photographs, as `resnet-pack` writes them: JPEG shards in litdata's format, here or on object storage.

A packed folder holds train/ and val/ (or test/), each with litdata's index.json and shards, and, written last of all,
pack.json: class names, and the size and the checksum of each shard. litdata reads the two folders as they are; here
they are read with positioned reads of what the shards' own tables say, so that the order is ours.
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

from resnet_train.data.fetch import located
from resnet_train.data.imagefolder import ImageSplits
from resnet_train.data.pack_schema import LEAST, PackPart, check_shard, count_items, read_about
from resnet_train.data.sampler import generator
from resnet_train.errors import UserError

OPEN = 64  # shards that a process keeps open


def stored_order(part: str, count: int) -> Tensor:
    """In which order the images of a listing are packed: training images shuffled once and for all, others as listed.

    A shard is then a sample of the whole training set, and a few shards together hold all classes.
    """
    return torch.randperm(count, generator=generator(0, "pack", count)) if part == "train" else torch.arange(count)


class Shard:
    """One open shard: its table says where each image begins."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file whose table cannot be."""
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self.file)
        size, count = os.fstat(self.file).st_size, count_items(self.file)
        start = 4 * count + 8  # of the first image, behind the table
        table = os.pread(self.file, start - 4, 4) if start <= size else b""
        self.ends = np.frombuffer(table, dtype="<u4")
        whole = len(self.ends) == count + 1 and self.ends[0] == start and self.ends[-1] == size
        if not whole or not (np.diff(self.ends.astype(np.int64)) > LEAST - 4).all():
            raise UserError(f"{path}: is cut short or damaged; pack it again")
        if hasattr(os, "posix_fadvise"):  # all of it will be read, in another order
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_WILLNEED)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def item(self, place: int) -> tuple[str, bytes, int]:
        """Name, encoded image and label, which lie there after their three sizes. Raises UserError."""
        start, end = int(self.ends[place]), int(self.ends[place + 1])
        found = os.pread(self.file, end - start, start)
        image, label, name = struct.unpack_from("<III", found) if len(found) == end - start else (0, 0, 0)
        if label != 8 or 12 + image + label + name != end - start:
            raise UserError(f"{self.path}: is damaged at its image {place}; pack it again")
        number = struct.unpack_from("<q", found, 12 + image)[0]
        return f"{self.path}: {found[20 + image :].decode(errors='replace')}", found[12 : 12 + image], number

    def name(self, place: int) -> str:
        """The name of an image alone."""
        start, end = int(self.ends[place]), int(self.ends[place + 1])
        image, label, name = struct.unpack("<III", os.pread(self.file, 12, start))
        return os.pread(self.file, min(name, end - start), start + 12 + image + label).decode(errors="replace")


open_shard = functools.lru_cache(maxsize=OPEN)(Shard)


class Shards:
    """The images of one part of a packed folder, in the order in which they are stored."""

    def __init__(
        self, paths: list[Path], counts: list[int], classes: int, listed: Tensor, chosen: Tensor | None = None
    ) -> None:
        """`listed`: the place in the original listing of each stored image. `chosen`: which of the stored these are."""
        self.paths, self.counts, self.classes, self.listed = paths, counts, classes, listed
        self.firsts = list(accumulate(counts, initial=0))
        self.stored = torch.arange(len(listed)) if chosen is None else chosen
        shards = torch.searchsorted(torch.tensor(self.firsts), self.stored, right=True)
        self.blocks = tuple(Counter(shards.tolist()).values())

    def __len__(self) -> int:
        return len(self.stored)

    def part(self, indices: Tensor) -> Shards:
        """The images at `indices` of the original listing: the same as of the tree that was packed."""
        wanted = torch.zeros(len(self.listed), dtype=torch.bool)
        wanted[indices] = True
        return Shards(self.paths, self.counts, self.classes, self.listed, wanted[self.listed].nonzero().flatten())

    def _where(self, index: int) -> tuple[Shard, int]:
        """The shard of an image, and its place there."""
        place = int(self.stored[index])
        number = bisect_right(self.firsts, place) - 1
        return open_shard(self.paths[number]), place - self.firsts[number]

    def name(self, index: int) -> str:
        """CLASS/FILE of an image, as it was packed."""
        shard, place = self._where(index)
        return shard.name(place)

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The name, the content and the label of an image. Raises UserError."""
        shard, place = self._where(index)
        name, data, label = shard.item(place)
        check_label(name, label, self.classes)
        return name, data, label


def open_packed(root: str) -> ImageSplits:
    """The parts of a packed folder; of one elsewhere, once its shards are all here. Raises UserError."""
    folder = located(root)
    pack = read_about(folder)
    parts = {}
    for name, part in pack.parts.items():
        paths = [folder / name / shard.name for shard in part.shards]
        for path, shard in zip(paths, part.shards, strict=True):
            check_shard(path, shard)
        # Only now, when there are as many images as pack.json says, is memory taken for their order.
        counts = [shard.images for shard in part.shards]
        parts[name] = Shards(paths, counts, len(pack.classes), _listed(name, part))
    return ImageSplits(parts["train"], parts[pack.test], pack.classes, pack.digest)


def _listed(name: str, part: PackPart) -> Tensor:
    """The place of each stored image in the listing without those that were skipped."""
    kept = torch.ones(part.listed, dtype=torch.bool)
    kept[torch.tensor(part.skipped, dtype=torch.int64)] = False
    order = stored_order(name, part.listed)
    return (kept.cumsum(0) - 1)[order[kept[order]]]


def check_label(name: str, label: int, classes: int) -> None:
    """Refuse the label of an image that is of no class. Raises UserError."""
    if not 0 <= label < classes:
        raise UserError(f"{name}: there is no class {label}; pack it again")

"""Packed photographs, as `resnet-pack` writes them: JPEG shards in litdata's format, here or on object storage.

A packed folder holds train/ and val/ (or test/), each with litdata's index.json and shards, and, written last of all,
pack.json: class names, and the size and the checksum of each shard. litdata reads the two folders as they are; here
they are read with positioned reads of what the shards' own tables say, so that the order is ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import stat
import struct
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.keys import Quality, Range, ShardImages, ShorterSide
from resnet_train.config.layout import PACKED, is_remote
from resnet_train.config.schema import format_value, from_dict
from resnet_train.data.cache import cache_folder
from resnet_train.data.imagefolder import ImageSplits
from resnet_train.data.sampler import generator
from resnet_train.errors import RunError, UserError
from resnet_train.files import read_json

FORMAT = 1
OPEN = 64  # shards that a process keeps open
DOWNLOADS = 8  # shards that are fetched at once
LARGEST = 2**32 - 1  # bytes of a shard: its table says in 4 bytes where an image ends
LEAST = 24  # bytes of an image in a shard: 4 of the table, three sizes, the label
Number = Annotated[int, Range(0, 2**48)]


@dataclasses.dataclass(frozen=True)
class PackShard:
    """A shard as pack.json has it."""

    name: str
    images: ShardImages
    bytes: Annotated[int, Range(1, LARGEST)]
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackPart:
    """A part as pack.json has it: images stored, images of the tree's listing, and which of these were left out."""

    images: Number
    listed: Number
    skipped: list[Number]
    shards: list[PackShard]


@dataclasses.dataclass(frozen=True)
class PackSource:
    """The tree that was packed."""

    name: str
    digest: str


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """What a pack depends on: packing/settings.json, and the beginning of pack.json."""

    format: Annotated[int, Range(FORMAT, FORMAT)]
    source: PackSource
    shorter_side: ShorterSide
    quality: Quality
    images: ShardImages  # of a whole shard
    broken: Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Pack(PackSettings):
    """The content of pack.json."""

    classes: list[str]
    test: Literal["test", "val"]
    digest: str
    parts: dict[str, PackPart]

    def __post_init__(self) -> None:
        """Raises UserError where one value contradicts another."""
        check_classes(self.classes)
        if list(self.parts) != ["train", self.test]:
            raise UserError(f"parts: are {format_value(', '.join(self.parts))} and must be train, {self.test}")
        for part, about in self.parts.items():
            _check_part(f"parts.{part}", about, self.images)
        if self.digest != digest_of(self.classes, self.parts):
            raise UserError(f"digest={format_value(self.digest)}: is not that of the classes and the shards")


def check_classes(names: list[str]) -> None:
    """Refuse names of classes that no pack may have. Raises UserError."""
    if len(set(names)) < max(2, len(names)):
        raise UserError("classes: must be two or more different names")
    for name in names:
        if not name.strip() or re.search("[\ud800-\udfff]", name):  # of a folder whose name is not UTF-8
            raise UserError(f"classes={name!r}: must be a name in UTF-8 that is not blank")


def _check_part(key: str, part: PackPart, images: int) -> None:
    names, sizes = [shard.name for shard in part.shards], [shard.images for shard in part.shards]
    numbers = [re.fullmatch(r"chunk-0-(0|[1-9]\d{0,8})\.bin", name, re.ASCII) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            raise UserError(f"{key}.shards.name={format_value(name)}: must be chunk-0-NUMBER.bin")
    for (one, first), (other, second) in itertools.pairwise(zip(names, numbers, strict=True)):
        if int(first[1]) >= int(second[1]):  # type: ignore[index]
            raise UserError(f"{key}.shards.name={other}: comes after {one}")
    for shard in part.shards:
        if shard.images > images or 8 + LEAST * shard.images > shard.bytes:
            raise UserError(f"{key}.shards.images={shard.images}: are too many for {shard.name}")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise UserError(f"{key}.shards.sha256={format_value(shard.sha256)}: must be 64 digits of 0 to 9 and a to f")
    if not 0 < part.images == sum(sizes):
        raise UserError(f"{key}.images={part.images}: must be the {sum(sizes)} of its shards, and one at least")
    if part.listed != part.images + len(part.skipped):
        raise UserError(f"{key}.listed={part.listed}: must be {part.images} stored and {len(part.skipped)} skipped")
    if any(one >= other for one, other in itertools.pairwise([*part.skipped, part.listed])):
        raise UserError(f"{key}.skipped: must rise, and stay below {part.listed}")


def shard_name(number: int) -> str:
    """As litdata names the shards of one writer."""
    return f"chunk-0-{number}.bin"


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
        size, count = os.fstat(self.file).st_size, _count(self.file)
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


def _count(file: int) -> int:
    """How many images a shard says that it holds."""
    return struct.unpack("<I", os.pread(file, 4, 0).ljust(4, b"\0"))[0]


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

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The name, the content and the label of an image. Raises UserError."""
        place = int(self.stored[index])
        number = bisect_right(self.firsts, place) - 1
        name, data, label = open_shard(self.paths[number]).item(place - self.firsts[number])
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


def located(root: str) -> Path:
    """Where a packed folder lies on this machine, once it is here. Raises UserError."""
    if not is_remote(root):
        return Path(root)
    if find_spec("litdata") is None:
        raise UserError(f"data.root={root}: needs litdata: pip install 'resnet-train[streaming]'")
    if root.startswith("local:"):
        return _fetched(root.rstrip("/"))
    # The clients of object storage have threads, which do not survive the fork of this process into workers.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_fetched, root.rstrip("/")).result()
        except BrokenProcessPool as error:
            raise RunError("the process that fetched the shards was killed; the same command resumes") from error


def _listed(name: str, part: PackPart) -> Tensor:
    """The place of each stored image in the listing without those that were skipped."""
    kept = torch.ones(part.listed, dtype=torch.bool)
    kept[torch.tensor(part.skipped, dtype=torch.int64)] = False
    order = stored_order(name, part.listed)
    return (kept.cumsum(0) - 1)[order[kept[order]]]


def read_about(folder: Path) -> Pack:
    """The content of pack.json. Raises UserError."""
    path = folder / PACKED
    try:
        found = read_json(path)
        if isinstance(found.get("format"), int) and found["format"] != FORMAT:
            raise UserError(
                f"{folder}: is packed in format {format_value(found['format'])}; this version reads {FORMAT}"
            )
        try:
            return from_dict(Pack, found)
        except UserError as error:
            raise UserError(f"{path}: is damaged ({error}); pack it again") from error
    except OSError as error:
        raise UserError(f"{folder}: is no whole packed folder ({PACKED}: {error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); pack it again") from error


def check_shard(path: Path, shard: PackShard) -> None:
    """Refuse a file that is not as long as its shard should be, or has a table for other images. Raises UserError."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size == shard.bytes:
            with path.open("rb", buffering=0) as file:
                count = _count(file.fileno())
            if count == shard.images:
                return
            raise UserError(f"{path}: holds {count} images and should {shard.images}; pack it again")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it belongs to a packed folder, which is not whole") from error
    raise UserError(f"{path}: is cut short or damaged ({found.st_size} bytes of {shard.bytes}); pack it again")


def check_label(name: str, label: int, classes: int) -> None:
    """Refuse the label of an image that is of no class. Raises UserError."""
    if not 0 <= label < classes:
        raise UserError(f"{name}: there is no class {label}; pack it again")


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(classes: list[str], parts: dict[str, PackPart]) -> str:
    """The digest of a packed set: of its class names and of the checksums of its shards."""
    digest = hashlib.sha256(repr(classes).encode())
    for part in parts.values():
        for shard in part.shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()


# --- Elsewhere -------------------------------------------------------------------------------------------------------


def _fetched(url: str) -> Path:
    """The local copy of a packed folder at `url`, with all shards, each checked as it came. Raises UserError.

    Every machine holds all shards: the order of the images is that of the whole set. One process of a machine
    fetches, the others wait; what is there already stays.
    """
    fetch = _downloader(url)
    folder = cache_folder() / "packed" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / PACKED).unlink(missing_ok=True)  # it may be another there by now
            fetch(f"{url}/{PACKED}", folder / PACKED)
            pack = read_about(folder)
            missing = [
                (f"{name}/{shard.name}", shard)
                for name, part in pack.parts.items()
                for shard in part.shards
                if not _is_there(folder / name / shard.name, shard)
            ]

            def one(item: tuple[str, PackShard]) -> int:
                name, shard = item
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                part = path.with_name(f"{path.name}.part")
                part.unlink(missing_ok=True)
                fetch(f"{url}/{name}", part)
                if part.stat().st_size != shard.bytes or checksum(part) != shard.sha256:
                    raise UserError(f"data.root={url}: {name} is not what {PACKED} says; pack or copy it again")
                part.replace(path)
                path.with_name(f"{path.name}.sha256").write_text(shard.sha256)
                return shard.bytes

            size = sum(shard.bytes for _, shard in missing)
            bar = tqdm(total=size, unit="B", unit_scale=True, desc="fetching shards", disable=None)
            with ThreadPoolExecutor(DOWNLOADS) as pool, bar:
                for done in pool.map(one, missing):
                    bar.update(done)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set RESNET_TRAIN_DATA to where there is room") from error
    return folder


def _is_there(path: Path, shard: PackShard) -> bool:
    note = path.with_name(f"{path.name}.sha256")
    whole = path.is_file() and path.stat().st_size == shard.bytes
    return whole and note.is_file() and note.read_bytes() == shard.sha256.encode()


def _downloader(url: str) -> Callable[[str, Path], None]:
    """litdata's way to fetch a file from such a URL. Raises UserError."""
    from litdata.streaming.downloader import get_downloader

    client = get_downloader(url, str(cache_folder()), [])

    def fetch(source: str, path: Path) -> None:
        try:
            client.download_file(source, str(path))
        except Exception as error:  # of any of the clients
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"data.root={url}: {source} cannot be fetched ({reason})") from error
        if not path.is_file():
            raise UserError(f"data.root={url}: {source} cannot be fetched; it may be locked by another process")
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.lock").unlink()

    return fetch

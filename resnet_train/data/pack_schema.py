"""The content of pack.json, checked, and the checksums of the shards."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import stat
import struct
from pathlib import Path
from typing import Annotated, Literal

from resnet_train.config.keys import Quality, Range, ShardImages, ShorterSide
from resnet_train.config.layout import PACKED
from resnet_train.config.schema import format_value, from_dict
from resnet_train.errors import UserError
from resnet_train.files import read_json

FORMAT = 1
Number = Annotated[int, Range(0, 2**48)]
LARGEST = 2**32 - 1  # bytes of a shard: its table has offsets of 4 bytes
LEAST = 24  # bytes of an image in a shard without data: 4 in the table, three sizes, the label


@dataclasses.dataclass(frozen=True)
class PackShard:
    """A shard in pack.json."""

    name: str
    images: ShardImages
    bytes: Annotated[int, Range(1, LARGEST)]
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackPart:
    """A part in pack.json: the number of stored images, of images in the tree's listing, and the skipped ones."""

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
    """The settings of a pack: packing/settings.json, and the first keys of pack.json."""

    format: Annotated[int, Range(FORMAT, FORMAT)]
    source: PackSource
    shorter_side: ShorterSide
    quality: Quality
    images: ShardImages  # per full shard
    broken: Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Pack(PackSettings):
    """The content of pack.json."""

    classes: list[str]
    test: Literal["test", "val"]
    digest: str
    parts: dict[str, PackPart]

    def __post_init__(self) -> None:
        """Raises UserError if values contradict each other."""
        check_classes(self.classes)
        if list(self.parts) != ["train", self.test]:
            raise UserError(f"parts: are {format_value(', '.join(self.parts))} and must be train, {self.test}")
        for part, about in self.parts.items():
            _check_part(f"parts.{part}", about, self.images)
        if self.digest != digest_of(self.classes, self.parts):
            raise UserError(f"digest={format_value(self.digest)}: is not that of the classes and the shards")


def check_classes(names: list[str]) -> None:
    """Raises UserError for names of classes that are not allowed in a pack."""
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
    for (previous, first), (current, second) in itertools.pairwise(zip(names, numbers, strict=True)):
        if int(first[1]) >= int(second[1]):  # type: ignore[index]
            raise UserError(f"{key}.shards.name={current}: comes after {previous}")
    for shard in part.shards:
        if shard.images > images or 8 + LEAST * shard.images > shard.bytes:
            raise UserError(f"{key}.shards.images={shard.images}: are too many for {shard.name}")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise UserError(f"{key}.shards.sha256={format_value(shard.sha256)}: must be 64 digits of 0 to 9 and a to f")
    if not 0 < part.images == sum(sizes):
        raise UserError(f"{key}.images={part.images}: must be the {sum(sizes)} of its shards, and one at least")
    if part.listed != part.images + len(part.skipped):
        raise UserError(f"{key}.listed={part.listed}: must be {part.images} stored and {len(part.skipped)} skipped")
    if any(previous >= current for previous, current in itertools.pairwise([*part.skipped, part.listed])):
        raise UserError(f"{key}.skipped: must rise, and stay below {part.listed}")


def shard_name(number: int) -> str:
    """The name of a shard, as litdata's writer gives it."""
    return f"chunk-0-{number}.bin"


def read_about(folder: Path) -> Pack:
    """The content of pack.json. Raises UserError."""
    path = folder / PACKED
    try:
        content = read_json(path)
        if isinstance(content.get("format"), int) and content["format"] != FORMAT:
            raise UserError(
                f"{folder}: is packed in format {format_value(content['format'])}; this version reads {FORMAT}"
            )
        try:
            return from_dict(Pack, content)
        except UserError as error:
            raise UserError(f"{path}: is damaged ({error}); pack it again") from error
    except OSError as error:
        raise UserError(f"{folder}: is not a complete packed folder ({PACKED}: {error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); pack it again") from error


def check_shard(path: Path, shard: PackShard) -> None:
    """Raises UserError for a file whose size or number of images is not that of `shard`."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size == shard.bytes:
            with path.open("rb", buffering=0) as file:
                count = count_items(file.fileno())
            if count == shard.images:
                return
            raise UserError(f"{path}: holds {count} images and should {shard.images}; pack it again")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the packed folder is incomplete") from error
    raise UserError(f"{path}: is cut short or damaged ({status.st_size} bytes of {shard.bytes}); pack it again")


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(classes: list[str], parts: dict[str, PackPart]) -> str:
    """The digest of a pack, over its class names and the checksums of its shards."""
    digest = hashlib.sha256(repr(classes).encode())
    for part in parts.values():
        for shard in part.shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()


def count_items(file: int) -> int:
    """The number of images that a shard declares."""
    return struct.unpack("<I", os.pread(file, 4, 0).ljust(4, b"\0"))[0]

"""Packed photographs, as `resnet-pack` writes them: JPEG shards in litdata's format, here or on object storage.

A packed folder holds train/ and val/ (or test/), each with litdata's index.json and shards, and, written last of all,
pack.json: class names, and the size and the checksum of each shard. litdata reads the two folders as they are; here
they are read with positioned reads of what the shards' own tables say, so that the order is ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.data.images import cache_folder
from resnet_train.data.photographs import Photographs
from resnet_train.data.places import PACKED, is_remote
from resnet_train.data.sampler import generator
from resnet_train.errors import RunError, UserError

FORMAT = 1
OPEN = 64  # shards that a process keeps open
DOWNLOADS = 8  # shards that are fetched at once


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
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        count = struct.unpack("<I", os.pread(self.file, 4, 0).ljust(4, b"\0"))[0]
        table = os.pread(self.file, 4 * count + 4, 4)
        self.ends = np.frombuffer(table[: len(table) // 4 * 4], dtype="<u4")
        rises = len(self.ends) == count + 1 and (np.diff(self.ends.astype(np.int64)) > 12).all()
        if not rises or self.ends[-1] != os.fstat(self.file).st_size:
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


open_shard = functools.lru_cache(maxsize=OPEN)(Shard)


class Shards:
    """The images of one part of a packed folder, in the order in which they are stored."""

    def __init__(self, paths: list[Path], counts: list[int], listed: Tensor, chosen: Tensor | None = None) -> None:
        """`listed`: the place in the original listing of each stored image. `chosen`: which of the stored these are."""
        self.paths, self.counts, self.listed = paths, counts, listed
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
        return Shards(self.paths, self.counts, self.listed, wanted[self.listed].nonzero().flatten())

    def read(self, index: int) -> tuple[str, bytes, int]:
        """The name, the content and the label of an image. Raises UserError."""
        place = int(self.stored[index])
        number = bisect_right(self.firsts, place) - 1
        return open_shard(self.paths[number]).item(place - self.firsts[number])


def open_packed(root: str) -> Photographs:
    """The parts of a packed folder; of one elsewhere, once its shards are all here. Raises UserError."""
    folder = located(root)
    about = read_about(folder)
    parts = {}
    for part in ("train", about["test"]):
        told = about["parts"][part]
        paths = [folder / part / shard["name"] for shard in told["shards"]]
        for path, shard in zip(paths, told["shards"], strict=True):
            check_size(path, shard["bytes"])
        parts[part] = Shards(paths, [shard["images"] for shard in told["shards"]], _listed(part, told))
    return Photographs(parts["train"], parts[about["test"]], about["classes"], about["digest"])


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
            raise RunError("the process that fetched the shards was killed; the same command goes on") from error


def _listed(part: str, told: dict[str, Any]) -> Tensor:
    """The place of each stored image in the listing without those that were skipped."""
    kept = torch.ones(told["listed"], dtype=torch.bool)
    kept[torch.tensor(told["skipped"], dtype=torch.int64)] = False
    order = stored_order(part, told["listed"])
    return (kept.cumsum(0) - 1)[order[kept[order]]]


def read_about(folder: Path) -> dict[str, Any]:
    """The content of pack.json. Raises UserError."""
    try:
        about = json.loads((folder / PACKED).read_text())
        if about["format"] != FORMAT:
            raise UserError(f"{folder}: is packed in format {about['format']}; this version reads {FORMAT}")
        names = {*about["parts"], *(shard["name"] for told in about["parts"].values() for shard in told["shards"])}
        if not all(re.fullmatch(r"train|test|val|chunk-0-\d+\.bin", name) for name in names):
            raise ValueError("a name that would lie elsewhere")
        return about
    except OSError as error:
        raise UserError(f"{folder}: is no whole packed folder ({PACKED}: {error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / PACKED}: is damaged; pack it again") from error


def check_size(path: Path, size: int) -> None:
    """Refuse a shard that is not as long as it should be. Raises UserError."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it belongs to a packed folder, which is not whole") from error
    if found != size:
        raise UserError(f"{path}: is cut short or damaged ({found} bytes of {size}); pack it again")


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(classes: list[str], parts: dict[str, Any]) -> str:
    """The digest of a packed set: of its class names and of the checksums of its shards."""
    digest = hashlib.sha256(repr(classes).encode())
    for told in parts.values():
        for shard in told["shards"]:
            digest.update(shard["sha256"].encode())
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
            about = read_about(folder)
            missing = [
                (f"{part}/{shard['name']}", shard)
                for part, told in about["parts"].items()
                for shard in told["shards"]
                if not _is_there(folder / part / shard["name"], shard)
            ]

            def one(item: tuple[str, dict[str, Any]]) -> int:
                name, shard = item
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                part = path.with_name(f"{path.name}.part")
                part.unlink(missing_ok=True)
                fetch(f"{url}/{name}", part)
                if checksum(part) != shard["sha256"]:
                    raise UserError(f"data.root={url}: {name} is not what {PACKED} says; pack or copy it again")
                part.replace(path)
                path.with_name(f"{path.name}.sha256").write_text(shard["sha256"])
                return shard["bytes"]

            size = sum(shard["bytes"] for _, shard in missing)
            bar = tqdm(total=size, unit="B", unit_scale=True, desc="fetching shards", disable=None)
            with ThreadPoolExecutor(DOWNLOADS) as pool, bar:
                for done in pool.map(one, missing):
                    bar.update(done)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set RESNET_TRAIN_DATA to where there is room") from error
    return folder


def _is_there(path: Path, shard: dict[str, Any]) -> bool:
    note = path.with_name(f"{path.name}.sha256")
    whole = path.is_file() and path.stat().st_size == shard["bytes"]
    return whole and note.is_file() and note.read_text() == shard["sha256"]


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

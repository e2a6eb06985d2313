"""Packs in object storage, brought to this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from resnet_train.config.layout import PACKED, is_remote
from resnet_train.data.cache import cache_folder
from resnet_train.data.pack_schema import PackShard, checksum, read_about
from resnet_train.errors import RunError, UserError

DOWNLOADS = 8  # shards that are fetched at once


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

"""Downloading of packs from object storage."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from resnet_train.config.layout import PACKED, is_remote
from resnet_train.data.cache import cache_folder
from resnet_train.data.pack_schema import PackShard, checksum, read_about
from resnet_train.data.pool import work_in_processes
from resnet_train.errors import UserError

DOWNLOADS = 8  # shards that are fetched at once


def local_folder(root: str) -> Path:
    """The local folder of a pack; a remote one is downloaded first. Raises UserError."""
    if not is_remote(root):
        return Path(root)
    if find_spec("litdata") is None:
        raise UserError(f"data.root={root}: needs litdata: pip install 'resnet-train[streaming]'")
    if root.startswith("local:"):
        return _fetch_pack(root.rstrip("/"))
    # The clients of object storage start threads, which do not survive a fork into workers: use another process.
    ((_, folder),) = work_in_processes(_fetch_pack, [root.rstrip("/")], workers=1)
    return folder


def _fetch_pack(url: str) -> Path:
    """Download the pack at `url` with all shards, verifying each; return the local folder. Raises UserError.

    Every machine needs all shards, since images are shuffled across the whole set. One process per machine downloads
    while the others wait; shards that are already there are kept.
    """
    fetch = _downloader(url)
    folder = cache_folder() / "packed" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fresh = folder / f"{PACKED}.part"  # the remote one may have changed; others read the old one meanwhile
            fresh.unlink(missing_ok=True)
            fetch(f"{url}/{PACKED}", fresh)
            fresh.replace(folder / PACKED)
            pack = read_about(folder)
            missing = [
                (f"{name}/{shard.name}", shard)
                for name, part in pack.parts.items()
                for shard in part.shards
                if not _is_complete(folder / name / shard.name, shard)
            ]

            def fetch_shard(item: tuple[str, PackShard]) -> int:
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

            total = sum(shard.bytes for _, shard in missing)
            bar = tqdm(total=total, unit="B", unit_scale=True, desc="fetching shards", disable=None)
            with ThreadPoolExecutor(DOWNLOADS) as pool, bar:
                for size in pool.map(fetch_shard, missing):
                    bar.update(size)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set RESNET_TRAIN_DATA to a folder with more room") from error
    return folder


def _is_complete(path: Path, shard: PackShard) -> bool:
    note = path.with_name(f"{path.name}.sha256")
    whole = path.is_file() and path.stat().st_size == shard.bytes
    return whole and note.is_file() and note.read_bytes() == shard.sha256.encode()


def _downloader(url: str) -> Callable[[str, Path], None]:
    """A function that downloads a file with litdata's client for such a URL. Raises UserError."""
    from litdata.streaming.downloader import get_downloader

    try:
        client = get_downloader(url, str(cache_folder()), [])
    except ModuleNotFoundError as error:  # of a store's own client; each has another package
        raise UserError(f"data.root={url}: {' '.join(str(error).split())}") from error

    def fetch(source: str, path: Path) -> None:
        try:
            client.download_file(source, str(path))
        except Exception as error:  # each client has its own exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"data.root={url}: {source} cannot be fetched ({reason})") from error
        if not path.is_file():
            raise UserError(f"data.root={url}: {source} cannot be fetched; it may be locked by another process")
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.lock").unlink()

    return fetch

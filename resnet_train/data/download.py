"""Download a file with known checksum from the first mirror that delivers it; partial downloads are resumed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from resnet_train.errors import UserError
from resnet_train.terminal import printable, say

CHUNK = 1 << 16


class _Failed(Exception):
    """A mirror has not delivered the file; the message is the reason."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Mark errors of the network, after which another mirror is tried, unlike errors of the disk."""
    try:
        yield
    except (OSError, HTTPException) as error:
        raise _Failed(" ".join(str(error).split()) or type(error).__name__) from error


def checksum(path: Path) -> str:
    """The MD5 of a file, as the data set's authors publish it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(
    urls: Sequence[str], path: Path, md5: str, size: int, *, stall: float = 15.0, slow: float = 200_000.0
) -> Path:
    """Download `size` bytes with checksum `md5` to `path`, from the first of `urls` that delivers them.

    A mirror is given up when it sends nothing for `stall` seconds, less than `slow` bytes per second over that time, an
    error, or other content. The partial file is kept beside `path`, and the next mirror or call resumes it. Mirrors
    that sent something are tried again without the minimal rate. Raises UserError if no mirror delivers the file.
    """
    if _is_whole(path, size, md5):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}; set RESNET_TRAIN_DATA") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process downloads; waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        return path if _is_whole(path, size, md5) else _download(urls, path, md5, size, stall, slow)
    finally:
        os.close(folder)


def _is_whole(path: Path, size: int, md5: str) -> bool:
    return path.is_file() and path.stat().st_size == size and checksum(path) == md5


def _download(urls: Sequence[str], path: Path, md5: str, size: int, stall: float, slow: float) -> Path:
    part = path.with_name(path.name + ".part")
    reasons: dict[str, str] = {}  # by URL, the last one
    attempts = [(url, slow) for url in urls]
    for url, min_rate in attempts:
        old_size, delivered = part.stat().st_size if part.exists() else 0, False
        try:
            # If the resumed file has a wrong checksum, the earlier part may be bad: download all of it.
            for _ in range(1 + part.exists()):
                _fetch(url, part, size, stall, min_rate)
                delivered = True
                if checksum(part) == md5:
                    part.replace(path)
                    return path
                part.unlink()
            raise _Failed("other content than the checksum says")
        except _Failed as error:
            reasons[url] = f"{url}: {error}"
            if min_rate and part.exists() and part.stat().st_size != old_size:
                attempts.append((url, 0.0))
                delivered = True
            if delivered and attempts[-1] != (url, min_rate):  # without a network one line, the last, is enough
                tqdm.write(printable(f"{url}: {error}; trying the next"))
        except OSError as error:
            reason = f"cannot keep the download: {error.strerror}; set RESNET_TRAIN_DATA"
            raise UserError(f"{path.parent}: {reason}") from error
    raise UserError(
        f"no mirror delivered {path.name} ({'; '.join(reasons.values())}); fetch it by hand and give its place as"
        " data.root=PATH"
    )


def _fetch(url: str, part: Path, size: int, stall: float, min_rate: float) -> None:
    """Append to `part` until it has `size` bytes."""
    offset = part.stat().st_size if part.exists() else 0
    if offset >= size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "resnet-train", "Range": f"bytes={offset}-"})
    with _tell_if_silent(url, stall) as answered, contextlib.ExitStack() as closing:
        with _network():
            response = closing.enter_context(urllib.request.urlopen(request, timeout=stall))
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            offset = 0  # the server knows no ranges and starts again
        with (
            part.open("ab" if offset else "wb") as file,
            tqdm(total=size, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            checked_at, checked_offset = time.monotonic(), offset
            while offset < size:
                with _network():
                    data = response.read1(CHUNK)
                answered()
                if not data:
                    raise _Failed(f"cut off after {offset} of {size} bytes")
                file.write(data[: size - offset])
                offset += len(data)
                bar.update(len(data))
                passed = time.monotonic() - checked_at
                if passed > stall:
                    if (offset - checked_offset) / passed < min_rate:
                        raise _Failed(f"stalls at {(offset - checked_offset) / passed / 1000:.0f} kB/s")
                    checked_at, checked_offset = time.monotonic(), offset


@contextlib.contextmanager
def _tell_if_silent(url: str, stall: float) -> Iterator[Callable[[], None]]:
    """Print a line if the function that this gives has not been called after a fifth of `stall` seconds."""
    line = printable(f"{url}: sends nothing yet; it is given {stall:g} s")
    timer = threading.Timer(stall / 5, tqdm.write, [line])
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()

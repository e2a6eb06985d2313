"""Download one file of known content: resumed, verified, from the first mirror that delivers."""

from __future__ import annotations

import contextlib
import hashlib
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from resnet_train.errors import UserError
from resnet_train.terminal import printable

CHUNK = 1 << 16


class _Failed(Exception):
    """One mirror did not deliver; the message says why."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Tell failures of a mirror, which another may make good, from those of the disk."""
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
    """`path` with `size` bytes that have the checksum, taken from the first of `urls` that delivers them.

    A mirror is left when it sends nothing for `stall` seconds, less than `slow` bytes per second over as long, an
    error or other content; what has come is kept beside `path` and the next mirror, or the next call, resumes from
    there. Those that did send something may take their time in a second round. Raises UserError if none delivers.
    """
    if path.is_file() and path.stat().st_size == size and checksum(path) == md5:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}; set RESNET_TRAIN_DATA") from error
    part = path.with_name(path.name + ".part")
    reasons = []
    tries = [(url, slow) for url in urls]
    for url, least in tries:
        before = part.stat().st_size if part.exists() else 0
        try:
            # What an earlier mirror left may be a lie: then this one is asked for the whole.
            for _ in range(1 + part.exists()):
                _fetch(url, part, size, stall, least)
                if checksum(part) == md5:
                    part.replace(path)
                    return path
                part.unlink()
            raise _Failed("other content than the checksum says")
        except _Failed as error:
            reasons.append(f"{url}: {error}")
            if least and part.exists() and part.stat().st_size != before:
                tries.append((url, 0.0))
            if tries[-1] != (url, least):
                tqdm.write(printable(f"{url}: {error}; trying the next"))
        except OSError as error:
            reason = f"cannot keep the download: {error.strerror}; set RESNET_TRAIN_DATA"
            raise UserError(f"{path.parent}: {reason}") from error
    raise UserError(
        f"no mirror delivered {path.name} ({reasons[-1]}); fetch it by hand and give its place as data.root=PATH"
    )


def _fetch(url: str, part: Path, size: int, stall: float, least: float) -> None:
    """Append to `part` until it has `size` bytes."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "resnet-train", "Range": f"bytes={have}-"})
    with _network():
        reply = urllib.request.urlopen(request, timeout=stall)
    with reply:
        if reply.status != 206 or not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server knows no ranges and starts again
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            since, then = time.monotonic(), have
            while have < size:
                with _network():
                    data = reply.read1(CHUNK)
                if not data:
                    raise _Failed(f"cut off after {have} of {size} bytes")
                file.write(data[: size - have])
                have += len(data)
                bar.update(len(data))
                passed = time.monotonic() - since
                if passed > stall:
                    if (have - then) / passed < least:
                        raise _Failed(f"stalls at {(have - then) / passed / 1000:.0f} kB/s")
                    since, then = time.monotonic(), have

"""Paths, locks, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickletools
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from resnet_train.errors import UserError, from_write_error

LARGEST_TEXT = 2**28  # bytes of JSON or a list: more than the index of a pack of a million shards


def expand(path: str | Path) -> Path:
    """`path` with ~ expanded. Raises UserError for an unknown user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder") from error


def unlinked(path: Path) -> str:
    """An absolute path with no links or `..` among its folders, the same however it is typed; the name stays."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def remove_empty(folder: Path, above: Path) -> None:
    """Remove `folder` if it is empty, and then its empty parents below `above`."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        for parent in folder.absolute().parents:
            if above.absolute() in parent.parents:
                parent.rmdir()


@contextlib.contextmanager
def lock_directory(folder: Path, key: str, doing: str, patience: int = 0) -> Iterator[None]:
    """Make the folder that was given as `key` and lock it against other processes.

    If another process has locked it, try again every half second, `patience` times. Raises UserError.
    """
    for attempts_left in range(patience, -1, -1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise from_write_error(f"{key}={folder}: cannot be made", error) from error
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):  # else its owner has removed it meanwhile
                break
        os.close(handle)
        if not attempts_left:
            raise UserError(f"{key}={folder}: another process is {doing} there")
        time.sleep(0.5)
    try:
        yield
    finally:
        os.close(handle)


class Unfit(OSError):
    """The path is a folder, a FIFO (which would wait for a writer), a device (which may have no end), or too large."""


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, and Unfit for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unfit(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb", buffering)


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError, and Unfit for anything else."""
    with open_regular(path, buffering=0) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise Unfit(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        return file.read()


def _part(path: Path) -> Path:
    """Where this process writes what becomes `path`; another may be writing the same file."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` once it is written, and is removed where that fails."""
    part = _part(path)
    try:
        yield part
        part.replace(path)
    except shutil.SameFileError:  # it is what was to be copied
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    with replacing(path) as part:
        part.write_bytes(content)


def copy_file(file: Path, path: Path) -> None:
    """Copy a file to `path`, whole or not at all. Raises OSError."""
    with replacing(path) as part:
        shutil.copy(file, part)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError for a file with other content."""
    try:
        value = json.loads(read_regular(path, LARGEST_TEXT))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_if_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or not valid, as while it is being written."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a file that cannot be read or has other content."""
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON that can be used ({str(error).splitlines()[0]})") from error


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write `values` whole or not at all, also where the power fails."""
    with replacing(path) as part, part.open("w") as file:
        file.write(json.dumps(values, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_result(path: Path, values: Any) -> None:
    """Write a command's result to the JSON file that was given as `out`; folders are made. Raises UserError."""
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def write_whole(path: Path, content: bytes) -> None:
    """Write the file that was given as `out`, whole or not at all; folders are made. Raises UserError."""
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path`, which was given as `out`, once it is written. Raises UserError."""
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part


def check_replaceable(out: Path, names: Collection[str], mark: Path | None = None) -> None:
    """Refuse what lies at `out`, a file or a folder that is not empty, unless it is an earlier result of the command.

    Such a result has all `names` (see `_names_in`), in the file itself or in `mark`, a file in the folder or beside the
    file. Raises UserError.
    """
    if mark is None or mark.parent != out:
        _refuse_folder(out)
    try:
        empty = not any(out.iterdir()) if out.is_dir() else not os.path.lexists(out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be read: {error.strerror}") from error
    if not empty and not set(names) <= _names_in(mark or out, text=mark is not None):
        raise UserError(f"out={out}: exists and is no earlier result of this command; use another name")


def _refuse_folder(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"out={out}: is a folder; name a file")


def _names_in(path: Path, *, text: bool) -> set[str]:
    """The keys of a JSON object or of the metadata of .safetensors, the arrays of an .npz, a checkpoint's strings or,
    with `text`, the words at the beginning of .csv, .md and .html; empty for what cannot be read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(4096)
            if text and path.suffix in (".csv", ".md", ".html"):
                return set(re.findall(r"[\w-]+", start.decode(errors="replace")))
            if start[:2] == b"PK" and path.suffix != ".safetensors":
                return _names_in_archive(zipfile.ZipFile(file))
            if start[:1] == b"{":
                return set(read_json(path))
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            return set(json.loads(file.read(length))["__metadata__"]) if length <= LARGEST_TEXT else set()
    except Exception:  # the readers of formats raise many kinds for what is damaged
        return set()


def _names_in_archive(archive: zipfile.ZipFile) -> set[str]:
    names = archive.namelist()
    pickled = [name for name in names if name.endswith("/data.pkl")]  # torch's; read without being executed
    if pickled and archive.getinfo(pickled[0]).file_size <= LARGEST_TEXT:
        return {value for _, value, _ in pickletools.genops(archive.read(pickled[0])) if isinstance(value, str)}
    return {name.removesuffix(".npy") for name in names}


def check_result(path: Path) -> None:
    """Make the folders above `path` and check that a file can be written there. Raises UserError."""
    _refuse_folder(path)
    part = _part(path)
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_write_error(f"out={path}: cannot be written", error) from error

"""Checkpoints: written whole or not at all, verified when loaded, never able to run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resnet_train.errors import RunError, UserError

FORMAT = 1
PARTS = {"config": dict, "iteration": int, "model": dict, "mean": torch.Tensor, "classes": list, "digest": str}
PARTS |= {"measure": dict}
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what files begin with that torch wrote before version 1.6


def save(path: Path, state: dict[str, Any], *, keep_as: Path | None = None) -> None:
    """Write `state` (tensors and plain values) to `path`; what was there before becomes `keep_as`.

    Written beside `path`, flushed and renamed: a kill or a full disk at any moment leaves whole files only, and
    `path` or `keep_as` among them. Raises RunError when it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(_canonical({"format": FORMAT, **state}), file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk may be full"
        raise RunError(
            f"{path}: the checkpoint cannot be written ({reason}); with room made, the same"
            " command goes on from the one before it, which is intact"
        ) from error


def _canonical(value: Any) -> Any:
    """The same value built anew from interned strings, so that equal states are equal files, byte for byte.

    Pickle writes an object that it has met before as a reference; which strings are one object depends on where they
    came from, the code or an earlier checkpoint.
    """
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def read(path: Path) -> Any:
    """What torch.save wrote to `path`, on the CPU. Raises UserError for a file that is damaged or could run code."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for a writer, a device has no end
            raise UserError(f"{path}: is not a file")
        with path.open("rb") as file:
            legacy = file.read(len(LEGACY)) == LEGACY  # a format without checksums
        damaged = None if legacy else _damaged(path)
        if damaged:
            raise UserError(f"{path}: is damaged ({damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is refused: it holds more than tensors and plain values") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the readers fail in many ways on what torch has not written
        raise UserError(f"{path}: is cut short or not a checkpoint") from error


def _damaged(path: Path) -> str | None:
    """The first part of a file in torch's zip format that is not whole."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # the format's own CRC, which torch.load does not look at
        # This attribute is a folder's: torch would read nothing and leave a tensor's memory as it happens to be.
        marked = [member.filename for member in archive.infolist() if member.external_attr & 16]
        return damaged or next(iter(marked), None)


def load(path: Path, *, detector: bool = False) -> dict[str, Any]:
    """A checkpoint of a net, or of a detector, on the CPU.

    Raises UserError for a file that is damaged or not such a checkpoint of ours.
    """
    state = read(path)
    if not is_ours(state):
        raise UserError(f"{path}: is not a checkpoint of resnet-train (format {FORMAT})")
    if ("detector" in state) != detector:
        raise UserError(
            f"{path}: is a checkpoint of resnet-train, not of resnet-detect"
            if detector
            else f"{path}: is a detector's, which resnet-detect reads"
        )
    return state


def is_ours(state: Any) -> bool:
    """Whether what a file holds is a checkpoint of resnet-train."""
    whole = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in PARTS.items())
    return whole and state.get("format") == FORMAT


@contextlib.contextmanager
def fitting(name: Path | str) -> Iterator[None]:
    """Make a UserError of what the reading of a checkpoint raises whose parts are not those of the net."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: holds other things than a checkpoint of this net must ({reason})") from error


def load_newest(folder: Path, *, detector: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run: last.pt, or previous.pt if that is damaged; None if there is neither.

    Raises UserError if there are checkpoints and none can be loaded.
    """
    problems = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                state = load(path, detector=detector)
            except UserError as error:
                problems.append(error)
                continue
            for problem in problems:
                print(f"warning: {problem}; going on from {path.name} (iteration {state['iteration']})", flush=True)
                (folder / "last.pt").replace(folder / "damaged.pt")  # lest the next save keep it as previous.pt
            return path, state
    if problems:
        raise UserError("; ".join([*map(str, problems), "resume=never begins the run again"]))
    return None

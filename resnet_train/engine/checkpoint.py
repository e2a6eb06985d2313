"""Checkpoints: written whole or not at all, verified when loaded, never able to run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_train import __version__
from resnet_train.errors import RunError, UserError, from_machine_error, remedy
from resnet_train.terminal import say

FORMAT = 2  # of checkpoints; a file of another format is refused
PARTS = {"config": dict, "iteration": int, "model": dict, "mean": torch.Tensor, "classes": list, "digest": str}
PARTS |= {"measure": dict, "label": str}
# The kinds of checkpoints, each but a net's by a part that it alone has, and the commands that they come from.
KINDS = {"net": "resnet-train", "detector": "resnet-detect", "localizer": "resnet-localize"}
# A byte string may be declared in one number; unpickled, it is filled with so many zeros.
BYTEARRAY = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
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
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason, way = "the disk may be full", "with room made"
        if isinstance(error, OSError) and error.strerror:
            reason, way = error.strerror, remedy(error)
        intact = path.exists() or (keep_as is not None and keep_as.exists())
        raise RunError(
            f"{path}: the checkpoint cannot be written ({reason}); {way}, the same command resumes"
            + (" from the one before it, which is intact" if intact else "")
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
    """What torch.save wrote to `path`, on the CPU.

    Raises UserError for a file that is damaged, could run code, or declares more than it holds.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for a writer, a device has no end
            raise UserError(f"{path}: is not a file")
        with path.open("rb") as file:
            legacy = file.read(len(LEGACY)) == LEGACY  # a format without checksums
        damaged = None if legacy else _damaged(path)
        if damaged:
            raise UserError(f"{path}: is damaged ({damaged})")
        if BYTEARRAY.search(_pickled(path, legacy)):
            raise UserError(f"{path}: is refused: it holds a bytearray, which may ask for any amount of memory")
        found = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(found, path)
        return found
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({what[1]})" if what else ""
        raise UserError(f"{path}: is refused: it holds more than tensors and plain values{named}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the readers fail in many ways on what torch has not written
        if from_machine_error(error):
            raise
        raise UserError(f"{path}: is cut short or not a checkpoint") from error


def _damaged(path: Path) -> str | None:
    """The first part of a file in torch's zip format that is not whole."""
    with zipfile.ZipFile(path) as archive:
        # torch.save compresses nothing; what is larger than the file would only be made by unpacking.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            return "it declares more than it holds"
        damaged = archive.testzip()  # the format's own CRC, which torch.load does not look at
        # This attribute is a folder's: torch would read nothing and leave a tensor's memory as it happens to be.
        marked = [member.filename for member in archive.infolist() if member.external_attr & 16]
        return damaged or next(iter(marked), None)


def _pickled(path: Path, legacy: bool) -> bytes:
    """The bytes that will be unpickled."""
    if legacy:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _check_sizes(value: Any, path: Path) -> None:
    """Refuse tensors that are larger than what the file holds of them, such as a row expanded to 1e9 rows."""
    stored: dict[int, int] = {}
    met: set[int] = set()
    waiting = [("", value)]
    while waiting:  # a loop, not a recursion: the values may be nested deeply, or in a circle
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
                raise UserError(f"{path}: {name[1:]} is no plain tensor ({value.layout}, {value.dtype})")
            held = value.untyped_storage()
            if value.numel() * value.element_size() > held.nbytes():
                shape = "x".join(map(str, value.shape))
                raise UserError(f"{path}: {name[1:]} declares {shape} values, and {held.nbytes()} bytes are there")
            stored[held.data_ptr()] = held.nbytes()
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in met:
            met.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}", item) for key, item in items]
    if sum(stored.values()) > path.stat().st_size:
        raise UserError(f"{path}: declares tensors of {sum(stored.values())} bytes, more than the file has")


def load(path: Path, *, kind: str = "net") -> dict[str, Any]:
    """A checkpoint of a net, or of another of KINDS, on the CPU.

    Raises UserError for a file that is damaged or not such a checkpoint of ours.
    """
    state = read(path)
    check_format(state, path)
    if wrong := wrong_part(state, PARTS):
        raise UserError(f"{path}: is not a checkpoint of resnet-train: {wrong}")
    if (found := kind_of(state)) != kind:
        raise UserError(
            f"{path}: is a checkpoint of resnet-train, not of {KINDS[kind]}"
            if found == "net"
            else f"{path}: is a {found}'s, which {KINDS[found]} reads"
        )
    return state


def kind_of(state: Mapping[str, Any]) -> str:
    """Which of KINDS a checkpoint is."""
    return next((kind for kind in KINDS if kind in state), "net")


def load_without_momentum(path: Path, *, kind: str) -> dict[str, Any]:
    """As `load`, without what no test needs: it is as large as the weights, and other processes are sent the rest."""
    return {name: value for name, value in load(path, kind=kind).items() if name != "optimizer"}


def describe(path: Path, net: str, config: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of the checkpoint `state` of `net`, a run with `config`."""
    return {
        "checkpoint": str(path.absolute()),
        "net": net,
        "seed": config.seed,
        "iteration": state["iteration"],
        "iterations": config.iterations,
    }


def check_format(state: Any, path: Path) -> None:
    """Refuse what is no checkpoint of this version's format. Raises UserError."""
    other = state.get("format") if isinstance(state, dict) else None
    if type(other) is int and other != FORMAT:
        raise UserError(
            f"{path}: is a checkpoint of format {other}; resnet-train {__version__} reads format {FORMAT} alone"
        )
    if other != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of resnet-train (format {FORMAT})")


def is_ours(state: Any) -> bool:
    """Whether what a file holds is a checkpoint of resnet-train."""
    return isinstance(state, dict) and state.get("format") == FORMAT and wrong_part(state, PARTS) is None


def wrong_part(state: Mapping[str, Any], parts: Mapping[str, type]) -> str | None:
    """What is wrong with the first of `parts` that is missing, or of another type than PARTS says; None if none is."""
    for name, kind in parts.items():
        if name not in state:
            return f"{name} is missing"
        value = state[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is of type {type(value).__name__}, not {kind.__name__}"
        if name == "classes" and (other := [item for item in state[name] if not isinstance(item, str)]):
            return f"{name} has a value of type {type(other[0]).__name__}, not str"
    return None


@contextlib.contextmanager
def checkpoint_errors(name: Path | str) -> Iterator[None]:
    """Make a UserError of what the reading of a checkpoint raises whose parts are not those of the net."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if from_machine_error(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: does not match this network ({reason})") from error


def check_net(model: Mapping[str, Tensor], make: Callable[[], nn.Module], layers: int) -> None:
    """Raise ValueError where `model` is not the state dict of the net that `make` makes, of `layers` layers at least.

    To be asked before that net is made: its weights take no memory here.
    """
    if len(model) < layers:  # nor do its modules
        raise ValueError(f"a net of {layers} layers, and {len(model)} tensors")
    check_own_memory(model)
    with torch.device("meta"):
        wanted = make().state_dict()
    for name, value in wanted.items():
        if (found := model.get(name)) is None:
            raise ValueError(f"{name} is missing")
        if found.shape != value.shape:
            raise ValueError(f"{name} is {_by(found.shape)}, not {_by(value.shape)}")
        if not bool(found.isfinite().all()):  # training saves none such
            raise ValueError(f"{name} is not finite")


def check_mean(mean: Tensor) -> None:
    """Raise ValueError where `mean` is none of an image, (H, W, 3) or (1, 1, 3)."""
    if mean.ndim != 3 or mean.shape[2] != 3 or not mean.is_floating_point() or not bool(mean.isfinite().all()):
        raise ValueError(f"a mean of {_by(mean.shape)} {str(mean.dtype).removeprefix('torch.')}, or not finite")


def check_own_memory(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the weights of a net share their values, so that a small file declares a large net."""
    weights = [value for value in state.values() if value.is_floating_point()]
    declared = sum(value.numel() * value.element_size() for value in weights)
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights}
    if declared > sum(held.values()):
        raise ValueError(f"weights of {declared} bytes, and {sum(held.values())} are there")


def _by(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"


def load_newest(folder: Path, *, kind: str = "net") -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run: last.pt, or previous.pt if that is damaged; None if there is neither.

    Raises UserError if there are checkpoints and none can be loaded.
    """
    problems = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                state = load(path, kind=kind)
            except UserError as error:
                problems.append(error)
                continue
            for problem in problems:
                say(f"warning: {problem}; resuming from {path.name} (iteration {state['iteration']})")
                (folder / "last.pt").replace(folder / "damaged.pt")  # lest the next save keep it as previous.pt
            return path, state
    if problems:
        raise UserError("; ".join([*map(str, problems), "resume=never begins the run again"]))
    return None

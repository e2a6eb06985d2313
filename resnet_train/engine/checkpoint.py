"""Checkpoints: written whole or not at all, verified when loaded, never able to run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_train import __version__
from resnet_train.errors import RunError, UserError, from_machine_error, remedy

FORMAT = 2  # of checkpoints; a file of another format is refused
PARTS = {"config": dict, "iteration": int, "model": dict, "mean": torch.Tensor, "classes": list, "digest": str}
PARTS |= {"measure": dict, "label": str}
# The kinds of checkpoints and the commands that write them. All but "net" are recognised by a key of that name.
KINDS = {"net": "resnet-train", "detector": "resnet-detect", "localizer": "resnet-localize"}
# Pickle can declare a bytearray by its length alone; unpickling allocates that many zeros.
BYTEARRAY = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of files written by torch before 1.6


def save(path: Path, state: dict[str, Any], *, keep_as: Path | None = None) -> None:
    """Write `state` (tensors and plain values) to `path`; the file that was there is renamed to `keep_as`.

    The file is written beside `path`, flushed and renamed: a kill or a full disk at any moment leaves only whole files,
    among them `path` or `keep_as`. Raises RunError if it cannot be written.
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
        reason, advice = "the disk may be full", "once there is space"
        if isinstance(error, OSError) and error.strerror:
            reason, advice = error.strerror, remedy(error)
            if error.filename2 and Path(error.filename2) != path:
                reason += f": {error.filename2}"
        intact = path.is_file() or (keep_as is not None and keep_as.is_file())
        raise RunError(
            f"{path}: the checkpoint cannot be written ({reason}); {advice}, the same command resumes"
            + (" from the one before it, which is intact" if intact else "")
        ) from error


def _canonical(value: Any) -> Any:
    """A copy of `value` with interned strings, so that equal states give equal files, byte for byte.

    Pickle writes an object that it has seen before as a reference, and whether equal strings are one object depends on
    whether they come from the code or from a loaded checkpoint.
    """
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def read(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU.

    Raises UserError for a file that is damaged, could run code, or declares larger tensors than it contains.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for a writer, a device has no end
            raise UserError(f"{path}: is not a file")
        with path.open("rb") as file:
            legacy = file.read(len(LEGACY)) == LEGACY  # a format without checksums
        damaged = None if legacy else _find_damage(path)
        if damaged:
            raise UserError(f"{path}: is damaged ({damaged})")
        if BYTEARRAY.search(_pickle_bytes(path, legacy)):
            raise UserError(f"{path}: is refused: it holds a bytearray, which may ask for any amount of memory")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(content, path)
        return content
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        name = f" ({match[1]})" if match else ""
        raise UserError(f"{path}: is refused: it holds more than tensors and plain values{name}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile and torch.load raise many kinds of errors for other files
        if from_machine_error(error):
            raise
        raise UserError(f"{path}: is cut short or not a checkpoint") from error


def _find_damage(path: Path) -> str | None:
    """The first damaged member of a file in torch's zip format, or another fault; None if there is none."""
    with zipfile.ZipFile(path) as archive:
        # torch.save does not compress: members larger than the file mean a zip bomb.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            return "it declares more than it holds"
        damaged = archive.testzip()  # the format's own CRC, which torch.load does not look at
        # This attribute marks a folder: torch would read nothing and leave the tensor's memory uninitialised.
        marked = [member.filename for member in archive.infolist() if member.external_attr & 16]
        return damaged or next(iter(marked), None)


def _pickle_bytes(path: Path, legacy: bool) -> bytes:
    """The bytes that will be unpickled."""
    if legacy:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _check_sizes(value: Any, path: Path) -> None:
    """Refuse tensors that are larger than their storage in the file, such as a row expanded to 1e9 rows."""
    stored: dict[int, int] = {}
    visited: set[int] = set()
    stack = [("", value)]
    while stack:  # no recursion: the values may be nested deeply, or contain themselves
        name, value = stack.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
                raise UserError(f"{path}: {name[1:]} is no plain tensor ({value.layout}, {value.dtype})")
            storage = value.untyped_storage()
            if value.numel() * value.element_size() > storage.nbytes():
                shape = "x".join(map(str, value.shape))
                raise UserError(f"{path}: {name[1:]} declares {shape} values, and {storage.nbytes()} bytes are there")
            stored[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in visited:
            visited.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack += [(f"{name}.{key}", item) for key, item in items]
    if sum(stored.values()) > path.stat().st_size:
        raise UserError(f"{path}: declares tensors of {sum(stored.values())} bytes, more than the file has")


def load(path: Path, *, kind: str = "net") -> dict[str, Any]:
    """Load a checkpoint of the given kind (one of KINDS) on the CPU, with its "path".

    Raises UserError for a file that is damaged or is not such a checkpoint of resnet-train.
    """
    state = read(path)
    check_format(state, path)
    if wrong := wrong_part(state, PARTS):
        raise UserError(f"{path}: is not a checkpoint of resnet-train: {wrong}")
    if (actual := kind_of(state)) != kind:
        raise UserError(
            f"{path}: is a checkpoint of resnet-train, not of {KINDS[kind]}"
            if actual == "net"
            else f"{path}: is a {actual}'s, which {KINDS[actual]} reads"
        )
    return {**state, "path": str(path)}


def kind_of(state: Mapping[str, Any]) -> str:
    """Which of KINDS a checkpoint is."""
    return next((kind for kind in KINDS if kind in state), "net")


def load_without_momentum(path: Path, *, kind: str) -> dict[str, Any]:
    """`load` without the optimizer's state, which evaluation does not need and which is as large as the weights."""
    return {name: value for name, value in load(path, kind=kind).items() if name != "optimizer"}


def describe(path: Path, net: str, config: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a result file that name the checkpoint `state` of `net`, from a run with `config`."""
    return {
        "checkpoint": str(path.absolute()),
        "net": net,
        "seed": config.seed,
        "iteration": state["iteration"],
        "iterations": config.iterations,
    }


def check_format(state: Any, path: Path) -> None:
    """Raises UserError for anything but a checkpoint of format FORMAT."""
    other = state.get("format") if isinstance(state, dict) else None
    if type(other) is int and other != FORMAT:
        raise UserError(
            f"{path}: is a checkpoint of format {other}; resnet-train {__version__} reads format {FORMAT} alone"
        )
    if other != FORMAT:
        imported = f"; resnet-weights import {shlex.quote(str(path))} out=net.pt makes one of another program's weights"
        advice = imported if isinstance(state, dict) else ""
        raise UserError(f"{path}: is not a checkpoint of resnet-train (format {FORMAT}){advice}")


def is_ours(state: Any) -> bool:
    """Whether a file's content is a checkpoint of resnet-train."""
    return isinstance(state, dict) and state.get("format") == FORMAT and wrong_part(state, PARTS) is None


def wrong_part(state: Mapping[str, Any], parts: Mapping[str, type]) -> str | None:
    """What is wrong with the first of `parts` that is missing or of another type; None if all are right."""
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
    """Turn the exceptions raised when a checkpoint does not match the network into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if from_machine_error(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: does not match this network ({reason})") from error


def check_net(model: Mapping[str, Tensor], make: Callable[[], nn.Module], layers: int) -> None:
    """Raise ValueError if `model` is not a state dict of the net that `make` builds, which has `layers` layers or more.

    To be called before the net is built: here its weights take no memory.
    """
    if len(model) < layers:  # before even its modules are built
        raise ValueError(f"a net of {layers} layers, and {len(model)} tensors")
    check_own_memory(model)
    with torch.device("meta"):
        expected = make().state_dict()
    for name, value in expected.items():
        if (tensor := model.get(name)) is None:
            raise ValueError(f"{name} is missing")
        if tensor.shape != value.shape:
            raise ValueError(f"{name} is {_by(tensor.shape)}, not {_by(value.shape)}")
        if not bool(tensor.isfinite().all()):  # training never saves such weights
            raise ValueError(f"{name} is not finite")


def check_mean(mean: Tensor) -> None:
    """Raise ValueError if `mean` is not the mean of images, (H, W, 3) or (1, 1, 3), finite and floating-point."""
    if mean.ndim != 3 or mean.shape[2] != 3 or not mean.is_floating_point() or not bool(mean.isfinite().all()):
        raise ValueError(f"a mean of {_by(mean.shape)} {str(mean.dtype).removeprefix('torch.')}, or not finite")


def check_own_memory(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if weights of a net share storage, by which a small file can declare a large net."""
    weights = [value for value in state.values() if value.is_floating_point()]
    declared = sum(value.numel() * value.element_size() for value in weights)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights}
    if declared > sum(storages.values()):
        raise ValueError(f"weights of {declared} bytes, and {sum(storages.values())} are there")


def _by(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"

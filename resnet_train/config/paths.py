"""Checks of files and folders given on the command line; no torch here."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from resnet_train.config.layout import is_remote
from resnet_train.config.schema import format_value
from resnet_train.errors import UserError
from resnet_train.files import check_replaceable, expand, nearest_existing


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Raises UserError for invalid paths: a name that is too long, an unknown user's home, no permission."""
    for key, text in paths.items():
        try:
            Path(text or ".").expanduser().exists()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{key}={format_value(text)}: {getattr(error, 'strerror', None) or error}") from error


def check_checkpoints(names: list[str]) -> None:
    """Raises UserError for files that are missing or clearly not checkpoints."""
    if not names:
        raise UserError("checkpoint=[]: name at least one")
    for number, name in enumerate(names):
        check_paths({"checkpoint": name})
        if expand(name).is_dir():
            raise UserError(f"checkpoint={name}: is a folder; name a file in it, such as checkpoints/last.pt")
        if not expand(name).is_file():
            several = "where several are taken, they are a list: [FILE,FILE]"
            advice = several if "," in name else "a run keeps its in RUN/checkpoints/"
            raise UserError(f"checkpoint={name}: there is no such file; {advice}")
        if not zipfile.is_zipfile(expand(name)) and expand(name).suffix != ".safetensors":
            raise UserError(f"checkpoint={name}: is cut short or not a checkpoint")
        if name in names[:number]:
            raise UserError(f"checkpoint={name}: is named twice")


def check_folder(out: str, file: str, names: Collection[str]) -> None:
    """Raises UserError if `out` is not a folder, cannot be written to, or holds files and no earlier result.

    An earlier result is marked by `file`, which has `names` (files.check_replaceable).
    """
    check_paths({"out": out})
    if (expand(out).exists() and not expand(out).is_dir()) or not writable(expand(out) / "file"):
        raise UserError(f"out={out}: is not a folder that you may write to")
    check_replaceable(expand(out), names, expand(out) / file)


def check_file(key: str, name: str) -> None:
    """Raises UserError if `name` is not a file."""
    if not expand(name).is_file():
        raise UserError(f"{key}={name}: {'is a folder' if expand(name).is_dir() else 'there is no such file'}")


def check_image(name: str) -> None:
    """Raises UserError if `name`, an image to look at, is not a file."""
    check_paths({name: name})
    if expand(name).is_dir():
        raise UserError(f"{name}: is a folder; name the images in it, as in {name.rstrip('/')}/*.jpg")
    if not expand(name).is_file():
        raise UserError(f"{name}: there is no such file")


def check_out(out: str | None, names: Collection[str], beside: str = "") -> None:
    """Raises UserError if `out` is a file that cannot be written, or exists and is no earlier result.

    An earlier result has `names` (files.check_replaceable), where `beside` is given in the file of that ending beside.
    """
    if out is None:
        return
    if expand(out).is_dir() or not writable(expand(out)):
        raise UserError(f"out={out}: is not a file that you may write")
    check_replaceable(expand(out), names, Path(f"{expand(out)}{beside}") if beside else None)


def writable(file: Path) -> bool:
    """Whether `file` can be written, including missing folders."""
    parent = nearest_existing(file.parent)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def anchored(data: Any) -> Any:
    """`data` with an absolute root, so that a run's configuration does not depend on the working directory."""
    if data.root is None or is_remote(data.root):
        return data
    return dataclasses.replace(data, root=str(expand(data.root).absolute()))

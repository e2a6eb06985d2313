"""Small files and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resnet_train.errors import UserError


def expand(path: str | Path) -> Path:
    """`path` with ~ written out. Raises UserError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder") from error


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write `values` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=indent) + "\n")
    part.replace(path)

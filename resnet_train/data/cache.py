"""The user's cache folder: downloads, decoded data sets, listings and mean images."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from resnet_train.data.image_set import DataSet, ImageSet
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import expand
from resnet_train.terminal import printable

FORMAT = 3  # of the decoded sets in the cache folder


def cache_folder() -> Path:
    """The cache folder: $RESNET_TRAIN_DATA, else ~/.cache/resnet-train/data."""
    return expand(os.environ.get("RESNET_TRAIN_DATA") or Path.home() / ".cache" / "resnet-train" / "data")


def load_cached(name: str, files: list[Path], key: str, make: Callable[[], DataSet]) -> DataSet:
    """The result of `make()`, cached for as long as the sizes and times of `files` do not change."""
    stamp = hashlib.sha256(f"{FORMAT} {key}".encode())
    for file in files:
        with contextlib.suppress(OSError):  # of which `make` raises an error
            status = file.stat()
            stamp.update(os.fsencode(f"{file} {status.st_size} {status.st_mtime_ns}\n"))
    path = cache_folder() / "decoded" / f"{name}-{stamp.hexdigest()[:16]}.pt"
    try:
        cached = checkpoint.read(path)
        parts = ImageSet(*cached["train"]), ImageSet(*cached["test"])
        return DataSet(*parts, cached["classes"], cached["digest"], cached["unreadable"])
    except (UserError, TypeError, LookupError):
        pass  # missing, damaged or of another kind: made again
    data = make()
    keep(
        path,
        {
            "train": [data.train.images, data.train.labels],
            "test": [data.test.images, data.test.labels],
            "classes": data.classes,
            "digest": data.digest,
            "unreadable": data.unreadable,
        },
    )
    return data


def keep(path: Path, values: Any) -> None:
    """Write `values` to a file in the cache folder, whole or not at all; if that fails, print a line and continue."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        tqdm.write(printable(f"{path.parent}: the cache cannot be written ({error}); set RESNET_TRAIN_DATA"))

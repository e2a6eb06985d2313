"""Verification of a pack: read all shards and decode every image."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm import tqdm

from resnet_train.data.decode import decode
from resnet_train.data.fetch import local_folder
from resnet_train.data.pack_schema import (
    check_shard,
    checksum,
    read_about,
)
from resnet_train.data.packed import Shard, check_label
from resnet_train.data.pool import work_in_processes
from resnet_train.errors import RunError, UserError
from resnet_train.terminal import say


def check_packed(root: str, workers: int) -> None:
    """Read all shards of a packed folder and decode every image. Raises UserError and, naming them, RunError."""
    folder = local_folder(root)
    pack = read_about(folder)
    jobs = [
        {"path": folder / name / shard.name, "classes": len(pack.classes), "shard": shard}
        for name, part in pack.parts.items()
        for shard in part.shards
    ]
    total, errors = sum(part.images for part in pack.parts.values()), []
    bar = tqdm(total=total, desc="checking", unit=" images", disable=None)
    with bar, contextlib.closing(work_in_processes(read_shard, jobs, workers)) as checked:
        for job, shard_errors in checked:
            bar.update(job["shard"].images)
            errors += shard_errors
    for line in errors:
        say(f"wrong: {line}", file=sys.stderr)
    if errors:
        raise RunError(f"check={root}: number of errors: {len(errors)}; the first: {errors[0]}")
    say(f"{root}: {total} images in {len(jobs)} shards, all as they were packed")


def read_shard(job: dict[str, Any]) -> list[str]:
    """The errors in a shard, as lines."""
    try:
        check_shard(job["path"], job["shard"])
        shard = Shard(job["path"])
    except UserError as error:
        return [str(error)]
    errors = [] if checksum(job["path"]) == job["shard"].sha256 else [f"{job['path']}: its checksum is wrong"]
    for position in range(len(shard)):
        try:
            name, data, label = shard.item(position)
            check_label(name, label, job["classes"])
            decode(data, name)
        except UserError as error:
            errors.append(str(error))
    return errors

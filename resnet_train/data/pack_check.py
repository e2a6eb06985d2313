"""Reading all that was packed, to see that it is whole."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from resnet_train.data.decode import decode
from resnet_train.data.fetch import located
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
    folder = located(root)
    pack = read_about(folder)
    jobs = [
        {"path": folder / name / shard.name, "classes": len(pack.classes), "shard": shard}
        for name, part in pack.parts.items()
        for shard in part.shards
    ]
    total, wrong = sum(part.images for part in pack.parts.values()), []
    with tqdm(total=total, desc="checking", unit=" images", disable=None) as bar:
        for job, errors in work_in_processes(read_shard, jobs, workers):
            bar.update(job["shard"].images)
            wrong += errors
    for line in wrong:
        say(f"wrong: {line}", file=sys.stderr)
    if wrong:
        raise RunError(f"check={root}: {len(wrong)} things are wrong, the first: {wrong[0]}")
    say(f"{root}: {total} images in {len(jobs)} shards, all as they were packed")


def read_shard(job: dict[str, Any]) -> list[str]:
    """What is wrong with a shard, as lines."""
    try:
        check_shard(job["path"], job["shard"])
        shard = Shard(job["path"])
    except UserError as error:
        return [str(error)]
    wrong = [] if checksum(job["path"]) == job["shard"].sha256 else [f"{job['path']}: its checksum does not hold"]
    for place in range(len(shard)):
        try:
            name, data, label = shard.item(place)
            check_label(name, label, job["classes"])
            decode(data, name)
        except UserError as error:
            wrong.append(str(error))
    return wrong

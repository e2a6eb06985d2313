"""What the machine gives this process: cores, and open files for workers that load data. Needs no torch."""

from __future__ import annotations

import os
import resource

from resnet_train.errors import RunError

FILES, FILES_OF_WORKER = 64, 8  # open files that a process needs by itself, and for each worker


def share_of_cores() -> int:
    """The cores that this process may use, divided by the processes of its launcher on this machine; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def most_workers() -> int:
    """The workers that the limit of open files allows, once it is raised as far as it may be; 1 at least."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else max(1, (hard - FILES) // FILES_OF_WORKER)


def check_open_files(workers: int | str) -> None:
    """Raise the limit of open files to what `workers` that load data need, or refuse where it may not be raised.

    A worker that meets it would not end: Python's thread that hands on its tensors tries again for good. auto takes no
    more than the limit allows. Raises RunError.
    """
    number = min(share_of_cores(), most_workers()) if workers == "auto" else int(workers)
    need = FILES + FILES_OF_WORKER * number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if number == 0 or soft == resource.RLIM_INFINITY or soft >= need:
        return
    if hard not in range(need):
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
        return
    raise RunError(
        f"data.workers={workers}: need {need} open files, and the limit is {soft}; raise it (ulimit -n), or use fewer"
    )

"""Limits of this process: CPU cores, memory, and open files for data-loading workers. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from resnet_train.errors import RunError, UserError

FILES, FILES_OF_WORKER = 64, 8  # open files that a process needs without workers, and for each worker
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container (docker run --cpus=4): microseconds of each period


def share_of_cores() -> int:
    """The cores that this process may use, divided by the processes of its launcher on this machine; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max` in place of a number
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, quota // period)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def most_workers() -> int:
    """The number of workers that the hard limit of open files allows; 1 at least."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else max(1, (hard - FILES) // FILES_OF_WORKER)


def check_memory(need: int, what: str, advice: str) -> None:
    """Raise UserError if `what`, plural, takes more bytes than this machine's memory has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise UserError(f"{what} are {need / 1e9:.0f} GB, and this machine has {memory / 1e9:.0f}; {advice}")


def check_open_files(workers: int | str) -> None:
    """Raise the limit of open files to what `workers` data-loading workers need. Raises RunError if that is impossible.

    A worker at the limit would hang: the Python thread that passes its tensors on retries forever. auto uses no more
    workers than the limit allows.
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

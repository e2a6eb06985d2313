"""Data-loading workers: their errors, signals and end."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from resnet_train.errors import SIGNALS, RunError, UserError

# On Linux workers are forks, also with Python 3.14, so that they share what is listed and import nothing again.
CONTEXT = "fork" if sys.platform == "linux" else None


def load_in_workers(data: Dataset[Any], workers: int, device: torch.device, **order: Any) -> Iterator[Any]:
    """The batches of `data` for `device`, made by worker processes, or by this one without; `order`: of DataLoader.

    The UserError of a worker is raised as in that worker.
    """
    loader = DataLoader(
        data,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals,
        multiprocessing_context=CONTEXT if workers else None,
        **order,
    )
    return _checked_batches(loader)


def _checked_batches(loader: DataLoader) -> Iterator[Any]:
    _end_workers_at_exit()
    try:
        yield from loader
    except UserError as error:  # it comes wrapped in that worker's traceback
        error.__traceback__ = None  # its frames would keep the workers until they time out
        kind = RunError if isinstance(error, RunError) else UserError
        raise kind(str(error).strip().splitlines()[-1].split(f".{type(error).__name__}: ")[-1]) from None


def _leave_signals(_: int) -> None:
    """Ignore signals sent to all processes of a job: training processes handle them, and end their workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _end_workers_at_exit() -> None:
    """End remaining workers when this process exits; to be called before the first is started."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    """End workers that an error has left behind: they ignore SIGTERM, so Python would wait for them at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for a worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()

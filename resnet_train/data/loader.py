"""Data-loading workers: their errors, signals and end."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from resnet_train.errors import SIGNALS, RunError, UserError

# On Linux workers are forks, also with Python 3.14, so that they share what is listed and import nothing again.
WORKERS = "fork" if sys.platform == "linux" else None


def checked_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of `loader`; the UserError of a worker is raised as in that worker."""
    _end_workers_at_exit()
    try:
        yield from loader
    except UserError as error:  # it comes wrapped in that worker's traceback
        error.__traceback__ = None  # its frames would keep the workers until they time out
        kind = RunError if isinstance(error, RunError) else UserError
        raise kind(str(error).strip().splitlines()[-1].split(f".{type(error).__name__}: ")[-1]) from None


def leave_signals(_: int) -> None:
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

"""Worker processes that read images, their errors and their end."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from resnet_train.errors import SIGNALS, RunError, UserError


def checked_batches(loader: DataLoader) -> Iterator[Any]:
    """What `loader` gives; the UserError of a worker as that worker raised it."""
    _end_workers_at_exit()
    try:
        yield from loader
    except UserError as error:  # it comes wrapped in that worker's traceback
        error.__traceback__ = None  # its frames would keep the workers until they time out
        kind = RunError if isinstance(error, RunError) else UserError
        raise kind(str(error).strip().splitlines()[-1].split(f".{type(error).__name__}: ")[-1]) from None


def leave_signals(_: int) -> None:
    """Signals that reach all processes of a job are for those that train; their end is the worker's end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _end_workers_at_exit() -> None:
    """Have the workers that are left at the end of this process ended; called before the first is started."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    """End workers whose loader an error has left: they ignore what Python would send them, and it would wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for a worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()

"""Work for several processes, which end with this one."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from resnet_train.errors import SIGNALS, RunError


def work_in_processes(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Each job and what `work` makes of it in one of `workers` processes, as they finish. Raises what it raises.

    Jobs are taken from `jobs` when there is room. The processes end with this one, however that ends; 0 is this one.
    """
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting = iter(jobs)
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker
    ) as pool:
        try:
            running = {pool.submit(work, job): job for job in itertools.islice(waiting, 2 * workers)}
            while running:
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(work, job): job for job in itertools.islice(waiting, 1)}
        except BrokenProcessPool as error:
            raise RunError("a process was killed (out of memory?); the same command resumes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Leave signals to the parent, compute with one thread, and end where the parent is no more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)

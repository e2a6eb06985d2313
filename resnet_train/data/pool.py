"""A pool of worker processes that end with this process."""

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
    """Run `work` for each job in one of `workers` processes; yield job and result as they finish.

    Exceptions of `work` are raised here. `jobs` is consumed lazily. The workers end with this process, however it
    ends; with 0 workers the jobs run in this process.
    """
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    remaining = iter(jobs)
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker
    ) as pool:
        try:
            running = {pool.submit(work, job): job for job in itertools.islice(remaining, 2 * workers)}
            while running:
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(work, job): job for job in itertools.islice(remaining, 1)}
        except BrokenProcessPool as error:
            raise RunError("a process was killed (out of memory?); the same command resumes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Ignore signals, which the parent handles, use one thread, and end when the parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)

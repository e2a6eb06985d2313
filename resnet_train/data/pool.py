"""A pool of worker processes that end with this process."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import torch

from resnet_train.errors import SIGNALS, RunError


def work_in_processes(
    work: Callable[[Any], Any], jobs: Iterable[Any], workers: int
) -> Generator[tuple[Any, Any], None, None]:
    """Run `work` for each job in one of `workers` processes; yield job and result as they finish.

    Exceptions of `work` are raised here. `jobs` is consumed lazily. An error, a signal or `close()` ends the workers
    within a second, and so does the end of this process, however it ends; with 0 workers the jobs run in this process.
    """
    if not workers:
        yield from ((job, work(job)) for job in jobs)
        return
    remaining = iter(jobs)
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(theirs,))
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
        ours.close()  # a shutdown alone waits for what the workers are doing
        pool.shutdown()


def _begin_worker(parent: Connection) -> None:
    """Ignore signals, which the parent handles, use one thread, and end when the parent closes its side or ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Connection) -> None:
    with contextlib.suppress(EOFError):
        parent.recv()
    time.sleep(1)  # one without a job ends in good order meanwhile
    atexit._run_exitfuncs()  # else multiprocessing would tell of semaphores that are left, such as litdata's
    os._exit(1)

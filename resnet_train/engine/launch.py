"""Start the training processes of one machine, with the part of torch's elastic launcher that needs no port."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from resnet_train.engine.compute import check_gpu
from resnet_train.engine.distributed import STORE, limit_threads
from resnet_train.errors import SIGNALS, RunError, UserError, stop_early


def launch(job: Callable[[], int], processes: int, max_restarts: int) -> int:
    """Run `job` (to be pickled) in `processes` new processes and return the exit code of rank 0.

    Signals are forwarded to all of them, which then stop together in the usual way. When one dies, the others are
    ended and all are restarted, up to `max_restarts` times. Wrong input is not retried: its exit code is returned.

    They meet in a file that only this user can read. The elastic launcher's own rendezvous is a store that listens on
    all interfaces and unpickles what it receives: whoever can reach it could run code here.
    """
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        for worker in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C waits 30 seconds and no longer

    for number in SIGNALS:
        signal.signal(number, pass_on)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # none of ours
    for name in ("distributed.elastic.multiprocessing.api", "multiprocessing.spawn"):
        logging.getLogger(f"torch.{name}").setLevel(logging.CRITICAL)  # reported below, in one line
    group = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",  # for code that checks whether it runs under a launcher
        "MASTER_PORT": "0",
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }
    with tempfile.TemporaryDirectory(prefix="resnet-train-", ignore_cleanup_errors=True) as folder:
        for restart in range(max_restarts + 1):
            # A new file for each start: the previous one has the addresses of ended processes.
            group |= {"TORCHELASTIC_RESTART_COUNT": str(restart), STORE: os.path.join(folder, str(restart))}
            context = start_processes(
                "resnet-train",
                _work,
                args=dict.fromkeys(range(processes), (job, processes, received)),
                envs={rank: group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)},
                logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else each start leaves a folder in /tmp
            )
            try:
                result = context.wait(period=0.1)
            finally:
                context.close()  # after a second Ctrl-C
            assert result is not None  # wait() has no timeout
            if not result.is_failed():
                return result.return_values[0]
            ((rank, failure),) = result.failures.items()
            if received or failure.exitcode == UserError.code:  # wrong input stays wrong
                break
    if failure.exitcode >= 0:  # the process has reported its error
        return failure.exitcode
    if -failure.exitcode in received:  # before the process handled signals itself
        stop_early(-failure.exitcode)
    restarts = f" after all restarts (max_restarts={max_restarts})" if max_restarts else ""
    advice = "" if max_restarts else ", and with max_restarts=3 by itself"
    description = f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
    raise RunError(
        f"{description}{restarts}; the same command resumes from the last checkpoint, if one was written{advice}"
    )


def _work(job: Callable[[], int], processes: int, received: list[int]) -> int:
    """One process. It returns its exit code, since the launcher takes any other end for a failure and restarts.

    `received` are the signals that the launcher had received when it started this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the other signals, until there is something to save
    if received:
        os.kill(os.getpid(), received[0])
    limit_threads(processes)
    code = job()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # sent by the launcher when another has died; all is saved
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    return code


def _end_with_launcher() -> None:
    """End with the launcher: a process whose return value nobody reads would wait forever."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def pick_processes(devices: int | str, device: str) -> int:
    """The number of processes to start: `devices`, or one per GPU for auto. Raises UserError for too few GPUs."""
    if device == "cuda":  # checked here, else every process would report it
        check_gpu(device)
    # The driver may count GPUs that torch cannot use.
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if devices == "auto":
        return max(1, gpus)
    if gpus and int(devices) > gpus:
        raise UserError(f"devices={devices}: torch sees {gpus} here; use devices={gpus} or device=cpu")
    return int(devices)

"""Start the processes that train together on this machine: torch.distributed's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resnet_train.distributed import share_cores
from resnet_train.errors import SIGNALS, RunError, UserError


def launch(job: Callable[[], int], processes: int, max_restarts: int) -> int:
    """Run `job` (to be pickled) in `processes` new processes and give the first one's exit code.

    A signal is passed on to all, which agree to stop and end as they always do: the engine has no part in it, for it
    would wait only so long for a checkpoint. Where one dies, the others are ended and, up to `max_restarts` times, all
    started again; then RunError names it.
    """
    told: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        for worker in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C waits 30 seconds and no longer

    for number in SIGNALS:
        signal.signal(number, pass_on)
    for name in ("elastic", "elastic.agent.server.api", "elastic.multiprocessing.api"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)  # told below, in one line
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    # A store that outlives a restart holds the addresses of the dead: the processes would look for each other there.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=max_restarts,
        signals_to_handle="SIGQUIT",  # none of ours
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else each start leaves a folder in /tmp
    )
    try:
        return elastic_launch(config, _work)(job, processes, told)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has told why
            return failure.exitcode
        if -failure.exitcode in told:  # before it had begun
            return 128 - failure.exitcode
        raise RunError(
            f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            + (f" after all restarts (max_restarts={max_restarts})" if max_restarts else "")
            + "; the same command goes on from the last checkpoint"
            + ("" if max_restarts else ", and with max_restarts=3 by itself")
        ) from error


def _work(job: Callable[[], int], processes: int, told: list[int]) -> int:
    """One process: its code is returned, for any other end is a failure in the engine's eyes, to start all again after.

    `told` is the list of signals so far, as it was when this process was started.
    """
    if told:
        return 128 + told[0]
    share_cores(processes)
    code = job()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the engine's, where another has died: nothing is left to save
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    return code


def _end_with_launcher() -> None:
    """What is returned waits for a launcher to read it; without one it would wait for good."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def pick_processes(devices: int | str, device: str) -> int:
    """The processes to start: `devices`, or for auto one for each GPU. Raises UserError for more than there are."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not gpus:  # here, or each of the processes would tell of it
        raise UserError("device=cuda: torch sees no GPU here; take device=cpu")
    if devices == "auto":
        return max(1, gpus)
    if gpus and int(devices) > gpus:
        raise UserError(f"devices={devices}: torch sees {gpus} here; take devices={gpus} or device=cpu")
    return int(devices)

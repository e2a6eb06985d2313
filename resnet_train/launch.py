"""Start the processes that train together on this machine: torch.distributed's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resnet_train.distributed import share_cores
from resnet_train.errors import RunError, UserError


def launch(job: Callable[[], int], processes: int, max_restarts: int) -> int:
    """Run `job` (to be pickled) in `processes` new processes and give the first one's exit code.

    A signal is passed on to all. Where one dies, the others are ended and, up to `max_restarts` times, all started
    again; then RunError names it.
    """
    for name in ("elastic", "elastic.agent.server.api", "elastic.multiprocessing.api"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)  # told below, in one line
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    # A store that outlives a restart holds the addresses of the dead: the processes would look for each other there.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Seconds to the end of an iteration and its checkpoint after a signal; 30, where torch knows nothing of this.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=max_restarts,
        signals_to_handle="SIGINT,SIGTERM,SIGUSR1,SIGUSR2",
    )
    try:
        return elastic_launch(config, _work)(job, processes)[0]
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has told why, or all have stopped together because one of them was told to
            return failure.exitcode
        raise RunError(
            f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            + (f", after {max_restarts} restarts" if max_restarts else "")
            + "; the same command goes on from the last checkpoint"
            + ("" if max_restarts else ", and with max_restarts=3 by itself")
        ) from error


def _work(job: Callable[[], int], processes: int) -> int:
    """One process: a code that all end with is returned, any other end is a failure in the launcher's eyes."""
    share_cores(processes)
    code = job()
    if code > 128:
        sys.exit(code)  # returned, it would be kept waiting for a launcher that is itself being ended
    return code


def pick_processes(devices: int | str, device: str) -> int:
    """The processes to start: `devices`, or for auto one for each GPU. Raises UserError for more than there are."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if devices == "auto":
        return max(1, gpus)
    if gpus and int(devices) > gpus:
        raise UserError(f"devices={devices}: torch sees {gpus} here; take devices={gpus} or device=cpu")
    return int(devices)

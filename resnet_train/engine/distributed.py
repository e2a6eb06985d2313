"""Distributed training: ranks, sums over all processes, and errors that are raised in all of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_train.errors import (
    RemoteError,
    RunError,
    UserError,
    from_machine_error,
    from_nccl_error,
    last_nccl_error,
    under_launcher,
)
from resnet_train.terminal import say

T = TypeVar("T")
STORE = "RESNET_TRAIN_STORE"  # names the file in which the processes of our own launcher meet


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def restore_rank_sums(rows: Tensor, stored: Tensor) -> None:
    """Restore this process's row of `stored` sums; if the number of processes has changed, rank 0 takes their total."""
    rows.zero_()
    if len(stored) == world_size():
        rows[rank()] = stored[rank()]
    elif rank() == 0:
        rows[0] = stored.sum(0)


def raise_on_all_ranks(job: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `job` in every process and return this process's result once all have finished, in the time of `group`.

    A UserError in any process ends all of them, as does an error of the machine (a full disk, too little memory), which
    becomes a RunError. Rank 0 raises the error itself, the other processes RemoteError.
    """
    if world_size() == 1:
        return job()
    result, error = _attempt(job)
    errors: list[UserError | None] = [None] * world_size()
    dist.all_gather_object(errors, error, group)
    for failure in errors:
        if failure is not None:
            raise for_all_ranks(failure)
    return result  # type: ignore[return-value]


def on_rank_zero(job: Callable[[], T]) -> T:
    """Run `job` on rank 0 only and return its result in every process. Errors as in `raise_on_all_ranks`."""
    if world_size() == 1:
        return job()
    outcome: list[Any] = [*(_attempt(job) if is_main() else (None, None))]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise for_all_ranks(outcome[1])
    return outcome[0]


def _attempt(job: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return job(), None
    except UserError as error:
        return None, error
    except (OSError, RuntimeError, MemoryError) as error:
        user_error = from_machine_error(error)
        if user_error is None:
            raise
        return None, user_error


def for_all_ranks(error: UserError) -> UserError:
    """The error for this process to raise when all of them raise: `error` on rank 0, which reports it."""
    error = error if is_main() else RemoteError(error)
    error.shared = True
    return error


def local_rank_zero_first(job: Callable[[], T]) -> T:
    """Run `job` in every process, first on local rank 0 of each machine, so that the others can use its cache.

    It may take hours, such as a download, so that they wait for longer than `timeout=`, which is for lost processes.
    """
    if world_size() == 1:
        return job()
    patient: Any = dist.new_group(timeout=datetime.timedelta(days=1), backend="gloo")
    first = raise_on_all_ranks(lambda: job() if local_rank() == 0 else None, patient)
    return raise_on_all_ranks(lambda: job() if local_rank() else first, patient)  # type: ignore[return-value]


@contextlib.contextmanager
def process_group(device: torch.device, timeout: int) -> Iterator[None]:
    """Join the processes that torchrun or `launch` has started; does nothing for a single process.

    Collectives of CPU tensors go through gloo, of CUDA tensors through NCCL. Where all processes are on one machine,
    they listen on loopback only, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME says otherwise. Raises UserError if
    the processes have not met within `timeout` seconds.
    """
    if not launched_processes():
        yield
        return
    file = os.environ.get(STORE)
    address = file or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    failure = f"{os.environ['WORLD_SIZE']} processes did not meet at {address} within timeout={timeout} s"
    hint = "" if file else " (something else may be listening there); use another port"
    watchdog = threading.Timer(3 * timeout, _end, [failure + hint])
    watchdog.daemon = True
    watchdog.start()
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        _listen_on_loopback()
    try:
        if file is None and os.environ["RANK"] != "0":
            _wait_for(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
            **_in_file(file, timeout) if file else {},
        )
    except (RuntimeError, ValueError) as error:
        raise _join_error(error, failure) from error
    finally:
        watchdog.cancel()
    try:
        yield
    except UserError as error:
        if error.shared:  # else the others are waiting for this process, and it would wait for them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _listen_on_loopback() -> None:
    """Make Gloo and NCCL listen on loopback only, unless the user has chosen an interface."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")  # without = this is a prefix of names


def _in_file(path: str, timeout: int) -> dict[str, Any]:
    """Arguments of `init_process_group` for a rendezvous in a file, without a store that listens on a port."""
    store = dist.FileStore(path, int(os.environ["WORLD_SIZE"]))
    store.set_timeout(datetime.timedelta(seconds=timeout))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _join_error(error: Exception, failure: str) -> UserError:
    """The error for the user when the processes could not join."""
    text = str(error)
    if "EADDRINUSE" in text:
        return UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: the port is taken; choose another (torchrun --master-port=,"
            " or --rdzv-backend=c10d --rdzv-endpoint=HOST:0, which finds a free one)"
        )
    if "GLOO_SOCKET_IFNAME" in os.environ and "address for:" in text:
        name = os.environ["GLOO_SOCKET_IFNAME"]
        return UserError(f"GLOO_SOCKET_IFNAME={name}: there is no such network interface; unset it, or name another")
    user_error = from_nccl_error(error) or from_machine_error(error)
    if user_error is not None:
        return user_error
    if reason := last_nccl_error(error):  # torch's processes have met, and NCCL's own connections fail
        advice = "see that the machines reach each other, and by which interface (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
        return RunError(f"NCCL cannot connect the processes: {reason[:200]}; {advice}")
    advice = "see that every machine runs the same command and reaches that address"
    if STORE in os.environ:
        advice = "a larger timeout= waits longer"
    return UserError(f"{failure} ({text.splitlines()[0][:200]}); {advice}")


def _wait_for(host: str, port: int, timeout: int) -> None:
    """Wait until something listens at the address; torch would print a C++ stack trace if nothing does."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(error.strerror or str(error)) from error
            time.sleep(0.2)


def _end(message: str) -> None:
    """End this process with a message while torch waits in C++, where no exception can be raised."""
    say(f"error: {message}", file=sys.stderr)
    os._exit(UserError.code)


def launched_processes() -> int:
    """The number of processes that a launcher has started, including this one; 0 if this is the only one."""
    size = int(os.environ["WORLD_SIZE"]) if under_launcher() else 1
    return size if size > 1 else 0


def limit_threads(processes: int) -> None:
    """Limit torch to this process's share of the CPU cores, which `processes` processes use."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))

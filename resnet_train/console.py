"""How a command ends, alone or as one of several processes: one line for an error, and the exit code."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any, NoReturn, TextIO

from resnet_train.errors import (
    SIGNALS,
    RunError,
    UserError,
    from_machine_error,
    from_nccl_error,
    is_peer_failure,
    name_keys,
    stop_early,
    under_launcher,
)
from resnet_train.terminal import printable, say


def fail(error: UserError) -> NoReturn:
    """Print the error from one process of each machine, and exit with its code."""
    if _rank() != "0" and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # else the launcher may end the process that prints before it has
    else:
        print_error(error)
    sys.exit(error.code)


def print_error(error: UserError) -> None:
    """Print the error as one line on stderr; only rank 0 prints an error that all processes share."""
    rank = _rank()
    if rank == "0" or not error.shared:
        who = "" if rank == "0" else f"rank {rank}: "
        say(f"error: {who}{_line(str(error))}", file=sys.stderr)


def exit_quietly() -> NoReturn:
    """Exit without a message: the reader of the output has ended, as in `resnet-train --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _line(text: str) -> str:
    """`text` as one printable line; a very long one is cut in the middle."""
    words = [word if len(word) <= 240 else f"{word[:120]}…{word[-40:]}" for word in text.split()]
    text = printable(" ".join(words))
    return text if len(text) <= 900 else f"{text[:500]} … {text[-300:]}"


def _rank() -> str:
    """The rank of this process as text, from the launcher's environment; 0 without a launcher."""
    return os.environ["RANK"] if under_launcher() else "0"


def launcher_world_size() -> int:
    """The number of processes that torchrun or our own launcher has started; 0 without one."""
    if not under_launcher():
        return 0
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]}: must be a whole number; unset it, or leave it to torchrun")
    return int(os.environ["WORLD_SIZE"])


def start_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with the signals blocked that Slurm or a terminal sends to a whole job.

    It ignores SIGINT and SIGTERM itself; the others would end it, with messages on stderr and leaked semaphores.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))


def check_restarts() -> None:
    """Refuse torchrun's restarts where they fail: its store keeps the addresses of the processes that have died."""
    restarts = launcher_world_size() > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts= needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and"
            " --rdzv-backend=c10d; else the processes started again may look for those that died"
        )


def load(import_path: str) -> Any:
    """Import the object that an import path such as `resnet_train.classification.run:train` names."""
    module, _, name = import_path.partition(":")
    return getattr(importlib.import_module(module), name)


def call(import_path: str, *arguments: Any) -> int:
    """Import the function that `import_path` names and call it in this process; return the exit code.

    An error about a file that is named in the configuration, the first argument, begins with its key.
    """

    def job() -> int | None:
        with name_keys(arguments[0] if arguments else None):
            return load(import_path)(*arguments)

    return exit_code(job)


def say_start(name: str, devices: int | str = 1, file: TextIO | None = None) -> None:
    """Print what is starting, on rank 0: importing torch takes seconds, and the work longer."""
    if _rank() == "0":
        several = "" if launcher_world_size() or devices == 1 else f" on devices={devices}"
        say(_line(f"{name}: starting{several}"), file=file)


def finish(
    job: Callable[[], int], config: Any, max_restarts: int = 0, name: str = "", file: TextIO | None = None
) -> NoReturn:
    """Run `job` and exit with its code: in this process, or in new ones for several devices without a launcher.

    With a `name`, the start is printed first.
    """
    if not launcher_world_size():
        for number in SIGNALS:
            signal.signal(number, stop_early)  # training sets its own handler once there is a state to save
    if name:
        say_start(name, config.devices, file)
    if launcher_world_size():
        code = job()
        # torchrun treats other codes as failures: it would restart all processes, or end the job with 1.
        _end(0 if code > 128 and "TORCHELASTIC_RUN_ID" in os.environ else code)
    if config.devices == 1 and not max_restarts:
        sys.exit(job())
    start_resource_tracker()
    from resnet_train.engine.launch import launch, pick_processes

    sys.exit(exit_code(lambda: launch(job, pick_processes(config.devices, config.device), max_restarts)))


def _end(code: int) -> NoReturn:
    """End a launcher's process as multiprocessing does, without tearing down the interpreter.

    During the teardown a thread of Gloo that releases a tensor waits for the interpreter's lock and aborts the process
    (pthread_exit through C++ frames), and the launcher would take a finished run for a failed one.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # the reader has ended
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def exit_code(job: Callable[[], int | None]) -> int:
    """Run `job` and return its exit code, 0 for None. Errors of the user or the machine become one line.

    Any other exception keeps its traceback. An error of this process alone exits here, without notice to the others.
    """
    failure: UserError | None
    try:
        return job() or 0
    except UserError as error:
        failure = error
    except BrokenPipeError:
        exit_quietly()
    except KeyboardInterrupt:  # the second Ctrl-C
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if launcher_world_size():
            _wait_if_peer_failed(error)
        failure = from_machine_error(error) or from_nccl_error(error)
        if failure is None:
            traceback.print_exc()
            sys.exit(1)
    print_error(failure)
    if failure.shared:
        return failure.code
    sys.exit(failure.code)


def _wait_if_peer_failed(error: Exception) -> None:
    """If `error` came from another process that ended, wait for the launcher to name that one and to end this one."""
    line = is_peer_failure(error)
    if line:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)
        resumes = "the same command resumes from the last checkpoint, if one was written"
        print_error(RunError(f"lost the other processes ({line[:200]}); {resumes}"))
        sys.exit(1)

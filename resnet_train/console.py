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
    """One line on stderr, from one process of each machine, and the error's exit code."""
    if _rank() != "0" and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # a launcher that saw this one's end first would end the one that tells before it has
    else:
        print_error(error)
    sys.exit(error.code)


def print_error(error: UserError) -> None:
    """One line on stderr; an error that all processes meet is the first one's to tell."""
    rank = _rank()
    if rank == "0" or not error.shared:
        who = "" if rank == "0" else f"rank {rank}: "
        say(f"error: {who}{_line(str(error))}", file=sys.stderr)


def exit_quietly() -> NoReturn:
    """End without a word: who read the output has gone, as in `resnet-train --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _line(text: str) -> str:
    """`text` as one line that a terminal can show; of what is very long, its beginning and its end."""
    words = [word if len(word) <= 240 else f"{word[:120]}…{word[-40:]}" for word in text.split()]
    text = printable(" ".join(words))
    return text if len(text) <= 900 else f"{text[:500]} … {text[-300:]}"


def _rank() -> str:
    """The number of this process among those that a launcher has started, as the launcher spells it."""
    return os.environ["RANK"] if under_launcher() else "0"


def launcher_world_size() -> int:
    """The number of processes that torchrun, Slurm or our own launcher has started; 0 outside of them."""
    if not under_launcher():
        return 0
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]}: must be a whole number; unset it, or leave it to torchrun")
    return int(os.environ["WORLD_SIZE"])


def start_resource_tracker() -> None:
    """Start Python's helper of spawned processes, deaf to what Slurm or a terminal sends to all processes of a job.

    It ignores SIGINT and SIGTERM by itself; of the others it would die, fill stderr and leave semaphores behind.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))


def check_restarts() -> None:
    """Refuse a torchrun whose restarts would not come off: with its store, the addresses of the dead outlive them."""
    restarts = launcher_world_size() > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts= needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and"
            " --rdzv-backend=c10d; else the processes started again may look for those that died"
        )


def load(place: str) -> Any:
    """What an import path names, as `resnet_train.classification.run:train` does."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def call(place: str, *arguments: Any) -> int:
    """Import what `place` names and call it in this process, alone or as one of several; the exit code.

    The line of an error about a file that the configuration, the first argument, names begins with its key.
    """

    def job() -> int | None:
        with name_keys(arguments[0] if arguments else None):
            return load(place)(*arguments)

    return exit_code(job)


def say_start(name: str, devices: int | str = 1, file: TextIO | None = None) -> None:
    """Say at once what starts, in one of the processes: torch takes seconds to load, and the work longer."""
    if _rank() == "0":
        several = "" if launcher_world_size() or devices == 1 else f" on devices={devices}"
        say(_line(f"{name}: starting{several}"), file=file)


def finish(
    job: Callable[[], int], config: Any, max_restarts: int = 0, name: str = "", file: TextIO | None = None
) -> NoReturn:
    """Exit with what `job` gives: here, as one of a launcher's processes, or in new processes for several devices.

    A job with a `name` says at once that it starts.
    """
    if not launcher_world_size():
        for number in SIGNALS:
            signal.signal(number, stop_early)  # training, once it has something to keep, has a handler of its own
    if name:
        say_start(name, config.devices, file)
    if launcher_world_size():
        code = job()
        # torchrun takes another exit code for a failure: it would start all again, or end the whole job with 1.
        _end(0 if code > 128 and "TORCHELASTIC_RUN_ID" in os.environ else code)
    if config.devices == 1 and not max_restarts:
        sys.exit(job())
    start_resource_tracker()
    from resnet_train.engine.launch import launch, pick_processes

    sys.exit(exit_code(lambda: launch(job, pick_processes(config.devices, config.device), max_restarts)))


def _end(code: int) -> NoReturn:
    """End one of a launcher's processes as multiprocessing ends its own: Python is not torn down.

    For that a thread of Gloo that lets go of a tensor just then aborts the process (pthread_exit through C++ frames,
    where it wants the interpreter's lock), and the launcher takes a finished run for a failed one.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def exit_code(job: Callable[[], int | None]) -> int:
    """The job's own exit code, 0 for none; one line for what the user or the machine lacks. Bugs keep their trace.

    An error that this process alone meets ends it here, without a word to those that wait for it but its end.
    """
    told: UserError | None
    try:
        return job() or 0
    except UserError as error:
        told = error
    except BrokenPipeError:
        exit_quietly()
    except KeyboardInterrupt:  # the second Ctrl-C
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if launcher_world_size():
            _lost(error)
        told = from_machine_error(error) or from_nccl_error(error)
        if told is None:
            traceback.print_exc()
            sys.exit(1)
    print_error(told)
    if told.shared:
        return told.code
    sys.exit(told.code)


def _lost(error: Exception) -> None:
    """Leave it to the launcher to end this process, if `error` came of the end of another, which it is to name."""
    line = is_peer_failure(error)
    if line:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)
        print_error(
            RunError(f"lost the other processes ({line[:200]}); the same command resumes from the last checkpoint")
        )
        sys.exit(1)

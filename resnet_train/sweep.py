"""Sweeps: each run in a process of its own; finished runs are skipped if they had the same data."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from resnet_train.config.run_dir import RunConfig, check_run_dir, check_same_data, run_state
from resnet_train.console import finish, load, start_resource_tracker
from resnet_train.errors import SIGNALS, RunError, UserError, from_machine_error
from resnet_train.files import read_object
from resnet_train.terminal import say

DIGESTS: dict[str, str] = {}  # of the jobs' data, as JSON of its configuration; computed when needed


def check_directory(directory: Path, config: RunConfig, data: str, sweep: bool) -> None:
    """Refuse a `directory` that this run cannot use. In a sweep it may hold the finished run, on the same data.

    `data` is the import path of the function that opens the data. Raises UserError.
    """
    check_run_dir(directory, config, may_be_finished=sweep)
    if run_state(directory) != "finished":
        return
    digest = read_object(directory / "summary.json").get("digest")
    if not isinstance(digest, str):
        raise UserError(f"run_dir={directory}: holds a finished run without a digest of its data; use another run_dir=")
    values = config.plain()["data"]
    key = json.dumps(values)
    if key not in DIGESTS:
        say(f"{directory}: finished; comparing its data with this sweep's")
        DIGESTS[key] = _digest(data, config)
    check_same_data(read_object(directory / "config.json")["data"], digest, values, DIGESTS[key], str(directory))


def _digest(data: str, config: Any) -> str:
    """The digest of the data of `config`, computed in a process of its own, as it needs torch. Raises UserError."""
    start_resource_tracker()
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send_digest, args=(send, data, config))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        process.join()
        raise RunError(f"the data cannot be read (exit code {process.exitcode})") from None
    process.join()
    if isinstance(result, UserError):
        raise result
    return str(result)


def _send_digest(send: Any, data: str, config: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    result: str | UserError
    try:
        result = load(data)(config).digest
    except UserError as error:
        result = error
    except Exception as error:
        failure = from_machine_error(error)
        if failure is None:
            raise
        result = failure
    send.send(result)


def run_in_process(job: Callable[[], int], config: Any, directory: Path) -> None:
    """Do one run of a sweep in a new process, so that no state leaks into the next run."""
    if run_state(directory) == "finished":
        say(f"{directory}: finished, skipped")
        return
    start_resource_tracker()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(job, config, directory))
    stopped: list[int] = []

    def forward(number: int, _: Any) -> None:
        stopped.append(number)
        if process.pid and number != signal.SIGINT:  # Ctrl-C in a terminal reaches the worker too
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    handlers = {number: signal.signal(number, forward) for number in SIGNALS}
    process.start()
    for number in tuple(stopped):  # received while the process was starting
        forward(number, None)
    process.join()
    for number, handler in handlers.items():
        signal.signal(number, handler)
        if number in stopped and callable(handler):  # the checkpoint is written: submitit's handler
            handler(number, None)  # requeues the job, Python's own ends the sweep
    assert process.exitcode is not None
    code = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode  # as in a shell
    if stopped or code - 128 in SIGNALS:  # a stopped sweep does not start its next job
        sys.exit(code or 128 + stopped[0])


def _work(job: Callable[[], int], config: Any, directory: Path) -> NoReturn:
    """Run the job and exit; if the sweep is killed, stop with a checkpoint, as on SIGTERM."""
    threading.Thread(target=_follow_sweep, daemon=True).start()
    run_and_exit(job, config, directory)


def _follow_sweep() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGTERM)


def run_and_exit(job: Callable[[], int], config: Any, directory: Path) -> NoReturn:
    """Run the job, with its restarts, and exit."""
    try:
        finish(job, config, config.max_restarts, name=str(directory))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C at exit would print a traceback


def conclude(directories: list[Path]) -> None:
    """Say what puts the runs of a finished sweep side by side.

    Raises RunError if some of them failed, here or where Hydra's launcher ran them.
    """
    failed = [str(directory) for directory in directories if run_state(directory) != "finished"]
    if failed:
        raise RunError(f"{len(failed)} of {len(directories)} jobs of the sweep did not finish: {', '.join(failed)}")
    if len(directories) > 1:
        above = os.path.commonpath([os.path.abspath(directory) for directory in directories])
        find_runs, own = load("resnet_train.report.folders:find_runs"), {path.resolve() for path in directories}
        alone = os.path.commonpath([above, os.getcwd()]) != above and find_runs([Path(above)]).keys() == own
        shown = [min(above, os.path.relpath(above), key=len)] if alone else map(str, directories)
        words = [shlex.quote(f"./{path}" if path.startswith("-") else path) for path in shown]
        say(f"{len(directories)} runs; side by side: resnet-report {' '.join(words)} out=report")

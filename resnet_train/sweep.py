"""A sweep: every run in a process of its own, unless it is finished already, on the same data."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
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

DIGESTS: dict[str, str] = {}  # of the data of this command's jobs, as far as they were needed


def check_place(directory: Path, config: RunConfig, data: str, sweep: bool) -> None:
    """Refuse a `directory` that cannot take this run. A sweep may find it finished, on the same data.

    `data` is the import path of what opens the data of a configuration. Raises UserError.
    """
    check_run_dir(directory, config, may_be_finished=sweep)
    if run_state(directory) != "finished":
        return
    was = read_object(directory / "summary.json").get("digest")
    if not isinstance(was, str):  # of an earlier version
        return
    values = config.plain()["data"]
    key = json.dumps(values)
    if key not in DIGESTS:
        say(f"{directory}: finished; comparing its data with this sweep's")
        DIGESTS[key] = _digest(data, config)
    check_same_data(read_object(directory / "config.json")["data"], was, values, DIGESTS[key], str(directory))


def _digest(data: str, config: Any) -> str:
    """The digest of the data of `config`, which takes torch, from a process of its own. Raises UserError."""
    start_resource_tracker()
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send_digest, args=(send, data, config))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        process.join()
        raise RunError(f"the data cannot be read (exit code {process.exitcode})") from None
    process.join()
    if isinstance(found, UserError):
        raise found
    return str(found)


def _send_digest(send: Any, data: str, config: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    found: str | UserError
    try:
        found = load(data)(config).digest
    except UserError as error:
        found = error
    except Exception as error:
        refused = from_machine_error(error)
        if refused is None:
            raise
        found = refused
    send.send(found)


def run_apart(job: Callable[[], int], config: Any, directory: Path) -> None:
    """One run of a sweep; in a process of its own, so that nothing leaks from one to the next."""
    if run_state(directory) == "finished":
        say(f"{directory}: finished, skipped")
        return
    start_resource_tracker()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(job, config, directory))
    stopped: list[int] = []

    def forward(number: int, _: Any) -> None:
        stopped.append(number)
        if process.pid and number != signal.SIGINT:  # a terminal sends Ctrl-C to the worker as well
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    process.start()
    for number in tuple(stopped):  # those that came while it was being started
        forward(number, None)
    process.join()
    for number, handler in before.items():
        signal.signal(number, handler)
        if number in stopped and callable(handler):  # now that the checkpoint is written: submitit's puts the job back
            handler(number, None)  # in the queue, Python's own ends the sweep
    assert process.exitcode is not None
    code = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode  # as a shell counts
    if stopped or code - 128 in SIGNALS:  # a sweep that is cut does not continue with its next job
        sys.exit(code or 128 + stopped[0])


def _work(job: Callable[[], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit; where the sweep itself is killed, with a checkpoint, as on SIGTERM."""
    threading.Thread(target=_follow_sweep, daemon=True).start()
    run_here(job, config, directory)


def _follow_sweep() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGTERM)


def run_here(job: Callable[[], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit."""
    try:
        finish(job, config, config.max_restarts, name=str(directory))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop, and one more Ctrl-C would leave a trace


def check_all_finished(places: list[Path]) -> None:
    """Tell at a sweep's end which of its runs in `places` failed, here or wherever the launcher ran them."""
    failed = [str(place) for place in places if run_state(place) != "finished"]
    if failed:
        raise RunError(f"{len(failed)} of {len(places)} jobs of the sweep did not finish: {', '.join(failed)}")

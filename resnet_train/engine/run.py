"""One run of a task from its directory's first file to its last: opened or resumed, trained, summed up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from resnet_train.config.train import check_divisible
from resnet_train.engine.compute import pick_device, pick_precision
from resnet_train.engine.distributed import (
    all_reduce_sum,
    is_main,
    on_rank_zero,
    process_group,
    raise_on_all_ranks,
    world_size,
)
from resnet_train.engine.environment import peak_memory
from resnet_train.engine.logger import MetricsLogger, prepare_process
from resnet_train.engine.loop import Clock, Stop, log_evaluation, loop
from resnet_train.engine.metrics import count_replaced, describe_replaced, read_metrics
from resnet_train.engine.resume import before_restart, begin_run, claim_run
from resnet_train.engine.task import Task, TaskConfig
from resnet_train.errors import UserError, is_peer_failure
from resnet_train.files import nearest_existing, remove_empty, write_json
from resnet_train.terminal import say


class Data(Protocol):
    """The images of a task."""

    digest: str


C = TypeVar("C", bound=TaskConfig)
D = TypeVar("D", bound=Data)


def check_compute(batch_size: int, device: str, precision: str) -> torch.device:
    """This process's device. Refuses a division of the batch or a precision that cannot be had. Raises UserError."""
    check_divisible(batch_size, world_size())
    found = pick_device(device)
    pick_precision(precision, found)
    return found


def run(
    config: C,
    directory: Path,
    *,
    command: str,
    open_data: Callable[[C], D],
    build: Callable[[C, D, torch.device, dict[str, Any] | None], Task],
    kind: str = "net",
) -> int:
    """Train a task in `directory`, resuming a run that was cut there, and sum it up. The exit code.

    `kind` is that of its checkpoints. `open_data` reads the data; `build` makes the task, from a checkpoint's state
    where one is resumed, and talks to no other process. 0: finished; 128 and a signal's number: stopped by it, with a
    checkpoint. Raises UserError and RunError. Several processes do this together, and the first alone writes and
    prints.
    """
    prepare_process()
    device = pick_device(config.device)
    with process_group(device, config.timeout), contextlib.ExitStack() as held:
        restarts = int(all_reduce_sum(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))))
        before = on_rank_zero(lambda: before_restart(directory, restarts))
        if before == "finished":  # a process died after all was done
            return 0
        resume = config.resume if before == "new" else "auto"
        config = dataclasses.replace(config, devices=world_size(), resume=resume)  # type: ignore[type-var]
        data = open_data(config)
        above = nearest_existing(directory)
        state = on_rank_zero(lambda: claim_run(config, directory, data.digest, held, kind))
        try:
            task = raise_on_all_ranks(lambda: build(config, data, device, state))
            environment = on_rank_zero(lambda: begin_run(task, directory, state, command, data.digest))
        except UserError:
            if is_main():
                remove_empty(directory, above)
            raise
        _announce(task, directory, state)
        clock = Clock(task.iteration)
        if world_size() > 1:
            task.wrap_ddp()  # with a first pass, which compiles; a signal still ends all at once
        stop, start = Stop(), task.iteration
        logger = _open_logger(task, directory)
        clock.seconds = logger.seconds
        try:
            with contextlib.closing(logger):
                loop(task, directory, logger, clock, stop, None if state is None else start)
                stop.settle()
                finished = task.iteration == config.iterations
                if finished and on_rank_zero(lambda: logger.lacks(task.iteration, *task.splits)):
                    log_evaluation(task, directory, logger, clock)  # it was measured, and the record was lost
            if not finished:
                return _stopped(task, stop)
            on_rank_zero(lambda: _summarise(task, directory, clock, environment))
            return 0
        except RuntimeError as error:
            # Another has died, and the launcher, which names it, ends this one.
            if world_size() > 1 and stop.signal and is_peer_failure(error):
                sys.exit(1)
            if not (stop.signal and _of_the_compiler(error)):
                raise
            return _stopped_compiling(task, stop, directory)


def _stopped_compiling(task: Task, stop: Stop, directory: Path) -> int:
    """The signal was for the compiler's own processes as well. Nothing has come of this iteration."""
    if is_main():
        begun = (directory / "checkpoints" / "last.pt").exists()
        how = "resumes from the last checkpoint" if begun else "begins again"
        say(f"stopped after iteration {task.iteration}, while compiling; the same command {how}")
    return 128 + stop.signal


def _announce(task: Task, directory: Path, state: dict[str, Any] | None) -> None:
    if not is_main():
        return
    first, *more = task.describe()
    say(f"{first}; {directory}")
    for line in more:
        say(line)
    if state is not None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        after = f", restart {attempt} after the death of a process" if attempt != "0" else ""
        say(f"resuming from iteration {task.iteration}{after}")
        for line in task.describe_changes(state):
            say(line)
    sys.stdout.flush()


def _open_logger(task: Task, directory: Path) -> MetricsLogger:
    """The logger of the run in `directory` from the task's iteration on; it writes in the first process alone."""
    config, names = task.config, {"data": task.label, "seed": task.config.seed}
    place = directory if is_main() else None
    logger = MetricsLogger(place, names, task.iteration, config.iterations, config.log_every)
    if task.reference is not None:
        logger.log_reference(task.reference, config.iterations)
    return logger


def _stopped(task: Task, stop: Stop) -> int:
    """Print where a signal has stopped the run; return its exit code."""
    if is_main():
        how = "the same command" if task.config.resume == "auto" else "the same command with resume=auto"
        say(f"stopped at iteration {task.iteration}, checkpoint written; {how} resumes there")
    return 128 + stop.signal


def _of_the_compiler(error: BaseException | None) -> bool:
    """Whether torch's compiler has raised `error`, or what it came of."""
    while error is not None:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo", "concurrent.futures")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _summarise(task: Task, directory: Path, clock: Clock, environment: dict[str, Any]) -> None:
    """summary.json, which marks the run as finished, the picture, and the result in a line."""
    metrics, picture = read_metrics(directory / "metrics.jsonl"), directory / "curves.png"
    summary = {
        **task.summary(metrics),
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(task.device),
        "precision": task.precision,
        "compile": task.compiled,
        **environment,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    drawn = task.draw(metrics, picture)
    write_json(directory / "summary.json", summary)  # last: it marks the run as finished
    say("; ".join(filter(None, [task.conclude(summary), describe_replaced(count_replaced(metrics))])))
    say(f"{f'curves: {picture}; ' if drawn else ''}tensorboard --logdir {shlex.quote(str(directory))}")

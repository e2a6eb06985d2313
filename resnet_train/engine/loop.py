"""The training loop around a task's step, and what happens at its points."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_train.engine import checkpoint
from resnet_train.engine.distributed import all_reduce_sum, for_all_ranks, on_rank_zero, world_size
from resnet_train.engine.logger import MetricsLogger, message
from resnet_train.engine.task import Task
from resnet_train.errors import PARENT, SIGNALS, RunError, leave_terminal

T = TypeVar("T")


def loop(
    task: Task, directory: Path, logger: MetricsLogger, clock: Clock, stop: Stop, saved_at: int | None = None
) -> None:
    """All iterations that are left, or those until a signal; leaves a checkpoint of the last one in either case.

    `saved_at` is the iteration of the checkpoint that is there already. Raises RunError for a loss or a weight that is
    not finite, and where nothing can be written.
    """
    config, batches, first = task.config, task.batches(), task.iteration + 1
    while task.iteration < config.iterations and not stop.agreed():
        batch = clock.next_of(batches)
        lr = task.learning_rate()
        task.step(batch, lr)
        logger.bar.update()
        if task.compiled and task.iteration == first:
            message(f"compiled in {time.perf_counter() - clock.mark:.0f} s")

        last = task.iteration == config.iterations
        if last or task.iteration % config.log_every == 0:
            log_training(task, directory, logger, clock, lr)
        if last or task.iteration % config.eval_every == 0:
            log_evaluation(task, directory, logger, clock)
        best = task.iteration == task.best_at  # with its best.pt: repeated iterations could differ on a GPU
        if last or task.iteration % config.checkpoint_every == 0 or _is_kept(task) or best:
            save(task, directory, logger, clock)
            saved_at = task.iteration
    if saved_at != task.iteration:
        save(task, directory, logger, clock)


def log_training(task: Task, directory: Path, logger: MetricsLogger, clock: Clock, lr: float) -> None:
    """A point of the training curve."""
    check_finite(task, directory)
    values = task.train_point()
    clock.lap(training=True)
    logger.log(
        "train",
        task.iteration,
        epoch=task.epoch,
        **values,
        lr=lr,
        images_per_second=(task.iteration - clock.since) * task.config.batch_size / clock.training,
        waited=clock.waited / clock.training,  # the share of the time that the data took
        seconds=clock.seconds,
    )
    clock.restart(task.iteration)


def log_evaluation(task: Task, directory: Path, logger: MetricsLogger, clock: Clock) -> None:
    """A point of each other curve; keeps the best checkpoint, by the validation error alone, and the final figures."""
    clock.lap(training=True)
    for point in task.evaluate():
        logger.log(point.split, task.iteration, words=point.words, epoch=task.epoch, **point.values)
        for name, image in point.images:
            logger.log_image(task.iteration, name, image)
        if point.split == "val" and task.best_at == task.iteration:
            check_finite(task, directory)
            on_rank_zero(functools.partial(checkpoint.save, directory / "checkpoints" / "best.pt", task.state()))
        if point.split == "test" and task.iteration == task.config.iterations:
            logger.log_hyper_parameters(task.iteration, task.hyper_parameters(), point.values)
    clock.lap(training=False)


def save(task: Task, directory: Path, logger: MetricsLogger, clock: Clock) -> None:
    """Write last.pt (the one before becomes previous.pt) and, where asked, the checkpoint to keep for good."""
    clock.lap(training=True)
    check_finite(task, directory)
    state, folder = task.state(), directory / "checkpoints"

    def write() -> None:
        logger.flush()
        if _is_kept(task):  # before last.pt: a run that is killed in between makes it again
            checkpoint.save(folder / f"iteration-{task.iteration:07d}.pt", state)
        checkpoint.save(folder / "last.pt", state, keep_as=folder / "previous.pt")

    on_rank_zero(write)
    clock.lap(training=False)


def _is_kept(task: Task) -> bool:
    return task.config.keep_every > 0 and task.iteration % task.config.keep_every == 0


def check_finite(task: Task, directory: Path) -> None:
    """Raise RunError if a loss since the last logged point or a weight is not finite, in any process."""
    if all_reduce_sum(count_not_finite(task.losses, task.model)):
        kept = (directory / "checkpoints" / "last.pt").exists()
        raise for_all_ranks(
            RunError(
                f"the loss is not finite at iteration {task.iteration} or shortly before;"
                + (f" {directory}/checkpoints holds the last good state;" if kept else "")
                + f" use a lower {task.key_of_lr}= in a new run"
                + (", or precision=fp32" if task.precision in ("bf16", "fp16") else "")
            )
        )


@torch.no_grad()
def count_not_finite(losses: Tensor, model: nn.Module) -> Tensor:
    """How many of `losses` and of the parameters, each as a whole, are not finite: int64, on the device."""
    largest = torch._foreach_norm(list(model.parameters()), math.inf)  # of each its largest, in a few kernels for all
    return (~torch.cat([torch.stack(largest), losses.flatten()]).isfinite()).sum()


class Stop:
    """Set by Ctrl-C and the other `SIGNALS`: the loop ends at an iteration boundary, in all processes the same.

    The end of the launcher counts as SIGTERM. A second Ctrl-C ends a single process at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.parent = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.pending: tuple[Any, Tensor] | None = None
        for number in SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, _: Any) -> None:
        self.signal = number
        if number == signal.SIGHUP:
            leave_terminal()
        if self.parent is None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether all end here; asked by each between iterations. A signal to one of several ends all one later.

        The question goes round while the next iteration is computed, so that nobody waits for the answer.
        """
        if self.parent not in (None, os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        if world_size() == 1:
            return self.signal != 0
        if self.pending is not None:
            work, answer = self.pending
            work.wait()
            if answer:
                self.signal = int(answer)
                return True
        answer = torch.tensor(self.signal)
        self.pending = torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, async_op=True), answer
        return False

    def settle(self) -> None:
        """Wait for the last question, to which nobody wants the answer; called by all, after the loop.

        Signal handlers keep this object to the end of the process. With it a question in flight would keep threads of a
        process group that is gone, and the process could abort as it ends.
        """
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None


class Clock:
    """Wall time of a run, which took `seconds` so far, and of training since the last point or this process's start."""

    def __init__(self, iteration: int, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.mark = time.perf_counter()
        self.restart(iteration)

    def restart(self, iteration: int) -> None:
        """Count training from `iteration` on."""
        self.training, self.since = 0.0, iteration
        self.waited = 0.0  # of the training, for the next batch

    def next_of(self, batches: Iterator[T]) -> T:
        """The next batch, waited for by the clock."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def lap(self, *, training: bool) -> None:
        """Book the time since the last call and, where it was spent on iterations, to training."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.training += (now - self.mark) * training
        self.mark = now

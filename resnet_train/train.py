"""The training step, the loop around it, and what happens at its logged points."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train import checkpoint
from resnet_train.batchnorm import update_statistics
from resnet_train.build import logits_of, pick_eval_batch
from resnet_train.config.training import Config, Share
from resnet_train.data.sets import MemorySets, StreamedSets
from resnet_train.distributed import from_main, rank, shared, total, world
from resnet_train.errors import PARENT, SIGNALS, RunError, leave_terminal
from resnet_train.evaluate import count_errors, wrong_answers
from resnet_train.models.resnet import ResNet
from resnet_train.record import Record
from resnet_train.schedule import Progress, end_warmup, learning_rate, watch_plateau

T = TypeVar("T")
WINDOW = 100  # iterations whose training error may end the warm-up, or fewer if it need not last as long
# What a checkpoint says of the keys that have no say in what a run computes, nor in how it is dealt to devices.
INDIFFERENT = {"run_dir": None, "resume": "auto", "max_restarts": 0, "timeout": 600}


class Meters:
    """Sums over the training batches since the last logged point, kept on the device and read seldom.

    A row for each process, which adds to its own; together they are all batches. A loss that is not finite makes the
    sum so, for good: the sum is its own flag.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros(world(), dtype=torch.float64, device=device)
        self.wrong = torch.zeros(world(), 2, dtype=torch.int64, device=device)  # top-1, top-5
        self.seen = 0  # in all processes
        self.skipped = 0  # broken images that others stood in for, in this process

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch, of which `_count` counts the images; no synchronisation with the device."""
        self.loss[rank()] += loss * len(labels)
        self.wrong[rank()] += wrong_answers(logits, labels)

    def reset(self) -> None:
        """Begin anew, in place: a captured step adds to these very tensors."""
        self.loss.zero_()
        self.wrong.zero_()
        self.seen = self.skipped = 0

    def state(self) -> dict[str, Any]:
        """For the checkpoint, and to read: the rows of all processes. All of them call this."""
        loss, wrong = total(self.loss.clone()).cpu(), total(self.wrong.clone()).cpu()
        return {"loss": loss, "wrong": wrong, "seen": self.seen, "skipped": int(total(torch.tensor(self.skipped)))}

    def load(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.seen, self.skipped = state["seen"], state.get("skipped", 0) if rank() == 0 else 0
        for name, rows in (("loss", self.loss), ("wrong", self.wrong)):
            take_rows(rows, state[name])


def take_rows(rows: Tensor, stored: Tensor) -> None:
    """Put this process's row of sums in its place; if there are now other processes than then, all in the first's."""
    rows.zero_()
    if len(stored) == world():
        rows[rank()] = stored[rank()]
    elif rank() == 0:
        rows[0] = stored.sum(0)


@dataclasses.dataclass
class Run:
    """One run: what it was given, and what training changes and a checkpoint holds."""

    config: Config
    directory: Path
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    compiled: bool
    sets: MemorySets | StreamedSets
    mean: Tensor
    model: ResNet
    net: nn.Module  # the model, or around it what exchanges gradients between processes
    share: Share
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meters: Meters
    progress: Progress
    iteration: int = 0
    best: float = math.inf  # the lowest validation error so far, in %
    best_at: int = 0
    saved_at: int = -1  # the iteration of last.pt
    seconds: float = 0.0  # wall time; kept in the metrics, not in the checkpoint, which is the same in every run

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only."""
        return {
            "config": self.config.plain() | INDIFFERENT,  # the same file in any directory, however often it was cut
            "classes": self.sets.classes,
            "label": self.sets.label,
            "digest": self.sets.digest,
            "measure": {"precision": self.precision, "compile": self.compiled, "bn_images": self.share.group},
            "mean": self.mean.cpu(),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": self.meters.state(),
            "progress": dataclasses.asdict(self.progress),
            "best": [self.best, self.best_at],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.mean = state["mean"].to(self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.meters.load(state["meters"])
        self.progress = Progress(**state["progress"])
        self.best, self.best_at = state["best"]
        self.iteration = self.saved_at = state["iteration"]

    @property
    def epoch(self) -> float:
        """Passes over the training part so far."""
        return self.iteration * self.config.batch_size / self.sets.sizes["train"]


class Stop:
    """Set by Ctrl-C and the other `SIGNALS`: the loop ends at an iteration boundary, in all processes the same.

    The end of the launcher counts as SIGTERM. A second Ctrl-C ends a single process at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.parent = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.asked: tuple[Any, Tensor] | None = None
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
        if world() == 1:
            return self.signal != 0
        if self.asked is not None:
            work, answer = self.asked
            work.wait()
            if answer:
                self.signal = int(answer)
                return True
        answer = torch.tensor(self.signal)
        self.asked = torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, async_op=True), answer
        return False


class Timed(Protocol):
    """A run that keeps its wall time."""

    seconds: float


class Clock:
    """Wall time of the run, and of training alone since the last logged point or the start of this process."""

    def __init__(self, iteration: int) -> None:
        self.mark = time.perf_counter()
        self.training, self.since = 0.0, iteration
        self.waited = 0.0  # of the training, for the next batch

    def next_of(self, batches: Iterator[T]) -> T:
        """The next batch, waited for by the clock."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def lap(self, run: Timed, *, training: bool) -> None:
        """Book the time since the last call to the run and, where it was spent on iterations, to training."""
        now = time.perf_counter()
        run.seconds += now - self.mark
        self.training += (now - self.mark) * training
        self.mark = now


def step(run: Run, images: Tensor, labels: Tensor, lr: float | Tensor) -> None:
    """One iteration on this process's share of a batch: forward, backward, update. Nothing waits for the device.

    A share of several parts is accumulated, its gradients exchanged between processes with the last of them.
    """
    _set_rate(run, lr)
    passes = run.share.passes
    for part, (some, truth) in enumerate(zip(images.chunk(passes), labels.chunk(passes), strict=True), 1):
        with contextlib.nullcontext() if part == passes or world() == 1 else run.net.no_sync():  # type: ignore[operator]
            logits = logits_of(run.net, some, run.precision)
            loss = F.cross_entropy(logits, truth)
            run.scaler.scale(loss / passes).backward()
        run.meters.add(loss.detach(), logits.detach(), truth)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    update_statistics(run.model, run.config.batch_size // run.share.group)
    _count(run)


def _set_rate(run: Run, lr: float | Tensor) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = lr


def _count(run: Run) -> None:
    run.meters.seen += run.config.batch_size
    run.iteration += 1


class CapturedStep:
    """`step`, the making of its batch included, as one CUDA graph: otherwise a small net has its GPU wait for launches.

    The graph reads what changes from iteration to iteration, the draws of a batch (`MemorySets.draw_batches`) and the
    learning rate, from two tensors, and changes weights, momentum, statistics and meters where they lie.
    """

    UNCAPTURED = 3  # first steps: compiling, choosing convolution algorithms and making momentum cannot be captured

    def __init__(self, run: Run, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.run, self.make = run, make
        self.draws = torch.zeros(4, run.config.batch_size, dtype=torch.int64, device=run.device)
        self.lr = torch.zeros((), device=run.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(run.device)
        self.calls = 0

    def __call__(self, draws: Tensor, lr: float) -> None:
        """One iteration with the batch that `draws` (4, B), in pinned memory, says. Nothing waits for the device."""
        self.draws.copy_(draws, non_blocking=True)
        self.lr.fill_(lr)
        self.calls += 1
        if self.calls <= self.UNCAPTURED:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step(self.run, *self.make(self.draws), self.lr)
            torch.cuda.current_stream().wait_stream(self.stream)
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):  # computes nothing yet
                step(self.run, *self.make(self.draws), self.lr)
            self.graph.replay()
        else:
            self.graph.replay()
            _count(self.run)
        _set_rate(self.run, lr)  # a number again, for the checkpoint


def prepare_steps(run: Run) -> tuple[Iterator[tuple[Tensor, ...]], Callable[..., None]]:
    """The training batches from the run's iteration on, and the function that makes a step of one and a rate.

    On one GPU, with images in memory, in one pass and without fp16's scaler, the step is captured.
    """
    options: dict[str, Any] = {
        "seed": run.config.seed,
        "batch_size": run.config.batch_size,
        "augment": dataclasses.asdict(run.config.augment),
        "start": run.iteration,
    }
    one_pass = run.share.passes == 1 and not run.scaler.is_enabled() and not run.model.recompute
    if run.device.type == "cuda" and world() == 1 and isinstance(run.sets, MemorySets) and one_pass:
        make = run.sets.batch_maker(run.mean, run.device, run.config.augment.pad)
        return ((draws,) for draws in run.sets.draw_batches(run.device, **options)), CapturedStep(run, make)
    batches = run.sets.train_batches(run.mean, run.device, **options, rank=rank(), world=world())
    return batches, functools.partial(step, run)


def rate(config: Config, iteration: int, progress: Progress) -> float:
    """The learning rate of the step after `iteration` steps."""
    schedule = config.schedule
    return learning_rate(
        iteration,
        config.iterations,
        progress,
        name=schedule.name,
        lr=schedule.lr,
        warmup_lr=config.warmup.lr,
        factor=schedule.factor,
        drops=schedule.drops,
    )


def loop(run: Run, record: Record, stop: Stop) -> None:
    """All iterations that are left, or those until a signal; leaves a checkpoint of the last one in either case."""
    config, clock = run.config, Clock(run.iteration)
    batches, take = prepare_steps(run)
    first = run.iteration + 1
    while run.iteration < config.iterations and not stop.agreed():
        batch = clock.next_of(batches)
        run.meters.skipped += run.sets.skipped
        lr = rate(config, run.iteration, run.progress)
        take(*batch, lr)
        record.bar.update()
        if run.progress.warm:
            watch_warmup(run)
        if run.compiled and world() == 1 and run.iteration == first:
            record.say(f"compiled in {time.perf_counter() - clock.mark:.0f} s")

        last = run.iteration == config.iterations
        if last or run.iteration % config.log_every == 0:
            log_training(run, record, clock, lr)
        if last or run.iteration % config.eval_every == 0:
            log_test(run, record, clock)
        if last:
            record.hyper_parameters(run.iteration, _hyper_parameters(run))
        if last or run.iteration % config.checkpoint_every == 0 or _kept(run):
            save(run, record, clock)
    if run.saved_at != run.iteration:
        save(run, record, clock)


def log_training(run: Run, record: Record, clock: Clock, lr: float) -> None:
    """A point of the training curve: error and loss of the augmented batches in training mode since the last point.

    Here the plateau drops. Raises RunError for a loss that is not finite.
    """
    config, sums = run.config, run.meters.state()
    require_finite(run)
    (wrong, wrong5), loss, seen = sums["wrong"].sum(0).tolist(), sums["loss"].sum().item(), sums["seen"]
    clock.lap(run, training=True)
    error = 100 * wrong / seen
    values = {"error": error, **({"error5": 100 * wrong5 / seen} if run.sets.top5 else {})}
    record.point(
        "train",
        run.iteration,
        epoch=run.epoch,
        loss=loss / seen,
        **values,
        lr=lr,
        images_per_second=(run.iteration - clock.since) * config.batch_size / clock.training,
        waited=clock.waited / clock.training,  # the share of the time that the data took
        **({"skipped": sums["skipped"]} if config.data.broken == "skip" else {}),
        seconds=run.seconds,
        protocol="augmented batches in training mode",
    )
    if run.progress.warm:
        run.progress.recent += wrong
    if config.schedule.watch == "train":
        _watch(run, error)
    chance = 100 - 100 / len(run.sets.classes)
    tenth = config.iterations / 10
    if error > 0.98 * chance and run.iteration - config.log_every < tenth <= run.iteration:
        record.say(f"warning: a tenth of the run is over and the training error is still at chance ({chance:.1f} %)")
    clock.training, clock.waited, clock.since = 0.0, 0.0, run.iteration
    run.meters.reset()


def watch_warmup(run: Run) -> None:
    """End the warm-up where the training error of the last `WINDOW` iterations is low enough (section 4.2)."""
    warmup, iteration = run.config.warmup, run.iteration
    window = min(WINDOW, warmup.iterations or WINDOW)
    if iteration % window:
        return
    wrong = int(run.meters.state()["wrong"][:, 0].sum())
    error = 100 * (run.progress.recent + wrong) / (window * run.config.batch_size)
    run.progress.recent = -wrong  # these are not of the next window, though the next logged point counts them
    end_warmup(run.progress, iteration, error, below=warmup.error, at_least=warmup.iterations)


def log_test(run: Run, record: Record, clock: Clock) -> None:
    """A point of the test curve, and of the validation curve if a part is held out, which alone chooses `best`."""
    clock.lap(run, training=True)
    for split in ("val", "test") if run.sets.sizes["val"] else ("test",):
        batches = run.sets.eval_batches(
            split, run.mean, run.device, pick_eval_batch(run.config, run.device), rank(), world()
        )
        count = count_errors(run.model, batches, run.precision, run.sets.sizes[split])
        record.point(
            split,
            run.iteration,
            epoch=run.epoch,
            loss=count.loss,
            error=count.error,
            **({"error5": count.error5} if run.sets.top5 else {}),
            wrong=count.wrong,
            seen=count.seen,
            protocol=run.sets.protocol,
        )
        if split == "val":
            if run.config.schedule.watch == "val":
                _watch(run, count.error)
            if count.error < run.best:
                run.best, run.best_at = count.error, run.iteration
                require_finite(run)
                from_main(functools.partial(checkpoint.save, run.directory / "checkpoints" / "best.pt", run.state()))
    clock.lap(run, training=False)


def _hyper_parameters(run: Run) -> dict[str, str | bool | int | float]:
    """Those that runs are told apart by, for TensorBoard's table of runs."""
    config = run.config
    keys = ("arch", "depth", "shortcut", "seed", "iterations", "batch_size", "momentum", "weight_decay")
    found = {"data": run.sets.label, "validation": config.data.validation, "precision": run.precision}
    return {
        **found,
        **{key: getattr(config, key) for key in keys},
        "schedule": config.schedule.name,
        "lr": config.schedule.lr,
    }


def _watch(run: Run, error: float) -> None:
    schedule, iterations = run.config.schedule, run.config.iterations
    if schedule.name == "plateau":
        patience = schedule.patience * iterations
        watch_plateau(run.progress, run.iteration, error, patience=patience, threshold=schedule.threshold)


def _kept(run: Run) -> bool:
    return run.config.keep_every > 0 and run.iteration % run.config.keep_every == 0


def save(run: Run, record: Record, clock: Clock) -> None:
    """Write last.pt (the one before becomes previous.pt) and, where asked, the checkpoint to keep for good."""
    clock.lap(run, training=True)
    require_finite(run)
    state, folder = run.state(), run.directory / "checkpoints"

    def write() -> None:
        record.flush()
        if _kept(run):  # before last.pt: a run that is killed in between makes it again
            checkpoint.save(folder / f"iteration-{run.iteration:07d}.pt", state)
        checkpoint.save(folder / "last.pt", state, keep_as=folder / "previous.pt")

    from_main(write)
    run.saved_at = run.iteration
    clock.lap(run, training=False)


def require_finite(run: Run) -> None:
    """Raise RunError if a loss since the last logged point or a weight is not finite, in any process."""
    check_finite(run.meters.loss, run.model, run.iteration, run.directory, "schedule.lr=", run.precision)


@torch.no_grad()
def check_finite(losses: Tensor, model: nn.Module, iteration: int, directory: Path, key: str, precision: str) -> None:
    """Raise RunError if a loss or a weight is not finite, in any process; `key` is that of the learning rate."""
    largest = torch._foreach_norm(list(model.parameters()), math.inf)  # of each its largest, in a few kernels for all
    if total((~torch.cat([torch.stack(largest), losses.flatten()]).isfinite()).sum()):
        kept = (directory / "checkpoints" / "last.pt").exists()
        raise shared(
            RunError(
                f"the loss is not finite at iteration {iteration} or shortly before;"
                + (f" {directory}/checkpoints holds the last good state;" if kept else "")
                + f" take a lower {key} in a new run"
                + (", or precision=fp32" if precision in ("bf16", "fp16") else "")
            )
        )

"""What detection and localization share of a task: a network that learns boxes by the sum of several losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from resnet_train.config.boxes import BoxConfig
from resnet_train.config.run_dir import as_stored
from resnet_train.engine import checkpoint, schedule
from resnet_train.engine.compute import pick_precision, precision_of, sgd, to_device
from resnet_train.engine.distributed import all_reduce_sum, is_main, rank, restore_rank_sums, world_size


class ImageSets(Protocol):
    """The images of the training and of the test part."""

    classes: list[str]
    faults: dict[str, int]  # what was cut or left out, counted by kind
    digest: str
    first_faults: dict[str, str]  # where the first of each kind of fault is, and what

    @property
    def train(self) -> Sized:
        """Those of the training part."""

    @property
    def test(self) -> Sized:
        """Those of the test part."""


@dataclass(kw_only=True)
class BoxTask:
    """A network in training on its data: what it was given, and what training changes and a checkpoint holds."""

    config: BoxConfig
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    data: ImageSets
    model: nn.Module
    net: nn.Module  # the model, or around it what averages gradients over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    names: tuple[str, ...]  # of the losses
    losses: Tensor  # sums since the last logged point, a row for each process; on the device, read seldom
    iteration: int = 0
    skipped: int = 0  # broken images that others stood in for since the last logged point, in this process
    printed: set[str] = dataclasses.field(default_factory=set)  # the lines of broken images that have been printed
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the last test
    compiled = False
    best_at = 0  # nothing is held out
    reference = None
    key_of_lr = "lr"
    splits = ("test",)

    @property
    def label(self) -> str:
        """The name of the data in every record."""
        return self.config.data_label

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.iteration * self.config.batch_size / len(self.data.train)

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.iteration, self.config)

    def loading(self) -> dict[str, Any]:
        """How this process's part of the training batches that are left is loaded."""
        return {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "iterations": range(self.iteration, self.config.iterations),
            "workers": self.config.data.workers,
            "skip": self.config.data.broken == "skip",
            "device": self.device,
            "rank": rank(),
            "world": world_size(),
        }

    def count_skipped(self, broken: list[str]) -> list[str]:
        """Count the images of a batch that others stand in for; those of their lines that are to be printed, once."""
        new = sorted({*broken} - self.printed)
        self.skipped += len(broken)
        self.printed.update(new)
        return new

    @property
    def measure(self) -> dict[str, Any]:
        """How the network computes."""
        return {"precision": self.precision}

    def train_point(self) -> dict[str, Any]:
        """The mean losses since the last point."""
        steps = (self.iteration - 1) % self.config.log_every + 1
        means = (all_reduce_sum(self.losses.clone()).sum(0) / (world_size() * steps)).tolist()
        skipped = {"skipped": self._skipped()} if self.config.data.broken == "skip" else {}
        self.losses.zero_()
        self.skipped = 0
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True)), **skipped}

    def _skipped(self) -> int:
        """Broken images since the last point, in all processes."""
        return int(all_reduce_sum(torch.tensor(self.skipped, device=self.device)))

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that is not the task's own. All processes call this."""
        return {
            "config": as_stored(self.config),
            "classes": self.data.classes,
            "label": self.label,
            "digest": self.data.digest,
            "measure": self.measure,
            "iteration": self.iteration,
            "measured": self.measured if self.iteration == self.config.iterations else {},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": all_reduce_sum(self.losses.clone()).cpu(),
            "skipped": self._skipped(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        # Each process adds a mean over its own images: of more or fewer processes the sum is more or less.
        restore_rank_sums(self.losses, state["sums"] * (world_size() / len(state["sums"])))
        self.iteration, self.measured = state["iteration"], state["measured"]
        self.skipped = state["skipped"] if is_main() else 0

    def begin_files(self) -> dict[str, Any]:
        """None."""
        return {}

    def describe_data(self) -> str:
        """What is learned from, for how long, and in what."""
        config, data = self.config, self.data
        return (
            f"{self.label}: {len(data.train)} training images, {len(data.test)} for the test, {len(data.classes)}"
            f" classes; {config.iterations} iterations of {config.batch_size}; {self.precision} on {self.device}"
        )

    def describe_tested(self, images: int) -> str:
        """The number of images that the last test was of, and of those that it left out."""
        left_out = len(self.data.test) - images
        return f"{images} images" + (f" ({left_out} broken left out)" if left_out else "")

    def describe_faults(self) -> list[str]:
        """Lines to print of what was cut or left out."""
        return [f"warning: {line}" for line in fault_lines(self.data)]


def fault_lines(data: ImageSets) -> list[str]:
    """How many there are of each kind of fault, and where the first is."""
    return [f"{count} {kind}, the first: {data.first_faults[kind]}" for kind, count in data.faults.items()]


def learning_rate(iteration: int, config: BoxConfig) -> float:
    """The rate of the step after `iteration` steps: `lr`, a tenth of it after each of `drops`."""
    return schedule.learning_rate(
        iteration,
        config.iterations,
        schedule.Progress(warm=False),
        name="step",
        lr=config.lr,
        warmup_lr=config.lr,
        factor=0.1,
        drops=config.drops,
    )


T = TypeVar("T", bound=BoxTask)


def begin(
    kind: type[T],
    config: BoxConfig,
    model: nn.Module,
    device: torch.device,
    state: dict[str, Any] | None,
    names: tuple[str, ...],
    **own: Any,
) -> T:
    """The task of `kind` that trains `model` with SGD by the losses `names`, as it begins or as `state` has it.

    `own` are its own fields. Raises UserError.
    """
    precision = pick_precision(config.precision, device)
    if state is not None:
        with checkpoint.checkpoint_errors(state["path"]):
            precision = precision_of(state)
    model = to_device(model, device, precision)
    trained = {"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": config.weight_decay}
    task = kind(
        config=config,
        device=device,
        precision=precision,
        model=model,
        net=model,
        optimizer=sgd([trained], lr=config.lr, momentum=config.momentum, precision=precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        names=names,
        losses=torch.zeros(world_size(), len(names), dtype=torch.float64, device=device),
        **own,
    )
    if state is not None:
        with checkpoint.checkpoint_errors(state["path"]):
            task.load(state)
    return task


Net = TypeVar("Net", bound=nn.Module)


def restore(model: Net, state: dict[str, Any], device: torch.device) -> tuple[Net, str]:
    """`model` for a test, with the weights of the checkpoint `state`, and its precision. Raises UserError."""
    with checkpoint.checkpoint_errors(state["path"]):
        precision = precision_of(state)
        model.load_state_dict(state["model"])
    return to_device(model, device, "fp32").eval(), precision


def backward_and_update(task: BoxTask, parts: Tensor, lr: float) -> None:
    """Backward from the sum of the losses `parts`, and the optimiser's update at the rate `lr`."""
    task.scaler.scale(parts.sum()).backward()
    for group in task.optimizer.param_groups:
        group["lr"] = lr
    task.scaler.step(task.optimizer)
    task.scaler.update()
    task.optimizer.zero_grad(set_to_none=True)

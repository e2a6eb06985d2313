"""What the engine needs of a job such as classification or detection, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from resnet_train.config.run_dir import RunConfig


class TaskConfig(RunConfig, Protocol):
    """The part of a task's configuration that the engine reads; counts are in iterations."""

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""

    @property
    def timeout(self) -> int:
        """Seconds that processes wait for each other."""

    @property
    def iterations(self) -> int:
        """The length of the run."""

    @property
    def batch_size(self) -> int:
        """Images in an iteration, of all processes."""

    @property
    def log_every(self) -> int:
        """Between points of the training curve."""

    @property
    def eval_every(self) -> int:
        """Between points of the other curves."""

    @property
    def checkpoint_every(self) -> int:
        """Between checkpoints."""

    @property
    def keep_every(self) -> int:
        """Between checkpoints that are kept for good; 0: none is."""


class Point(NamedTuple):
    """A point of a curve."""

    split: str  # val or test
    values: dict[str, Any]  # errors in %, losses, counts, the protocol
    images: Sequence[tuple[str, Tensor]] = ()  # (name, (3, H, W) uint8) to look at
    words: str = ""  # what is printed of it in place of all its values


class Task(Protocol):
    """A network in training on its data.

    All processes hold one and call its methods alike, but for `describe` and all below it, which the first calls alone:
    those may not talk to other processes.
    """

    iteration: int  # steps taken

    @property
    def config(self) -> TaskConfig:
        """What was asked for."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def precision(self) -> str:
        """bf16, fp16, fp32 or fp64."""

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled."""

    @property
    def measure(self) -> dict[str, Any]:
        """How it computes, as a checkpoint holds it: the precision and what else the results depend on."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def best_at(self) -> int:
        """The iteration of the lowest validation error so far; 0: nothing is held out."""

    @property
    def key_of_lr(self) -> str:
        """The configuration's key of the learning rate, for advice."""

    @property
    def label(self) -> str:
        """The name of the data in every record."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Of the points that `evaluate` gives."""

    @property
    def losses(self) -> Tensor:
        """Sums of the losses since the last `train_point`, on the device: not finite once one of them is not."""

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""

    @property
    def reference(self) -> float | None:
        """The paper's test error (%) of this very net on this very data."""

    def wrap_ddp(self) -> None:
        """Average gradients over all processes from now on."""

    def batches(self) -> Iterator[Any]:
        """This process's part of the training batches, from the next iteration on."""

    def learning_rate(self) -> float:
        """Of the next step."""

    def step(self, batch: Any, lr: float) -> None:
        """One iteration, without waiting for the device."""

    def train_point(self) -> dict[str, Any]:
        """The values of a point of the training curve, over the batches since the last; begins new sums."""

    def evaluate(self) -> Iterator[Point]:
        """Measure the model as it is."""

    def hyper_parameters(self) -> dict[str, str | bool | int | float]:
        """Those that runs are told apart by, for TensorBoard."""

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values."""

    def describe(self) -> list[str]:
        """What is about to be trained, in lines to print."""

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """What differs from when the checkpoint `state` was written, without being another run; lines to print."""

    def begin_files(self) -> dict[str, Any]:
        """JSON files, by name, that the run's directory begins with beside the engine's own."""

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json says of the finished run whose points are `metrics`."""

    def draw(self, metrics: list[dict[str, Any]], picture: Path) -> bool:
        """Draw the curves of `metrics` to the file `picture`; whether that could be done."""

    def conclude(self, summary: dict[str, Any]) -> str:
        """The result in one line."""

"""One step of training a classifier, launched operation by operation or captured as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train.classification.evaluate import wrong_answers
from resnet_train.config.train import BatchSplit, Config
from resnet_train.engine.compute import compute_logits
from resnet_train.engine.distributed import all_reduce_sum, rank, restore_rank_sums, world_size
from resnet_train.models.batchnorm import update_statistics
from resnet_train.models.resnet import ResNet


@dataclass(kw_only=True)
class TrainState:
    """A network in training: what a step takes and changes."""

    config: Config
    device: torch.device
    precision: str  # bf16, fp16, fp32 or fp64
    model: ResNet
    net: nn.Module  # the model, or around it what averages gradients over processes
    share: BatchSplit  # this process's share of a batch, and how it is divided
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    metrics: TrainMetrics
    iteration: int = 0  # steps taken


def step(task: TrainState, images: Tensor, labels: Tensor, lr: float | Tensor) -> None:
    """One iteration on this process's share of a batch; nothing waits for the device.

    Images are (B, 3, H, W), labels (B,) int64. With several passes per share, gradients are accumulated, and averaged
    over the processes in the last pass.
    """
    _set_rate(task, lr)
    passes = task.share.passes
    for number, (inputs, targets) in enumerate(zip(images.chunk(passes), labels.chunk(passes), strict=True), 1):
        with contextlib.nullcontext() if number == passes or world_size() == 1 else task.net.no_sync():  # type: ignore[operator]
            # Forward
            logits = compute_logits(task.net, inputs, task.precision)
            loss = F.cross_entropy(logits, targets)
            # Backward
            task.scaler.scale(loss / passes).backward()
        # Sums for the log
        task.metrics.add(loss.detach(), logits.detach(), targets)
    # Update: the weights by SGD, the running statistics by the mean over all parts of the batch
    task.scaler.step(task.optimizer)
    task.scaler.update()
    task.optimizer.zero_grad(set_to_none=True)
    update_statistics(task.model, task.config.batch_size // task.share.group)
    _count(task)


def _set_rate(task: TrainState, lr: float | Tensor) -> None:
    for group in task.optimizer.param_groups:
        group["lr"] = lr


def _count(task: TrainState) -> None:
    task.metrics.seen += task.config.batch_size
    task.iteration += 1


class TrainMetrics:
    """Sums over the training batches since the last logged point, on the device.

    Each process adds to its own row. After a loss that is not finite the sum is never finite again, so the sum itself
    shows it.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros(world_size(), dtype=torch.float64, device=device)
        self.wrong = torch.zeros(world_size(), 2, dtype=torch.int64, device=device)  # top-1, top-5
        self.seen = 0  # in all processes
        self.skipped = 0  # broken images that were replaced by others, in this process

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch, of which `_count` counts the images; no synchronisation with the device."""
        self.loss[rank()] += loss * len(labels)
        self.wrong[rank()] += wrong_answers(logits, labels)

    def reset(self) -> None:
        """Set all to zero, in place, since a captured step adds to these tensors."""
        self.loss.zero_()
        self.wrong.zero_()
        self.seen = self.skipped = 0

    def state(self) -> dict[str, Any]:
        """The rows of all processes, for the checkpoint and the log. A collective: all processes call it."""
        loss, wrong = all_reduce_sum(self.loss.clone()).cpu(), all_reduce_sum(self.wrong.clone()).cpu()
        return {
            "loss": loss,
            "wrong": wrong,
            "seen": self.seen,
            "skipped": int(all_reduce_sum(torch.tensor(self.skipped))),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the sums of a checkpoint."""
        self.seen, self.skipped = state["seen"], state["skipped"] if rank() == 0 else 0
        for name, rows in (("loss", self.loss), ("wrong", self.wrong)):
            restore_rank_sums(rows, state[name])


class CapturedStep:
    """`step` and the making of its batch as one CUDA graph, since a small net is bound by kernel launches.

    The graph reads its inputs from two tensors: the draws of a batch (`MemoryDataset.draw_batches`) and the learning
    rate. It updates weights, momentum, statistics and sums in place.
    """

    UNCAPTURED = 3  # warm-up steps: compilation, the choice of algorithms and new momentum cannot be captured

    def __init__(self, task: TrainState, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.task, self.make = task, make
        self.draws = torch.zeros(4, task.config.batch_size, dtype=torch.int64, device=task.device)
        self.lr = torch.zeros((), device=task.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(task.device)
        self.calls = 0

    def __call__(self, draws: Tensor, lr: float) -> None:
        """One iteration with the batch given by `draws` (4, B), in pinned memory. Nothing waits for the device."""
        self.draws.copy_(draws, non_blocking=True)
        self.lr.fill_(lr)
        self.calls += 1
        if self.calls <= self.UNCAPTURED:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step(self.task, *self.make(self.draws), self.lr)
            torch.cuda.current_stream().wait_stream(self.stream)
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):  # records, computes nothing yet
                step(self.task, *self.make(self.draws), self.lr)
            self.graph.replay()
        else:
            self.graph.replay()
            _count(self.task)  # Python code is not part of the graph
        _set_rate(self.task, lr)  # a number again, for the checkpoint

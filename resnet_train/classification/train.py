"""A classifier in training, as a task of the engine: batches, logged points, checkpoint, summary (section 4.2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.classification.evaluate import count_errors
from resnet_train.classification.load import pick_eval_batch
from resnet_train.classification.step import CapturedStep, TrainState, step
from resnet_train.classification.summary import describe_end, describe_start, draw_curves, reference_error, summarise
from resnet_train.config.layout import files_for_test
from resnet_train.config.run_dir import as_stored
from resnet_train.config.train import Config
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import BatchOrder
from resnet_train.engine.compute import compute_logits, wrap_ddp
from resnet_train.engine.distributed import rank, world_size
from resnet_train.engine.logger import message
from resnet_train.engine.schedule import Progress, end_warmup, learning_rate, watch_plateau
from resnet_train.engine.task import Point
from resnet_train.weights.source import Source

WINDOW = 100  # iterations over which the error that ends the warm-up is averaged; fewer if warmup.iterations is less


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


@dataclasses.dataclass(kw_only=True)
class ClassificationTask(TrainState):
    """A classifier in training on its data."""

    compiled: bool
    blocks: bool  # compiled block by block, not as a whole
    dataset: MemoryDataset | StreamingDataset
    mean: Tensor  # subtracted from images: (H, W, 3) or (1, 1, 3) in 0 to 255
    progress: Progress
    source: Source | None = None  # the initial weights
    best: float = math.inf  # the lowest validation error so far, in %
    best_at: int = 0  # its iteration; 0: no validation set
    captured: CapturedStep | None = None
    key_of_lr = "schedule.lr"

    @property
    def label(self) -> str:
        """The name of the data in every record."""
        return self.dataset.label

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `evaluate` measures: the validation set, if any, and the test set."""
        return ("val", "test") if self.dataset.sizes["val"] else ("test",)

    @property
    def losses(self) -> Tensor:
        """Summed losses since the last logged point, one entry per process."""
        return self.metrics.loss

    @property
    def epoch(self) -> float:
        """Passes over the training part so far."""
        return self.iteration * self.config.batch_size / self.dataset.sizes["train"]

    @property
    def reference(self) -> float | None:
        """The paper's test error of this net in %, where the data are CIFAR-10 proper (table 6)."""
        return reference_error(self.config.net, self.label)

    def wrap_ddp(self) -> None:
        """Average gradients over all processes from now on."""
        # Buffers need no broadcast: update_statistics is the same in every process.
        size = self.config.data.size
        images = torch.zeros(self.share.images, 3, size, size, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        self.net = wrap_ddp(self.model, lambda net: compute_logits(net, images, self.precision).sum())

    @property
    def measure(self) -> dict[str, Any]:
        """How the net computes: precision, compilation, images that batch norm takes together."""
        return {
            "precision": self.precision,
            "compile": self.compiled,
            "blocks": self.blocks,
            "bn_images": self.share.group,
        }

    @property
    def is_capturable(self) -> bool:
        """Whether a step can be one CUDA graph.

        On a single GPU, images in memory, in one pass, without fp16's scaler and without activation checkpointing.
        """
        one_gpu = self.device.type == "cuda" and world_size() == 1
        one_pass = self.share.passes == 1 and not self.scaler.is_enabled() and not self.model.recompute
        return one_gpu and one_pass and isinstance(self.dataset, MemoryDataset)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """This process's share of the training batches from the next iteration on, as `step` takes them.

        A captured step makes the batch itself; the iterator then yields the random draws of each batch.
        """
        config = self.config
        order = BatchOrder(config.seed, config.batch_size, config.augment, self.iteration, rank(), world_size())
        if not self.is_capturable:
            return self.dataset.train_batches(self.mean, self.device, order)
        assert isinstance(self.dataset, MemoryDataset)
        if self.captured is None:
            make = self.dataset.batch_maker(self.mean, self.device, config.augment.pad)
            self.captured = CapturedStep(self, make)
        return ((draws,) for draws in self.dataset.draw_batches(self.device, order))

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return rate(self.config, self.iteration, self.progress)

    def step(self, batch: tuple[Tensor, ...], lr: float) -> None:
        """One iteration with a batch of `batches`."""
        self.metrics.skipped += self.dataset.skipped
        if self.captured is not None:
            (draws,) = batch
            self.captured(draws, lr)
        else:
            images, labels = batch
            step(self, images, labels, lr)
        if self.progress.warm:
            watch_warmup(self)

    def train_point(self) -> dict[str, Any]:
        """Error and loss of the augmented batches in training mode since the last point; updates the plateau."""
        config, sums = self.config, self.metrics.state()
        replaced = config.data.family == "imagenet" and config.data.broken == "skip"
        (wrong, wrong5), loss, seen = sums["wrong"].sum(0).tolist(), sums["loss"].sum().item(), sums["seen"]
        error = 100 * wrong / seen
        if self.progress.warm:
            self.progress.recent += wrong
        if config.schedule.watch == "train":
            self._watch_plateau(error)
        chance = 100 - 100 / len(self.dataset.classes)
        tenth = config.iterations / 10
        if tenth >= 100 and error > 0.98 * chance and self.iteration - config.log_every < tenth <= self.iteration:
            message(f"warning: a tenth of the run is over and the training error is still at chance ({chance:.1f} %)")
        self.metrics.reset()
        return {
            "loss": loss / seen,
            "error": error,
            **({"error5": 100 * wrong5 / seen} if self.dataset.top5 else {}),
            **({"skipped": sums["skipped"]} if replaced else {}),
            "protocol": "augmented batches in training mode",
        }

    def evaluate(self) -> Iterator[Point]:
        """Errors on the validation set, which alone chooses the best checkpoint, and on the test set."""
        batch_size = pick_eval_batch(self.config, self.device)
        for split in self.splits:
            batches = self.dataset.eval_batches(split, self.mean, self.device, batch_size, rank(), world_size())
            size, skip = self.dataset.sizes[split], self.config.data.broken == "skip"
            count = count_errors(self.model, batches, self.precision, size, skip=skip)
            if split == "val":
                if self.config.schedule.watch == "val":
                    self._watch_plateau(count.error)
                if count.error < self.best:
                    self.best, self.best_at = count.error, self.iteration
            error5 = {"error5": count.error5} if self.dataset.top5 else {}
            values = {"loss": count.loss, "error": count.error, **error5, "wrong": count.wrong, "seen": count.seen}
            yield Point(split, values | {"protocol": self.dataset.protocol})

    def _watch_plateau(self, error: float) -> None:
        schedule, iterations = self.config.schedule, self.config.iterations
        if schedule.name == "plateau":
            patience = schedule.patience * iterations
            watch_plateau(self.progress, self.iteration, error, patience=patience, threshold=schedule.threshold)

    def hyper_parameters(self) -> dict[str, str | bool | int | float]:
        """The hyper-parameters for TensorBoard's HPARAMS tab, by which runs are compared."""
        config = self.config
        keys = ("arch", "depth", "shortcut", "seed", "iterations", "batch_size", "momentum", "weight_decay")
        return {
            "data": self.label,
            "validation": config.data.validation,
            "precision": self.precision,
            **{key: getattr(config, key) for key in keys},
            "schedule": config.schedule.name,
            "lr": config.schedule.lr,
        }

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only. All processes call this."""
        return {
            "config": as_stored(self.config),
            "classes": self.dataset.classes,
            "label": self.dataset.label,
            "digest": self.dataset.digest,
            "measure": self.measure,
            "mean": self.mean.cpu(),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "metrics": self.metrics.state(),
            "progress": dataclasses.asdict(self.progress),
            "best": [self.best, self.best_at],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.mean = state["mean"].to(self.device)
        int(state["measure"]["bn_images"])  # read later by `describe_changes`: a wrong value is refused here
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.metrics.load(state["metrics"])
        self.progress = Progress(**state["progress"])
        self.best, self.best_at = state["best"]
        self.iteration = state["iteration"]

    @functools.cached_property
    def _files_for_test(self) -> list[str]:
        """The files of the test split of an undivided tree; listed once, since it may be on a file server."""
        files = files_for_test(self.config.data.name, self.config.data.root)
        return [file for file in files if file not in self.dataset.unreadable.get("test", ())]

    def begin_files(self) -> dict[str, Any]:
        """split.json: the validation images' indices, the test files of an undivided tree, and what is left out."""
        split: dict[str, Any] = {}
        if self.dataset.sizes["val"]:
            split["val"] = self.dataset.val_indices.tolist()
        if self._files_for_test:
            split["test"] = self._files_for_test
        if any(self.dataset.unreadable.values()):
            split["unreadable"] = self.dataset.unreadable
        return {"split.json": split} if split else {}

    def describe(self) -> list[str]:
        """Lines that describe the training, printed at its start."""
        return describe_start(self, self.dataset, self.source, self._files_for_test, compiled=self.compiled)

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """A note if batch norm's statistics are over another number of images than in the checkpoint `state`."""
        before, now = state["measure"]["bn_images"], self.share.group
        if before == now:
            return []
        least = min(before, now)
        advice = f"; bn_images={least} from the start keeps them the same on any devices" if least > 1 else ""
        return [f"note: batch norm's statistics were over {before} images and are now over {now}{advice}"]

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of summary.json for the finished run with the logged points `metrics`."""
        return summarise(self.config, self.dataset, self.model, self.best_at, metrics)

    def draw(self, metrics: list[dict[str, Any]], picture: Path) -> bool:
        """Plot the errors over the iterations to the file `picture`; returns whether that succeeded."""
        return draw_curves(self.config, self.label, metrics, picture)

    def conclude(self, summary: dict[str, Any]) -> str:
        """The test error in one line."""
        return describe_end(self.config, self.label, summary)


def watch_warmup(task: ClassificationTask) -> None:
    """End the warm-up where the training error of the last `WINDOW` iterations is low enough (section 4.2)."""
    warmup, iteration = task.config.warmup, task.iteration
    window = min(WINDOW, warmup.iterations or WINDOW)
    if iteration % window:
        return
    wrong = int(task.metrics.state()["wrong"][:, 0].sum())
    error = 100 * (task.progress.recent + wrong) / (window * task.config.batch_size)
    task.progress.recent = -wrong  # these are not of the next window, though the next logged point counts them
    end_warmup(task.progress, iteration, error, below=warmup.error, at_least=warmup.iterations)

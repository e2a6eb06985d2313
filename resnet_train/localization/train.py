"""A localizer in training, as a task of the engine: its step, logged points, checkpoint and summary (appendix C)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_train.config.localization import LocalizeConfig
from resnet_train.config.run_dir import as_stored
from resnet_train.detection.loader import tell_skipped
from resnet_train.engine import schedule
from resnet_train.engine.compute import autocast, wrap_ddp
from resnet_train.engine.distributed import all_reduce_sum, rank, restore_rank_sums, world_size
from resnet_train.engine.task import Point
from resnet_train.localization.build import KIND, Around, trained
from resnet_train.localization.evaluate import evaluate
from resnet_train.localization.find import Trained
from resnet_train.localization.loader import Batch, Crops, Regions, training_batches
from resnet_train.localization.model import Localizer, anchors_of, loss_parts
from resnet_train.localization.tree import Localized
from resnet_train.models.resnet import parameters
from resnet_train.paper import LOCALIZATION_METHODS
from resnet_train.report import curves

LOSSES = ("loss_class", "loss_box")
PROTOCOL = "center crop, true class given"


@dataclass
class Data:
    """The images and, for R-CNN, the trained RPN and the regions that it proposes in the training images."""

    photos: Localized
    digest: str
    rpn: Trained | None = None
    proposals: Tensor | None = None


def step(task: LocalizationTask, batch: Batch, lr: float) -> None:
    """One iteration on this process's share of a batch."""
    for group in task.optimizer.param_groups:
        group["lr"] = lr
    # Forward: of all that the true class has, the places that are learnt
    with autocast(task.device, task.precision):
        scores, moves = task.net(batch.images, batch.labels[:, None])
    chosen = batch.places[:, :, None].expand(-1, -1, 4)
    parts = loss_parts(scores[:, 0].gather(1, batch.places), moves[:, 0].gather(1, chosen), batch.target)
    # Backward
    task.scaler.scale(parts.sum()).backward()
    # Update
    task.scaler.step(task.optimizer)
    task.scaler.update()
    task.optimizer.zero_grad(set_to_none=True)
    # Sums for the log
    task.losses[rank()] += parts.detach()
    task.iteration += 1


@dataclass
class LocalizationTask:
    """A localizer in training on its data: what it was given, and what training changes and a checkpoint holds."""

    config: LocalizeConfig
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    data: Data
    around: Around
    model: Localizer
    net: nn.Module  # the model, or around it what averages gradients over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    losses: Tensor  # sums since the last logged point, a row for each process; on the device, read seldom
    iteration: int = 0
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the last test
    told: set[str] = dataclasses.field(default_factory=set)  # the broken images of which a line has been printed
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
        return self.iteration * self.config.batch_size / len(self.data.photos.train)

    def wrap_ddp(self) -> None:
        """Average gradients over all processes from now on."""
        size = self.config.crop

        def first(net: nn.Module) -> Tensor:
            images = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.device)
            with autocast(self.device, self.precision):
                scores, moves = net(images, torch.zeros(1, 1, dtype=torch.int64, device=self.device))
            return scores.sum() + moves.sum()

        self.net = wrap_ddp(self.model, first)

    def batches(self) -> Iterator[Batch]:
        """This process's part of the training batches that are left."""
        config, kind = self.config, self._kind()
        for batch in training_batches(
            self.data.photos.train,
            kind,
            seed=config.seed,
            batch_size=config.batch_size,
            iterations=range(self.iteration, config.iterations),
            workers=config.data.workers,
            skip=config.data.broken == "skip",
            device=self.device,
            rank=rank(),
            world=world_size(),
        ):
            tell_skipped(new := sorted({*batch.broken} - self.told))
            self.told.update(new)
            yield batch

    def _kind(self) -> Crops | Regions:
        config = self.config
        if self.data.proposals is not None:
            return Regions(self.data.proposals, config.crop, config.flip)
        here = self._trained()
        return Crops(anchors_of(config.anchors, (config.crop, config.crop), here.stride), config.crop, config.flip)

    def _trained(self) -> Trained:
        return trained(self.model, self.around, self.config, self.precision)

    def learning_rate(self) -> float:
        """Of the next step."""
        return schedule.learning_rate(
            self.iteration,
            self.config.iterations,
            schedule.Progress(warm=False),
            name="step",
            lr=self.config.lr,
            warmup_lr=self.config.lr,
            factor=0.1,
            drops=self.config.drops,
        )

    def step(self, batch: Batch, lr: float) -> None:
        """One iteration with a batch of `batches`."""
        step(self, batch, lr)

    def train_point(self) -> dict[str, Any]:
        """The mean losses since the last point."""
        steps = (self.iteration - 1) % self.config.log_every + 1
        means = (all_reduce_sum(self.losses.clone()).sum(0) / (world_size() * steps)).tolist()
        self.losses.zero_()
        return {"loss": sum(means), **dict(zip(LOSSES, means, strict=True))}

    def evaluate(self) -> Iterator[Point]:
        """The error on the test images, the true class given, on a center crop."""
        rpn = self.data.rpn or self._trained()
        self.measured = evaluate(
            rpn,
            self._trained() if self.data.rpn else None,
            self.data.photos.test,
            device=self.device,
            workers=self.config.data.workers,
            skip=self.config.data.broken == "skip",
        )
        yield Point("test", self.measured | {"protocol": PROTOCOL})

    def hyper_parameters(self) -> dict[str, str | bool | int | float]:
        """Those that runs are told apart by, for TensorBoard's table of runs."""
        keys = ("stage", "seed", "iterations", "batch_size", "lr", "crop")
        return {key: getattr(self.config, key) for key in keys} | {"data": self.label, "net": self.around.net}

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only. All processes call this."""
        return {
            KIND: dataclasses.asdict(self.around),
            "config": as_stored(self.config),
            "classes": self.data.photos.classes,
            "label": self.label,
            "digest": self.data.digest,
            "measure": {"precision": self.precision},
            "mean": torch.tensor(self.around.mean),
            "iteration": self.iteration,
            "measured": self.measured if self.iteration == self.config.iterations else {},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": all_reduce_sum(self.losses.clone()).cpu(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        restore_rank_sums(self.losses, state["sums"])
        self.iteration, self.measured = state["iteration"], state["measured"]

    def begin_files(self) -> dict[str, Any]:
        """None."""
        return {}

    def describe(self) -> list[str]:
        """What is about to be trained, in lines to print."""
        config, photos = self.config, self.data.photos
        what = "per-class RPN" if config.stage == "rpn" else "R-CNN"
        lines = [
            f"{what} on {self.around.net} of {self.around.file}, {self.label}: {len(photos.train)} training images,"
            f" {len(photos.test)} for the test, {len(photos.classes)} classes; {config.iterations} iterations of"
            f" {config.batch_size}; {self.precision} on {self.device}"
        ]
        return lines + [f"warning: {count} {fault}" for fault, count in photos.faults.items()]

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """Nothing: crops and anchors do not depend on the number of processes, and proposals are kept."""
        return []

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json says of the finished run."""
        config, photos = self.config, self.data.photos
        return {
            "task": "localization",
            "stage": config.stage,
            "method": LOCALIZATION_METHODS[config.stage],
            "net": self.around.net,
            "data": self.label,
            "images": {"train": len(photos.train), "test": len(photos.test)},
            "boxes": {"train": len(photos.train.boxes), "test": len(photos.test.boxes)},
            "faults": photos.faults,
            "recipe": config.recipe,
            "seed": config.seed,
            "iterations": config.iterations,
            "init_from": config.init_from,
            "rpn": config.rpn,
            "last": self.measured | {"iteration": self.iteration, "protocol": PROTOCOL},
            "parameters": parameters(self.model),
        }

    def draw(self, metrics: list[dict[str, Any]], picture: Path) -> bool:
        """Draw the error over the iterations to the file `picture`; whether that could be done."""
        tests = [line for line in metrics if line["split"] == "test"]
        return curves.attempt(lambda: curves.draw({self.around.net: tests}, self._title(), picture), picture)

    def conclude(self, summary: dict[str, Any]) -> str:
        """The error in one line."""
        last = summary["last"]
        return (
            f"{self._title()}: localization error {last['error']:.2f} % ({PROTOCOL}) on {last['images']} images at"
            f" iteration {self.iteration}, the last"
        )

    def _title(self) -> str:
        return f"{LOCALIZATION_METHODS[self.config.stage]}, {self.around.net} on {self.label}, seed {self.config.seed}"

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
from resnet_train.detection.loader import tell_skipped
from resnet_train.engine.boxes import BoxTask, backward_and_update
from resnet_train.engine.compute import autocast, wrap_ddp
from resnet_train.engine.distributed import rank
from resnet_train.engine.task import Point
from resnet_train.localization.build import KIND, Backbone, predictor_of
from resnet_train.localization.evaluate import evaluate
from resnet_train.localization.loader import Batch, Crops, Regions, training_batches
from resnet_train.localization.model import Localizer, anchors_of, loss_parts
from resnet_train.localization.predict import Predictor
from resnet_train.localization.tree import Localized
from resnet_train.models.resnet import parameters
from resnet_train.paper import LOCALIZATION_METHODS
from resnet_train.report import curves

LOSSES = ("loss_class", "loss_box")
PROTOCOL = "center crop, true class given"


@dataclass
class Data(Localized):
    """The images and, for R-CNN, the trained RPN and the regions that it proposes in the training images."""

    rpn: Predictor | None = None
    proposals: Tensor | None = None


def step(task: LocalizationTask, batch: Batch, lr: float) -> None:
    """One iteration on this process's share of a batch."""
    # Forward: of all that the true class has, the places that are learnt
    with autocast(task.device, task.precision):
        scores, moves = task.net(batch.images, batch.labels[:, None])
    chosen = batch.places[:, :, None].expand(-1, -1, 4)
    parts = loss_parts(scores[:, 0].gather(1, batch.places), moves[:, 0].gather(1, chosen), batch.target)
    # Backward, update
    backward_and_update(task, parts, lr)
    # Sums for the log
    task.losses[rank()] += parts.detach()
    task.iteration += 1


@dataclass(kw_only=True)
class LocalizationTask(BoxTask):
    """A localizer in training on its data."""

    config: LocalizeConfig
    data: Data
    backbone: Backbone
    model: Localizer

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
        return training_batches(self.data.train, self._kind(), **self.loading())

    def _kind(self) -> Crops | Regions:
        config = self.config
        if self.data.proposals is not None:
            return Regions(self.data.proposals, config.crop, config.flip)
        here = self.predictor()
        return Crops(anchors_of(config.anchors, (config.crop, config.crop), here.stride), config.crop, config.flip)

    def predictor(self) -> Predictor:
        """The localizer as it is, for a test."""
        return predictor_of(self.model, self.backbone, self.config, self.precision)

    def step(self, batch: Batch, lr: float) -> None:
        """One iteration with a batch of `batches`."""
        tell_skipped(self.count_skipped(batch.broken))
        step(self, batch, lr)

    def evaluate(self) -> Iterator[Point]:
        """The error on the test images, the true class given, on a center crop."""
        rpn = self.data.rpn or self.predictor()
        self.measured = evaluate(
            rpn,
            self.predictor() if self.data.rpn else None,
            self.data.test,
            device=self.device,
            workers=self.config.data.workers,
            skip=self.config.data.broken == "skip",
        )
        yield Point("test", self.measured | {"protocol": PROTOCOL})

    def hyper_parameters(self) -> dict[str, str | bool | int | float]:
        """Those that runs are told apart by, for TensorBoard's table of runs."""
        keys = ("stage", "seed", "iterations", "batch_size", "lr", "crop")
        return {key: getattr(self.config, key) for key in keys} | {"data": self.label, "net": self.backbone.net}

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only. All processes call this."""
        return {
            KIND: dataclasses.asdict(self.backbone),
            "mean": torch.tensor(self.backbone.mean),
            **super().state(),
        }

    def describe(self) -> list[str]:
        """What is about to be trained, in lines to print."""
        what = "per-class RPN" if self.config.stage == "rpn" else "R-CNN"
        return [
            f"{what} on {self.backbone.net} of {self.backbone.file}, {self.describe_data()}",
            *self.describe_faults(),
        ]

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """Nothing: crops and anchors do not depend on the number of processes, and proposals are kept."""
        return []

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json says of the finished run."""
        config, data = self.config, self.data
        return {
            "task": "localization",
            "stage": config.stage,
            "method": LOCALIZATION_METHODS[config.stage],
            "net": self.backbone.net,
            "data": self.label,
            "images": {"train": len(data.train), "test": len(data.test)},
            "boxes": {"train": len(data.train.boxes), "test": len(data.test.boxes)},
            "faults": data.faults,
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
        return curves.attempt(lambda: curves.draw({self.backbone.net: tests}, self._title(), picture), picture)

    def conclude(self, summary: dict[str, Any]) -> str:
        """The error in one line."""
        last = summary["last"]
        return (
            f"{self._title()}: localization error {last['error']:.2f} % ({PROTOCOL}) on"
            f" {self.describe_tested(last['images'])} at iteration {self.iteration}, the last"
        )

    def _title(self) -> str:
        return (
            f"{LOCALIZATION_METHODS[self.config.stage]}, {self.backbone.net} on {self.label}, seed {self.config.seed}"
        )

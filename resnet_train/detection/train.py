"""A detector in training, as a task of the engine: its step, logged points, checkpoint and summary (appendix A)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_train.config.detection import DetectConfig
from resnet_train.config.run_dir import as_stored
from resnet_train.detection.annotations import Examples, load
from resnet_train.detection.build import Backbone
from resnet_train.detection.draw import draw_detections
from resnet_train.detection.evaluate import evaluate
from resnet_train.detection.loader import Batch, tell_skipped, training_batches
from resnet_train.detection.metrics import in_words
from resnet_train.detection.model import Detector, losses_of
from resnet_train.detection.sampling import seeds
from resnet_train.engine import schedule
from resnet_train.engine.compute import autocast, wrap_ddp
from resnet_train.engine.distributed import all_reduce_sum, is_main, rank, restore_rank_sums, world_size
from resnet_train.engine.task import Point
from resnet_train.models.batchnorm import update_statistics
from resnet_train.models.resnet import parameters
from resnet_train.report import curves

PICTURES = 4  # test images that TensorBoard shows with what was found in them
PROTOCOL = "every test image once, whole"


def step(task: DetectionTask, images: list[Tensor], targets: list[dict[str, Tensor]], lr: float) -> None:
    """One iteration on this process's share of a batch; images are (3, H, W) uint8."""
    for group in task.optimizer.param_groups:
        group["lr"] = lr
    # Anchors and regions are sampled from a seed of each image, whichever process has it, as the loader deals them.
    places = range(rank(), task.config.batch_size, world_size())
    for what, part in (("anchors", task.model.rpn), ("regions", task.model.roi_heads)):
        part.fg_bg_sampler.seeds = seeds(task.config.seed, what, task.iteration, places)
    # Forward
    with autocast(task.device, task.precision):
        losses = task.net([image.float() / 255 for image in images], targets)
    if not len(task.model.roi_heads.fg_bg_sampler.positive):  # no proposals and no objects: means of nothing
        losses |= {name: losses[name].nan_to_num() for name in ("loss_classifier", "loss_box_reg")}
    parts = torch.stack([losses[name].float() for name in losses_of(task.config.masks)])
    # Backward
    task.scaler.scale(parts.sum()).backward()
    # Update
    task.scaler.step(task.optimizer)
    task.scaler.update()
    task.optimizer.zero_grad(set_to_none=True)
    update_statistics(task.model, 1)
    # Sums for the log
    task.losses[rank()] += parts.detach()
    task.iteration += 1


def learning_rate(iteration: int, config: DetectConfig) -> float:
    """The rate of the step after `iteration` steps: rising to `lr` in the warm-up, a tenth at each of `drops`."""
    dropped = schedule.learning_rate(
        iteration,
        config.iterations,
        schedule.Progress(warm=False),
        name="step",
        lr=config.lr,
        warmup_lr=config.lr,
        factor=0.1,
        drops=config.drops,
    )
    return dropped * min(1.0, (iteration + 1) / max(1, config.warmup))


@dataclass
class DetectionTask:
    """A detector in training on its data: what it was given, and what training changes and a checkpoint holds."""

    config: DetectConfig
    device: torch.device
    precision: str  # bf16, fp16 or fp32
    examples: Examples
    backbone: Backbone
    model: Detector
    net: nn.Module  # the model, or around it what averages gradients over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    losses: Tensor  # sums since the last logged point, a row for each process; on the device, read seldom
    iteration: int = 0
    skipped: int = 0  # broken images that others stood in for since the last logged point, in this process
    told: set[str] = dataclasses.field(default_factory=set)  # the lines of broken images that have been printed
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
        return self.iteration * self.config.batch_size / len(self.examples.train)

    def wrap_ddp(self) -> None:
        """Average gradients over all processes from now on."""
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.ones(1, dtype=torch.int64)}
        target |= {"masks": torch.ones(1, 64, 64, dtype=torch.uint8)} if self.config.masks else {}

        def first(net: nn.Module) -> Tensor:
            with autocast(self.device, self.precision):
                losses = net(
                    [torch.zeros(3, 64, 64, device=self.device)],
                    [{key: value.to(self.device) for key, value in target.items()}],
                )
            return torch.stack([losses[name].float() for name in losses_of(self.config.masks)]).sum()

        self.net = wrap_ddp(self.model, first)

    def batches(self) -> Iterator[Batch]:
        """This process's part of the training batches that are left."""
        return training_batches(
            self.examples.train,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            iterations=range(self.iteration, self.config.iterations),
            workers=self.config.data.workers,
            device=self.device,
            rank=rank(),
            world=world_size(),
            masks=(self.config.min_size, self.config.max_size) if self.config.masks else None,
            skip=self.config.data.broken == "skip",
        )

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.iteration, self.config)

    def step(self, batch: Batch, lr: float) -> None:
        """One iteration with a batch of `batches`."""
        tell_skipped(line for line in batch.broken if line not in self.told)
        self.told |= set(batch.broken)
        self.skipped += len(batch.broken)
        step(self, batch.images, batch.targets, lr)

    def train_point(self) -> dict[str, Any]:
        """The mean losses since the last point."""
        steps = (self.iteration - 1) % self.config.log_every + 1
        means = (all_reduce_sum(self.losses.clone()).sum(0) / (world_size() * steps)).tolist()
        skipped = {"skipped": self._skipped()} if self.config.data.broken == "skip" else {}
        self.losses.zero_()
        self.skipped = 0
        return {"loss": sum(means), **dict(zip(losses_of(self.config.masks), means, strict=True)), **skipped}

    def _skipped(self) -> int:
        """Broken images since the last point, in all processes."""
        return int(all_reduce_sum(torch.tensor(self.skipped, device=self.device)))

    def _share_statistics(self) -> None:
        """Where batch norm is trained, each process has averages of its own images: take the first's."""
        if world_size() > 1 and self.backbone.pretrained is None:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def evaluate(self) -> Iterator[Point]:
        """Average precision on the test images, and the first of them with what was found."""
        self._share_statistics()
        examples = self.examples
        self.measured, found = evaluate(
            self.model,
            examples.test,
            classes=examples.classes,
            category_ids=examples.category_ids,
            precision=self.precision,
            device=self.device,
            workers=self.config.data.workers,
            skip=self.config.data.broken == "skip",
        )
        values = {name: value for name, value in self.measured.items() if isinstance(value, (int, float))}
        shown = list(zip(examples.test[:: world_size()], found, strict=False))[:PICTURES] if is_main() else []
        images = [
            (example.name, draw_detections(load(example), boxes, examples.classes, 0.5))
            for example, boxes in shown
            if boxes  # else its pixels are broken
        ]
        seen = len(examples.test) - self.measured.get("skipped", 0)
        words = in_words(self.measured, self.config.data.name)
        yield Point("test", values | {"images": seen, "protocol": PROTOCOL}, images, words)

    def hyper_parameters(self) -> dict[str, str | bool | int | float]:
        """Those that runs are told apart by, for TensorBoard's table of runs."""
        net = ("backbone", "depth", "pyramid", "context", "masks")
        recipe = ("seed", "iterations", "batch_size", "lr", "min_size")
        values = {key: getattr(self.config, key) for key in (*net, *recipe)}
        return values | {"data": self.label, "pretrained": self.backbone.detector or self.backbone.pretrained or "no"}

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only. All processes call this."""
        self._share_statistics()
        return {
            "detector": dataclasses.asdict(self.backbone),
            "config": as_stored(self.config),
            "classes": self.examples.classes,
            "label": self.label,
            "category_ids": self.examples.category_ids,
            "digest": self.examples.digest,
            "measure": {"precision": self.precision},
            "mean": torch.tensor(self.backbone.mean),
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
        restore_rank_sums(self.losses, state["sums"])
        self.iteration, self.measured = state["iteration"], state["measured"]
        self.skipped = state["skipped"] if is_main() else 0

    def begin_files(self) -> dict[str, Any]:
        """None."""
        return {}

    def describe(self) -> list[str]:
        """What is about to be trained, in lines to print."""
        config, examples = self.config, self.examples
        lines = [
            f"{config.net} on {self.label}: {len(examples.train)} training images, {len(examples.test)} for the"
            f" test, {len(examples.classes)} classes; {config.iterations} iterations of {config.batch_size};"
            f" {self.precision} on {self.device}"
        ]
        if origin := self.backbone.detector or self.backbone.pretrained:
            frozen = f"; frozen up to {config.freeze}" if config.freeze else ""
            norm = "; batch norm stays as it has it" if self.backbone.pretrained and config.backbone != "vgg16" else ""
            lines.append(f"starts from {origin}{norm}{frozen}")
        else:
            lines.append(
                "starts from random weights, which the paper does not: the figures say nothing about its tables 7 and 8"
            )
        return lines + [f"warning: {count} {fault}" for fault, count in examples.faults.items()]

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """Whether the checkpoint `state` was written by another number of processes."""
        before = state["config"].get("devices")
        if before == world_size():
            return []
        own = "" if self.backbone.pretrained else ", and batch norm sees other images together"
        means = "losses are means over each process's own regions"
        return [f"note: begun on {before} devices; on {world_size()} {means}{own}"]

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json says of the finished run."""
        config, examples = self.config, self.examples
        parts = {"train": examples.train, "test": examples.test}
        return {
            "task": "detection",
            "net": config.net,
            "data": self.label,
            "lists": {"train": config.data.train, "test": config.data.test},
            "images": {name: len(part) for name, part in parts.items()},
            "boxes": {name: sum(len(example.boxes) for example in part) for name, part in parts.items()},
            "faults": examples.faults,
            "recipe": config.recipe,
            "seed": config.seed,
            "iterations": config.iterations,
            "init_from": config.init_from,
            "backbone": dataclasses.asdict(self.backbone),
            "last": self.measured | {"iteration": self.iteration, "protocol": PROTOCOL},
            "parameters": parameters(self.model),
        }

    def draw(self, metrics: list[dict[str, Any]], picture: Path) -> bool:
        """Draw the losses and the mAP over the iterations to the file `picture`; whether that could be done."""
        return curves.attempt(lambda: curves.draw_detection(metrics, self._title(), picture), picture)

    def conclude(self, summary: dict[str, Any]) -> str:
        """The mAP by three rules in one line."""
        last = summary["last"]
        return (
            f"{self._title()}: {in_words(last, self.config.data.name)}, on"
            f" {len(self.examples.test) - last.get('skipped', 0)} images at iteration {self.iteration}, the last"
        )

    def _title(self) -> str:
        return f"{self.config.net} on {self.label}, seed {self.config.seed}"

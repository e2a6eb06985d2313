"""A detector in training, as a task of the engine: its step, logged points, checkpoint and summary (appendix A)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_train.config.detection import DetectConfig
from resnet_train.detection.annotations import Examples, load
from resnet_train.detection.build import Backbone
from resnet_train.detection.draw import draw_detections
from resnet_train.detection.evaluate import evaluate
from resnet_train.detection.loader import Batch, tell_skipped, training_batches
from resnet_train.detection.metrics import in_words
from resnet_train.detection.model import Detector
from resnet_train.detection.sampling import seeds
from resnet_train.engine import boxes
from resnet_train.engine.boxes import BoxTask, backward_and_update
from resnet_train.engine.compute import autocast, wrap_ddp
from resnet_train.engine.distributed import all_reduce_sum, is_main, rank, world_size
from resnet_train.engine.task import Point
from resnet_train.models.batchnorm import update_statistics
from resnet_train.models.resnet import parameters
from resnet_train.report import curves

PICTURES = 4  # test images that TensorBoard shows with what was found in them
PROTOCOL = "every test image once, whole"
SHOWN = 10  # classes that are printed: half of them those with the most objects, half those with the fewest


def step(task: DetectionTask, images: list[Tensor], targets: list[dict[str, Tensor]], lr: float) -> None:
    """One iteration on this process's share of a batch; images are (3, H, W) uint8."""
    # Anchors and regions are sampled from a seed of each image, whichever process has it, as the loader deals them.
    places = range(rank(), task.config.batch_size, world_size())
    for what, part in (("anchors", task.model.rpn), ("regions", task.model.roi_heads)):
        part.fg_bg_sampler.seeds = seeds(task.config.seed, what, task.iteration, places)
    # Forward
    parts = losses_in(task, task.net, images, targets)
    # Backward, update
    backward_and_update(task, parts, lr)
    update_statistics(task.model, 1)
    # Sums for the log
    task.losses[rank()] += parts.detach()
    task.iteration += 1


def losses_in(task: DetectionTask, net: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """The losses of this process's images (3, H, W) uint8, in the order of `task.names`.

    Their mean over the processes is the loss of the whole batch.
    """
    with autocast(task.device, task.precision):
        losses = net([image.float() / 255 for image in images], targets)
    if not len(task.model.roi_heads.fg_bg_sampler.positive):  # no proposals and no objects: means of nothing
        losses |= {name: losses[name].nan_to_num() for name in ("loss_classifier", "loss_box_reg")}
    parts = torch.stack([losses[name].float() for name in task.names])
    return parts if world_size() == 1 else parts * _shares(task.model, len(task.names))


def _shares(model: Detector, losses: int) -> Tensor:
    """This process's shares of the regions that each loss is a mean over, times the number of processes."""
    anchors, regions = (part.fg_bg_sampler.positive for part in (model.rpn, model.roi_heads))
    counts = [len(regions), len(regions), len(anchors), len(anchors)]  # in the order of `losses_of`
    own = torch.tensor(counts, dtype=torch.float32, device=regions.device)
    if losses > len(own):  # of masks, which regions with an object have
        own = torch.cat([own, regions.sum()[None].float()])
    return own * world_size() / all_reduce_sum(own.clone()).clamp(min=1)


def describe_classes(data: Examples) -> str:
    """The classes with the number of their training objects: one that is misspelt in some annotations is seen here."""
    count = Counter(dict.fromkeys(data.classes, 0))
    for example in data.train:
        count.update(data.classes[label - 1] for label in example.labels.tolist())
    shown = [f"{name} {number}" for name, number in count.most_common()]
    if len(shown) > SHOWN:
        shown[SHOWN // 2 : -(SHOWN // 2)] = [f"{len(shown) - SHOWN} more"]
    return f"classes: {', '.join(shown)}"


def learning_rate(iteration: int, config: DetectConfig) -> float:
    """The rate of the step after `iteration` steps: rising to `lr` in the warm-up, a tenth at each of `drops`."""
    return boxes.learning_rate(iteration, config) * min(1.0, (iteration + 1) / max(1, config.warmup))


@dataclass(kw_only=True)
class DetectionTask(BoxTask):
    """A detector in training on its data."""

    config: DetectConfig
    data: Examples
    backbone: Backbone
    model: Detector

    def wrap_ddp(self) -> None:
        """Average gradients over all processes from now on."""
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.ones(1, dtype=torch.int64)}
        target |= {"masks": torch.ones(1, 64, 64, dtype=torch.uint8)} if self.config.masks else {}
        targets = [{key: value.to(self.device) for key, value in target.items()}]
        images = [torch.zeros(3, 64, 64, dtype=torch.uint8, device=self.device)]
        self.net = wrap_ddp(self.model, lambda net: losses_in(self, net, images, targets).sum())

    def batches(self) -> Iterator[Batch]:
        """This process's part of the training batches that are left."""
        masks = (self.config.min_size, self.config.max_size) if self.config.masks else None
        return training_batches(self.data.train, masks=masks, **self.loading())

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.iteration, self.config)

    def step(self, batch: Batch, lr: float) -> None:
        """One iteration with a batch of `batches`."""
        tell_skipped(self.count_skipped(batch.broken))
        step(self, batch.images, batch.targets, lr)

    def _share_statistics(self) -> None:
        """Where batch norm is trained, each process has averages of its own images: take the first's."""
        if world_size() > 1 and self.backbone.pretrained is None:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def evaluate(self) -> Iterator[Point]:
        """Average precision on the test images, and the first of them with what was found."""
        self._share_statistics()
        examples = self.data
        self.measured, detected = evaluate(
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
        shown = list(zip(examples.test[:: world_size()], detected, strict=False))[:PICTURES] if is_main() else []
        images = [
            (example.name, draw_detections(load(example), rows, examples.classes, 0.5))
            for example, rows in shown
            if rows  # else its pixels are broken
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
            "category_ids": self.data.category_ids,
            "mean": torch.tensor(self.backbone.mean),
            **super().state(),
        }

    def describe(self) -> list[str]:
        """What is about to be trained, in lines to print."""
        config = self.config
        lines = [f"{config.net} on {self.describe_data()}", describe_classes(self.data)]
        if origin := self.backbone.detector or self.backbone.pretrained:
            frozen = f"; frozen up to {config.freeze}" if config.freeze else ""
            norm = "; batch norm stays as it has it" if self.backbone.pretrained and config.backbone != "vgg16" else ""
            lines.append(f"starts from {origin}{norm}{frozen}")
        else:
            lines.append(
                "starts from random weights, which the paper does not: the figures say nothing about its tables 7 and 8"
            )
        return lines + self.describe_faults()

    def describe_changes(self, state: dict[str, Any]) -> list[str]:
        """Whether batch norm is trained, and the checkpoint `state` was written by another number of processes."""
        before = state["config"].get("devices")
        if before == world_size() or self.backbone.pretrained:
            return []
        return [f"note: begun on {before} devices; on {world_size()} batch norm sees other images together"]

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json says of the finished run."""
        config, examples = self.config, self.data
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
            f" {self.describe_tested(len(self.data.test) - last.get('skipped', 0))} at iteration {self.iteration},"
            " the last"
        )

    def _title(self) -> str:
        return f"{self.config.net} on {self.label}, seed {self.config.seed}"

"""The command `resnet-detect`: from a configuration to a trained detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from resnet_train.config.detection import DetectConfig
from resnet_train.data.sampler import generator
from resnet_train.detection.annotations import Examples
from resnet_train.detection.build import build_like_checkpoint, build_new
from resnet_train.detection.coco import read_coco
from resnet_train.detection.evaluate import check_shape
from resnet_train.detection.masks import check_masks
from resnet_train.detection.model import losses_of
from resnet_train.detection.train import DetectionTask
from resnet_train.detection.voc import read_voc
from resnet_train.engine.boxes import begin
from resnet_train.engine.distributed import raise_on_all_ranks
from resnet_train.engine.run import check_compute, run
from resnet_train.errors import UserError


def detect(config: DetectConfig, directory: Path) -> int:
    """Train in `directory`, resuming a run that was cut there. The exit code and errors of `engine.run.run`."""
    return run(config, directory, command="resnet-detect", open_data=open_data, build=build, kind="detector")


def open_data(config: DetectConfig) -> Examples:
    """The pictures and boxes that the configuration names. Raises UserError."""
    raise_on_all_ranks(lambda: check_compute(config.batch_size, config.device, config.precision))
    return raise_on_all_ranks(lambda: read_examples(config))


def read_examples(config: DetectConfig) -> Examples:
    """The pictures and boxes that the configuration names. Raises UserError."""
    examples = _read(config, config.data.train, config.data.classes)
    for example in (*examples.train, *examples.test):
        check_shape(str(example.path), (example.height, example.width), config.min_size, config.max_size)
    for example in examples.train if config.masks else ():
        check_masks(example, config.min_size, config.max_size)
    return examples


def read_test(config: DetectConfig, classes: list[str]) -> Examples:
    """The pictures and boxes of the test list alone, for a detector of these classes. Raises UserError."""
    examples = _read(config, [], classes)
    if examples.classes != classes:  # COCO's are those of its JSON
        other = next((name for name in examples.classes if name not in classes), None)
        missing = next((name for name in classes if name not in examples.classes), None)
        reason = "has them in another order" if not missing else f"does not have the class {missing}"
        reason = f"has the class {other}, which the checkpoint does not" if other else reason
        raise UserError(f"data.test={config.data.test}: {reason}; its classes are {', '.join(classes)[:300]}")
    return examples


def _read(config: DetectConfig, train: list[str], classes: list[str] | None) -> Examples:
    data = config.data
    assert data.root is not None  # the check of the configuration has seen to it
    if data.name == "coco":
        return read_coco(Path(data.root), train=train, test=data.test, broken=data.broken, masks=config.masks)
    det = data.name == "det"
    return read_voc(Path(data.root), train=train, test=data.test, classes=classes, broken=data.broken, det=det)


def build(
    config: DetectConfig, examples: Examples, device: torch.device, state: dict[str, Any] | None = None
) -> DetectionTask:
    """The detector and its optimiser, from a checkpoint's `state`, if given, else as they begin. Raises UserError."""
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    if state is None:
        model, backbone = build_new(config, examples.classes)
    else:
        model, backbone = build_like_checkpoint(config, state)
    names = losses_of(config.masks)
    return begin(DetectionTask, config, model, device, state, names, data=examples, backbone=backbone)

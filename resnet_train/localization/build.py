"""From a configuration to a localizer, around the layers of a classification net or as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_train.config.localization import LocalizeConfig, config_from_checkpoint
from resnet_train.detection.build import precision_of
from resnet_train.detection.model import RATIOS
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import to_device
from resnet_train.errors import UserError
from resnet_train.localization.find import Trained
from resnet_train.localization.model import Localizer, stride_of
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.weights.source import read_source

KIND = "localizer"  # of checkpoints


@dataclass(frozen=True)
class Around:
    """The net that a localizer is built around, as its checkpoint keeps it."""

    family: str
    depth: int
    shortcut: str
    bottleneck_stride: str
    mean: list[float]  # of images in 0 to 1, subtracted from them
    std: list[float]  # and what is left divided by
    name: str  # of the net
    file: str  # that it came from

    @property
    def net(self) -> str:
        """The net's name: resnet-101-B."""
        return f"{'plain' if self.shortcut == 'none' else 'resnet'}-{self.depth}" + (
            "" if self.shortcut == "none" else f"-{self.shortcut}"
        )


def build_new(config: LocalizeConfig, classes: int) -> tuple[Localizer, Around]:
    """The localizer as training begins: the layers of `init_from`, and new ones for the classes. Raises UserError."""
    path = Path(config.init_from)
    source = read_source(path)
    around = Around(
        family=source.family,
        depth=source.depth,
        shortcut=source.shortcut,
        bottleneck_stride=source.bottleneck_stride,
        mean=(source.mean.double().mean((0, 1)) / 255).tolist(),
        std=list(source.std),
        name=source.name,
        file=path.name,
    )
    model = _assemble(around, config, classes)
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        own = model.net.state_dict()
        model.net.load_state_dict({name: source.model[name] for name in own})
    return model, around


def build_like_checkpoint(config: LocalizeConfig, state: dict[str, Any]) -> tuple[Localizer, Around]:
    """The localizer that a checkpoint's `state` holds, its weights not yet in it. Raises UserError."""
    with checkpoint.checkpoint_errors(state.get("path", "the checkpoint")):
        around, classes = Around(**state[KIND]), len(state["classes"])
        checkpoint.check_net(state["model"], lambda: _assemble(around, config, classes), around.depth)
        return _assemble(around, config, classes), around


def _assemble(around: Around, config: LocalizeConfig, classes: int) -> Localizer:
    if around.family == "cifar":
        net = cifar_resnet(around.depth, around.shortcut)
    else:
        net = imagenet_resnet(around.depth, around.shortcut, bottleneck_stride=around.bottleneck_stride)
    whole = config.stage == "rcnn"
    shapes = 1 if whole else len(config.anchors) * len(RATIOS)
    return Localizer(net, classes, shapes, pooled=whole, mean=around.mean, std=around.std)


def trained(model: Localizer, around: Around, config: LocalizeConfig, precision: str) -> Trained:
    """A localizer as it is tested."""
    stride = stride_of(around.family)
    return Trained(model, precision, config.crop, stride, config.anchors, config.proposals)


def load_trained(
    path: Path, state: dict[str, Any], stage: str, device: torch.device
) -> tuple[Trained, Around, LocalizeConfig]:
    """What a checkpoint of the given stage holds, for a test. Raises UserError."""
    config = config_from_checkpoint(state["config"])
    if config.stage != stage:
        raise UserError(f"{path}: is of stage={config.stage}; one of stage={stage} is needed")
    model, around = build_like_checkpoint(config, state)
    with checkpoint.checkpoint_errors(path):
        precision = precision_of(state)
        model.load_state_dict(state["model"])
    return trained(to_device(model, device, "fp32").eval(), around, config, precision), around, config

"""From a configuration to a localizer, around the layers of a classification net or as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_train.config.localization import LocalizeConfig, config_from_checkpoint
from resnet_train.detection.model import RATIOS
from resnet_train.engine import checkpoint
from resnet_train.engine.boxes import restore
from resnet_train.errors import UserError
from resnet_train.localization.model import Localizer, stride_of
from resnet_train.localization.predict import Predictor
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.weights.source import read_source

KIND = "localizer"  # of checkpoints


@dataclass(frozen=True)
class Backbone:
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


def build_new(config: LocalizeConfig, classes: int) -> tuple[Localizer, Backbone]:
    """The localizer as training begins: the layers of `init_from`, and new ones for the classes. Raises UserError."""
    path = Path(config.init_from)
    source = read_source(path)
    backbone = Backbone(
        family=source.family,
        depth=source.depth,
        shortcut=source.shortcut,
        bottleneck_stride=source.bottleneck_stride,
        mean=(source.mean.double().mean((0, 1)) / 255).tolist(),
        std=list(source.std),
        name=source.name,
        file=path.name,
    )
    model = _assemble(backbone, config, classes)
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        own = model.net.state_dict()
        model.net.load_state_dict({name: source.model[name] for name in own})
    return model, backbone


def build_like_checkpoint(config: LocalizeConfig, state: dict[str, Any]) -> tuple[Localizer, Backbone]:
    """The localizer that a checkpoint's `state` holds, its weights not yet in it. Raises UserError."""
    with checkpoint.checkpoint_errors(state["path"]):
        backbone, classes = Backbone(**state[KIND]), len(state["classes"])
        checkpoint.check_net(state["model"], lambda: _assemble(backbone, config, classes), backbone.depth)
        return _assemble(backbone, config, classes), backbone


def _assemble(backbone: Backbone, config: LocalizeConfig, classes: int) -> Localizer:
    if backbone.family == "cifar":
        net = cifar_resnet(backbone.depth, backbone.shortcut)
    else:
        net = imagenet_resnet(backbone.depth, backbone.shortcut, bottleneck_stride=backbone.bottleneck_stride)
    whole = config.stage == "rcnn"
    shapes = 1 if whole else len(config.anchors) * len(RATIOS)
    return Localizer(net, classes, shapes, pooled=whole, mean=backbone.mean, std=backbone.std)


def predictor_of(model: Localizer, backbone: Backbone, config: LocalizeConfig, precision: str) -> Predictor:
    """A localizer as it is tested."""
    stride = stride_of(backbone.family)
    return Predictor(model, precision, config.crop, stride, config.anchors, config.proposals)


def load_predictor(
    state: dict[str, Any], stage: str, device: torch.device
) -> tuple[Predictor, Backbone, LocalizeConfig]:
    """What a checkpoint of the given stage holds, for a test. Raises UserError."""
    config = config_from_checkpoint(state["config"])
    if config.stage != stage:
        raise UserError(f"{state['path']}: is of stage={config.stage}; one of stage={stage} is needed")
    model, backbone = build_like_checkpoint(config, state)
    model, precision = restore(model, state, device)
    return predictor_of(model, backbone, config, precision), backbone, config

"""The network that a configuration names."""

from __future__ import annotations

from typing import Any

from resnet_train.config.train import Config
from resnet_train.engine import checkpoint
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import ResNet


def build_network(config: Config, num_classes: int) -> ResNet:
    """The network that the configuration names, initialised from torch's random state."""
    if config.data.family == "cifar":
        return cifar_resnet(
            config.depth, config.shortcut, num_classes=num_classes, init=config.init, zero_gamma=config.zero_gamma
        )
    return imagenet_resnet(
        config.depth,
        config.shortcut,
        num_classes=num_classes,
        bottleneck_stride=config.bottleneck_stride,
        init=config.init,
        zero_gamma=config.zero_gamma,
    )


def check_net(config: Config, state: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint's `state` does not hold the net that its `config` declares; makes none."""
    checkpoint.check_net(state["model"], lambda: build_network(config, len(state["classes"])), config.depth)
    checkpoint.check_mean(state["mean"])

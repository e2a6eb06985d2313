"""Building the network of a configuration."""

from __future__ import annotations

from typing import Any

from resnet_train.config.train import Config
from resnet_train.engine import checkpoint
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import ResNet


def build_network(config: Config, num_classes: int) -> ResNet:
    """Build the network of the configuration, initialised from torch's random state."""
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
    """Raise ValueError if a checkpoint's `state` does not have the net of its `config`; the net is not built."""
    images = state["measure"].get("bn_images", 1)  # only what needs it asks for it
    if type(images) is not int or images < 1:
        raise ValueError(f"batch norm's statistics over {images} images")
    checkpoint.check_net(state["model"], lambda: build_network(config, len(state["classes"])), config.depth)
    checkpoint.check_mean(state["mean"])

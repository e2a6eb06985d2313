"""Configurations of the commands for single images: typed dataclasses and their checks; no torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from resnet_train.config import keys
from resnet_train.config.data import EvalData, FeaturesData, check_other_data
from resnet_train.config.paths import anchored, check_checkpoints, check_image, check_out, check_paths
from resnet_train.config.schema import from_dict
from resnet_train.errors import UserError
from resnet_train.files import expand


@dataclass(frozen=True)
class ClassifyConfig:
    """The configuration of `resnet-classify` except the images: configs/classify.yaml."""

    checkpoint: str
    device: keys.Device
    out: str | None


@dataclass(frozen=True)
class FeaturesConfig:
    """The configuration of `resnet-features` except the images: configs/features.yaml."""

    checkpoint: str
    layer: str
    out: str
    data: FeaturesData
    split: Literal["test", "val", "train"]
    device: keys.Device


def check_classify(values: Mapping[str, Any], images: Collection[str]) -> ClassifyConfig:
    """The checked configuration of the classification of `images`. Raises UserError."""
    config = from_dict(ClassifyConfig, values)
    check_paths({"out": config.out})
    check_checkpoints([config.checkpoint])
    check_out(config.out, ("checkpoint", "net", "classes", "images"))
    if not images:
        raise UserError("name the images, as in resnet-classify cat.jpg dog.png checkpoint=…")
    for image in images:
        check_image(image)
    return config


def check_features(
    values: Mapping[str, Any], images: Collection[str], requested: Collection[str] = ()
) -> tuple[FeaturesConfig, EvalData | None]:
    """The checked configuration of `resnet-features` and, if no `images` are named, its data. Raises UserError."""
    if values["out"] is None:
        raise UserError("out: is needed; add out=…")
    config = from_dict(FeaturesConfig, values)
    check_paths({"out": config.out, "data.root": config.data.root})
    check_checkpoints([config.checkpoint])
    if expand(config.out).suffix not in (".safetensors", ".npz"):
        raise UserError(f"out={config.out}: must end in .safetensors or .npz")
    check_out(config.out, ("checkpoint", "layer", "images"))
    if images:
        for key in requested:
            if key == "split" or key.startswith("data"):
                raise UserError(f"{key.removesuffix('.name')}: is not used with images; remove it, or the images")
        for image in images:
            check_image(image)
        return config, None
    if config.data.name == "none" and config.data.root is None:
        raise UserError("name the images, as in resnet-features cat.jpg dog.png checkpoint=… out=…, or data=same")
    data = EvalData("same" if config.data.name == "none" else config.data.name, config.data.root)
    check_other_data(data)
    return config, anchored(data)

"""What `resnet-localize` may be told: typed dataclasses and their checks; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from resnet_train.config import boxes, keys
from resnet_train.config.keys import Alias, OnlyFor, Range
from resnet_train.config.layout import BOXES, class_folders_of_boxes
from resnet_train.config.paths import anchored, check_checkpoints, check_file, check_out, check_paths
from resnet_train.config.schema import from_dict
from resnet_train.errors import UserError
from resnet_train.files import expand


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig(boxes.BoxConfig):
    """The configuration of `resnet-localize`: configs/localization/localize.yaml and the recipe."""

    stage: Literal["rpn", "rcnn"]
    init_from: Annotated[str, Alias("pretrained", "weights")]
    rpn: Annotated[str | None, OnlyFor("rcnn")]
    crop: Annotated[int, Range(16, 1024)]
    flip: bool
    anchors: Annotated[list[int], Range(1, 4096), OnlyFor("rpn")]
    proposals: Annotated[int, Range(1, 10_000), OnlyFor("rcnn")]


@dataclass(frozen=True)
class LocalizeTestConfig:
    """The configuration of `resnet-localize test`: configs/localization/localize_test.yaml."""

    checkpoint: str
    rcnn: str | None
    classifier: str | None
    dense: bool
    scales: Annotated[list[int] | None, Range(32, 4096)]
    data: boxes.BoxTestData
    devices: keys.Devices
    device: keys.Device
    timeout: keys.Timeout
    out: str | None


def check_localize(values: Mapping[str, Any], requested: Collection[str] = ()) -> LocalizeConfig:
    """The checked configuration of a run from plain, resolved `values`; `requested` are the keys that the user named.

    Looks at the command line and at directory listings only. Raises UserError.
    """
    config = from_dict(LocalizeConfig, values)
    check_paths({"rpn": config.rpn})
    boxes.check_boxes(config, requested, "stage")
    _check_tree(config.data.root)
    if config.stage == "rcnn":
        if config.rpn is None:
            raise UserError("rpn: stage=rcnn learns from what an RPN proposes; add rpn=, a checkpoint of stage=rpn")
        check_file("rpn", config.rpn)
        config = dataclasses.replace(config, rpn=str(expand(config.rpn).absolute()))
    return boxes.with_absolute_paths(config)


def _check_tree(given: str | None, *, train: bool = True) -> None:
    """Refuse a folder that a look at it shows not to be an ImageNet tree with boxes. Raises UserError.

    A test needs no training images.
    """
    if given is None:
        raise UserError(f"data.root: is needed: a folder with train/, val/ and {BOXES}/")
    class_folders_of_boxes(boxes.check_root(given), train=train)


TEST_RESULT = ("task", "method", "protocol")  # keys of a test's result


def check_localize_test(values: Mapping[str, Any]) -> LocalizeTestConfig:
    """The checked configuration of a test. Raises UserError."""
    config = from_dict(LocalizeTestConfig, values)
    check_paths({"data.root": config.data.root, "out": config.out, "rcnn": config.rcnn})
    check_paths({"classifier": config.classifier})
    check_checkpoints([config.checkpoint])
    for key in ("rcnn", "classifier"):
        if getattr(config, key) is not None:
            check_file(key, getattr(config, key))
    check_out(config.out, TEST_RESULT)
    if config.scales is not None and not config.dense:
        raise UserError(f"scales={config.scales}: are those of dense=true; add that, or remove them")
    if config.scales is not None:
        boxes.check_rising("scales", config.scales, "[224,256,384,480,640]")
    if config.data.root is not None:
        _check_tree(config.data.root, train=False)
    return dataclasses.replace(config, data=anchored(config.data))


def with_test_data(config: LocalizeConfig, requested: boxes.BoxTestData) -> LocalizeConfig:
    """A checkpoint's configuration, on the images that the command line names, if any. Raises UserError."""
    tested = boxes.with_test_data(config, requested)
    _check_tree(tested.data.root, train=False)
    return tested


def config_from_checkpoint(values: Any) -> LocalizeConfig:
    """The configuration that a checkpoint holds. Raises UserError if it is of another version."""
    try:
        return from_dict(LocalizeConfig, values)
    except UserError as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def run_directory(config: LocalizeConfig, requested: Collection[str]) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA-localization/STAGE/ and the values of keys that were `requested`."""
    return boxes.run_directory(config, requested, "localization", config.stage, ["stage"])

"""What `resnet-localize` may be told: typed dataclasses and their checks; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from resnet_train.config import keys
from resnet_train.config.keys import Alias, Free, OnlyFor, Range, StoredAs
from resnet_train.config.layout import BOXES, class_folders_of_boxes
from resnet_train.config.paths import anchored, check_checkpoints, check_file, check_out, check_paths
from resnet_train.config.run_dir import plain_word, run_name, unnamed
from resnet_train.config.schema import flat, format_value, from_dict, unread_keys
from resnet_train.config.train import check_divisible
from resnet_train.errors import UserError
from resnet_train.files import expand


@dataclass(frozen=True)
class LocalizeData:
    """An ImageNet tree with the boxes of its images: configs/localization/localize.yaml."""

    root: keys.Root
    workers: Annotated[int, Range(0, 256), Free()]
    broken: keys.Broken


@dataclass(frozen=True)
class LocalizeConfig:
    """Everything that `resnet-localize` is told: configs/localization/localize.yaml and the recipe."""

    stage: Literal["rpn", "rcnn"]
    data: Annotated[LocalizeData, Alias("dataset")]
    init_from: Annotated[str, Alias("pretrained", "weights")]
    rpn: Annotated[str | None, OnlyFor("rcnn")]
    seed: keys.Seed
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    devices: keys.Devices
    device: keys.Device
    max_restarts: keys.MaxRestarts
    timeout: keys.Timeout
    checkpoint_every: keys.CheckpointEvery
    keep_every: keys.KeepEvery
    run_dir: keys.RunDir
    resume: Annotated[Literal["auto", "never"], Free(), StoredAs("auto")]
    recipe: str
    iterations: keys.Iterations
    batch_size: keys.BatchSize
    lr: keys.LearningRate
    drops: keys.Drops
    momentum: keys.Momentum
    weight_decay: keys.WeightDecay
    crop: Annotated[int, Range(16, 1024)]
    flip: bool
    anchors: Annotated[list[int], Range(1, 4096), OnlyFor("rpn")]
    proposals: Annotated[int, Range(1, 10_000), OnlyFor("rcnn")]
    log_every: keys.LoggingInterval
    eval_every: keys.LoggingInterval

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @property
    def data_label(self) -> str:
        """The data's name in every record: the folder's own."""
        return expand(self.data.root or "").resolve().name or "root"


@dataclass(frozen=True)
class LocalizeTestData:
    """The images of a test; null is what the checkpoint has."""

    root: keys.Root
    broken: Literal["stop", "skip"] | None


@dataclass(frozen=True)
class LocalizeTestConfig:
    """Everything that `resnet-localize test` is told: configs/localization/localize_test.yaml."""

    checkpoint: str
    rcnn: str | None
    classifier: str | None
    dense: bool
    scales: Annotated[list[int] | None, Range(32, 4096)]
    data: LocalizeTestData
    devices: keys.Devices
    device: keys.Device
    timeout: keys.Timeout
    out: str | None


def check_localize(values: Mapping[str, Any], asked: Collection[str] = ()) -> LocalizeConfig:
    """The checked configuration of a run from plain, resolved `values`; `asked` are the keys that the user named.

    Looks at the command line and at directory listings only. Raises UserError.
    """
    config = from_dict(LocalizeConfig, values)
    paths = {"data.root": config.data.root, "run_dir": config.run_dir, "init_from": config.init_from}
    check_paths(paths | {"rpn": config.rpn})
    for key in unread_keys(LocalizeConfig, config.stage):
        if key in asked:
            value = format_value(getattr(config, key))
            raise UserError(f"{key}={value}: is not used by stage={config.stage}; remove it")
    if config.devices != "auto":
        check_divisible(config.batch_size, config.devices)
    if config.drops != sorted(set(config.drops)):
        raise UserError(f"drops={config.drops}: must rise, as [0.5,0.75] does")
    if config.anchors != sorted(set(config.anchors)) or not config.anchors:
        raise UserError(f"anchors={config.anchors}: must rise, as [64,128,256] does")
    if config.precision == "fp16" and config.device == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU use bf16 or fp32")
    _check_tree(config.data.root)
    if config.stage == "rcnn":
        if config.rpn is None:
            raise UserError("rpn: stage=rcnn learns from what an RPN proposes; add rpn=, a checkpoint of stage=rpn")
        check_file("rpn", config.rpn)
        config = dataclasses.replace(config, rpn=str(expand(config.rpn).absolute()))
    source = str(expand(config.init_from).absolute())
    return dataclasses.replace(config, data=anchored(config.data), init_from=source)


def _check_tree(given: str | None) -> None:
    """Refuse a folder that a look at it shows not to be an ImageNet tree with boxes. Raises UserError."""
    if given is None:
        raise UserError(f"data.root: is needed: a folder with train/, val/ and {BOXES}/")
    root = expand(given)
    if not root.is_dir():
        raise UserError(f"data.root={given}: {'is no folder' if root.exists() else 'there is no such folder'}")
    class_folders_of_boxes(root)


def check_localize_test(values: Mapping[str, Any]) -> LocalizeTestConfig:
    """The checked configuration of a test. Raises UserError."""
    config = from_dict(LocalizeTestConfig, values)
    check_paths({"data.root": config.data.root, "out": config.out, "rcnn": config.rcnn})
    check_paths({"classifier": config.classifier})
    check_checkpoints([config.checkpoint])
    for key in ("rcnn", "classifier"):
        if getattr(config, key) is not None:
            check_file(key, getattr(config, key))
    check_out(config.out)
    if config.scales is not None and not config.dense:
        raise UserError(f"scales={config.scales}: are those of dense=true; add that, or remove them")
    if config.scales is not None and (not config.scales or config.scales != sorted(set(config.scales))):
        raise UserError(f"scales={config.scales}: must rise, as [224,256,384,480,640] does")
    if config.data.root is not None:
        _check_tree(config.data.root)
    return dataclasses.replace(config, data=anchored(config.data))


def with_test_data(config: LocalizeConfig, asked: LocalizeTestData) -> LocalizeConfig:
    """A checkpoint's configuration, on the images that the command line names, if any. Raises UserError."""
    given = {key: value for key, value in dataclasses.asdict(asked).items() if value is not None}
    data = dataclasses.replace(config.data, **given)
    _check_tree(data.root)
    return dataclasses.replace(config, data=data)


def config_from_checkpoint(values: Any) -> LocalizeConfig:
    """The configuration that a checkpoint holds. Raises UserError if it is of another version."""
    try:
        return from_dict(LocalizeConfig, values)
    except UserError as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def run_directory(config: LocalizeConfig, asked: Iterable[str]) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA-localization/STAGE/ and the values of keys that were `asked` for."""
    if config.run_dir is not None:
        return expand(config.run_dir)
    told = {"data", "stage", "seed"} | unnamed(LocalizeConfig)
    place = Path("runs") / f"{plain_word(config.data_label) or 'images'}-localization" / config.stage
    return place / run_name(flat(config.plain()), set(asked) - told, config.seed)

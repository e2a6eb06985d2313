"""What `resnet-detect` and `resnet-localize`, which learn boxes, may both be told, and its checks; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from resnet_train.config import keys
from resnet_train.config.keys import Alias, Free, Range, StoredAs
from resnet_train.config.paths import anchored, check_paths
from resnet_train.config.run_dir import mark, plain_word, run_name, unnamed
from resnet_train.config.schema import flat, format_value, unread_keys
from resnet_train.config.train import check_divisible
from resnet_train.errors import UserError
from resnet_train.files import expand, unlinked


@dataclass(frozen=True, kw_only=True)
class BoxData:
    """Images with boxes."""

    root: keys.Root
    workers: Annotated[int, Range(0, 256), Free()]
    broken: keys.Broken


@dataclass(frozen=True, kw_only=True)
class BoxConfig:
    """A run that learns boxes."""

    data: Annotated[BoxData, Alias("dataset")]
    init_from: keys.InitFrom
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
    anchors: Annotated[list[int], Range(1, 4096)]
    log_every: keys.LoggingInterval
    eval_every: keys.LoggingInterval

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @property
    def data_label(self) -> str:
        """The data's name in every record: the folder's own."""
        return expand(self.data.root or "").resolve().name or "root"


@dataclass(frozen=True, kw_only=True)
class BoxTestData:
    """The images of a test; null is what the checkpoint has."""

    root: keys.Root
    broken: Literal["stop", "skip"] | None


C = TypeVar("C", bound=BoxConfig)


def check_boxes(config: BoxConfig, requested: Collection[str], reader: str) -> None:
    """Refuse what neither command can have; the value of the key `reader` says which keys are read. Raises UserError.

    `requested` are the keys that the user named.
    """
    check_paths({"data.root": config.data.root, "run_dir": config.run_dir, "init_from": config.init_from})
    for key in unread_keys(type(config), kind := getattr(config, reader)):
        if key in requested:
            value = format_value(getattr(config, key))
            raise UserError(f"{key}={value}: is not used by {reader}={kind}; remove it")
    if config.devices != "auto":
        check_divisible(config.batch_size, config.devices)
    if config.drops:
        check_rising("drops", config.drops, "[0.5,0.75]")
    check_rising("anchors", config.anchors, "[128,256,512]")
    if config.precision == "fp16" and config.device == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU use bf16 or fp32")


def check_rising(key: str, values: list[Any], example: str) -> None:
    """Refuse a list that is empty or does not rise. Raises UserError."""
    if not values or values != sorted(set(values)):
        raise UserError(f"{key}={values}: must rise, as {example} does")


def check_root(given: str) -> Path:
    """The folder `data.root`. Raises UserError where there is none."""
    root = expand(given)
    if not root.is_dir():
        raise UserError(f"data.root={given}: {'is no folder' if root.exists() else 'there is no such folder'}")
    return root


def with_absolute_paths(config: C) -> C:
    """`config` with absolute paths, so that the record of a run holds from any folder."""
    source = None if config.init_from is None else unlinked(expand(config.init_from))
    return dataclasses.replace(config, data=anchored(config.data), init_from=source)


def with_test_data(config: C, requested: BoxTestData) -> C:
    """A checkpoint's configuration, on the images that the command line names, if any."""
    given = {key: value for key, value in dataclasses.asdict(requested).items() if value is not None}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))


def name_elsewhere(tested: BoxConfig, trained: BoxConfig) -> list[str]:
    """The word of a result's name for images in another folder than training's; none for the same folder."""
    here, there = (expand(config.data.root or "").resolve() for config in (tested, trained))
    return [] if here == there else [f"elsewhere-{plain_word(tested.data_label)}-{mark(tested.data.root or '')}"]


def run_directory(config: BoxConfig, requested: Collection[str], task: str, kind: str, shown: Collection[str]) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA-TASK/KIND/ and the values of the other keys that were `requested`.

    `shown` are the keys that `kind` tells.
    """
    if config.run_dir is not None:
        return expand(config.run_dir)
    named = set(requested) - {"data", "seed", *shown} - unnamed(type(config))
    place = Path("runs") / f"{plain_word(config.data_label) or 'images'}-{task}" / kind
    return place / run_name(flat(config.plain()), named, config.seed)

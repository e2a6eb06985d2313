"""Configurations of the other commands: typed dataclasses and their checks; no torch here."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from resnet_train.config import keys
from resnet_train.config.data import EvalData, PackData, WeightsData, check_other_data
from resnet_train.config.keys import OnlyFor, Range
from resnet_train.config.layout import OFFICIAL, PACKED, REMOTE, check_source, is_official, is_packed, is_remote
from resnet_train.config.paths import (
    anchored,
    check_checkpoints,
    check_file,
    check_folder,
    check_out,
    check_paths,
    writable,
)
from resnet_train.config.schema import as_list, format_value, from_dict, unread_keys
from resnet_train.config.train import Config, check_train
from resnet_train.errors import UserError, nearest
from resnet_train.files import expand


@dataclass(frozen=True)
class EvalConfig:
    """The configuration of `resnet-eval`: configs/eval.yaml."""

    data: EvalData
    checkpoint: list[str]
    protocol: Literal["center", "tencrop", "multiscale"]
    precise_bn: Annotated[int, Range(0, 10**6)]
    split: Literal["test", "val", "train"]
    details: bool
    devices: keys.Devices
    device: keys.Device
    timeout: keys.Timeout
    out: str | None


@dataclass(frozen=True)
class ReportConfig:
    """The configuration of `resnet-report`: configs/report.yaml."""

    report: Literal["runs", "complexity"]
    runs: list[str]
    out: str
    open: bool


@dataclass(frozen=True)
class ResponsesConfig:
    """The configuration of `resnet-responses`: configs/responses.yaml."""

    checkpoint: list[str]
    data: EvalData
    split: Literal["test", "val", "train"]
    images: Annotated[int, Range(2)]
    device: keys.Device
    out: str


@dataclass(frozen=True)
class BenchConfig:
    """The configuration of `resnet-bench`, in addition to one of training: configs/bench.yaml."""

    bench: Literal["step", "loop", "loader", "eval", "startup", "memory"]
    rounds: Annotated[int, Range(1, 1000)]
    seconds: Annotated[float, Range(0, 3600, above=True)]
    steps: Annotated[int, Range(2, 10**9)]
    packed: str | None
    out: str | None


@dataclass(frozen=True)
class PackConfig:
    """The configuration of `resnet-pack`: configs/pack.yaml."""

    data: PackData
    out: str | None
    check: str | None
    shorter_side: keys.ShorterSide
    quality: keys.Quality
    shard_images: keys.ShardImages
    workers: Annotated[int, Range(0, 256)]


@dataclass(frozen=True)
class WeightsConfig:
    """The configuration of `resnet-weights`: configs/weights.yaml."""

    word: Literal["import", "export"]
    file: str
    out: str
    format: Literal["auto", "torchvision", "akamaster", "safetensors", "onnx"]
    std: Annotated[list[float] | None, Range(0, 10, above=True)]
    mean: Annotated[list[float] | None, Range(0, 1), OnlyFor("import")]
    arch: Annotated[Literal["resnet", "plain"] | None, OnlyFor("import")]
    bottleneck_stride: Annotated[Literal["1x1", "3x3"] | None, OnlyFor("import")]
    classes: Annotated[str | None, OnlyFor("import")]
    precision: Annotated[Literal["bf16", "fp16", "fp32", "fp64"] | None, OnlyFor("import")]
    data: Annotated[WeightsData, OnlyFor("import")]


# The formats of each subcommand of `resnet-weights`, and the formats of file suffixes.
FORMATS = {"import": ("auto", "torchvision", "akamaster"), "export": ("auto", "torchvision", "safetensors", "onnx")}
SUFFIXES = {".pth": "torchvision", ".pt": "torchvision", ".safetensors": "safetensors", ".onnx": "onnx"}
# The values of training's keys in `resnet-bench`.
FIXED_BY_BENCH = {
    "iterations": 10**9,
    "eval_every": 10**9,
    "checkpoint_every": 10**9,
    "keep_every": 0,
    "max_restarts": 0,
    "timeout": 600,
    "run_dir": None,
    "resume": "never",
    "init_from": None,
    "freeze": None,
    "scale": 1,
}
EVAL_RESULT = ("net", "split", "protocol", "wrong", "seen")  # keys of an evaluation's result
UNREAD_BY_BENCH = (*FIXED_BY_BENCH, "data.validation")  # it reads all other keys of the data set


def check_eval(values: Mapping[str, Any]) -> EvalConfig:
    """The checked configuration of an evaluation. Raises UserError."""
    config = from_dict(EvalConfig, {**values, "checkpoint": as_list(values["checkpoint"])})
    check_paths({"data.root": config.data.root, "out": config.out})
    check_checkpoints(config.checkpoint)
    check_other_data(config.data)
    check_out(config.out, EVAL_RESULT)
    return dataclasses.replace(config, data=anchored(config.data))


def check_report(values: Mapping[str, Any]) -> ReportConfig:
    """The checked configuration of a report. Raises UserError."""
    config = from_dict(ReportConfig, {**values, "runs": as_list(values["runs"])})
    if config.report == "complexity" and config.runs:
        raise UserError(f"resnet-report complexity: is about nets, not about runs; remove {config.runs[0]}")
    if config.report == "runs" and not config.runs:
        raise UserError("name the runs, or folders of runs, as in resnet-report runs out=report")
    for name in config.runs:
        check_paths({"runs": name})
        if not expand(name).is_dir():
            raise UserError(f"{name}: there is no such folder{nearest(name, ['complexity'])}")
    check_folder(config.out, "report.md", ["resnet-report"])
    return config


def check_responses(values: Mapping[str, Any]) -> ResponsesConfig:
    """The checked configuration of a measurement of layer responses. Raises UserError."""
    config = from_dict(ResponsesConfig, {**values, "checkpoint": as_list(values["checkpoint"])})
    check_checkpoints(config.checkpoint)
    check_paths({"data.root": config.data.root})
    check_other_data(config.data)
    check_folder(config.out, "responses.csv", ["net", "seed", "iteration", "std"])
    return dataclasses.replace(config, data=anchored(config.data))


def check_pack(values: Mapping[str, Any]) -> PackConfig:
    """The checked configuration of packing, or of the verification of a pack. Raises UserError."""
    config = from_dict(PackConfig, values)
    check_paths({"data.root": config.data.root, "out": config.out, "check": config.check})
    if config.check is not None:
        for key, value in (("data.root", config.data.root), ("out", config.out)):
            if value is not None:
                raise UserError(f"{key}={value}: is not used by check=; remove it")
        if "://" in config.check and not is_remote(config.check):
            raise UserError(f"check={config.check}: allowed are folders and {' '.join(REMOTE)}")
        if not is_packed(config.check):
            raise UserError(f"check={config.check}: is no packed folder; it has no {PACKED}, which is written last")
        return config
    if config.out is None or config.data.root is None:
        raise UserError("resnet-pack: needs data.root=TREE out=FOLDER, or check=FOLDER")
    if is_packed(config.data.root):
        raise UserError(f"data.root={config.data.root}: is packed already; name the tree of class folders")
    if "://" in config.out or is_remote(config.out):
        raise UserError(f"out={config.out}: pack to a folder, and copy that there with its provider's own tool")
    check_source("imagenet", config.data.root)
    out, root = expand(config.out), expand(config.data.root)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={config.out}: is a file; name a folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"out={config.out}: is inside the tree; use another folder")
    if not writable(out / PACKED):
        raise UserError(f"out={config.out}: is not a folder that you may write to")
    return dataclasses.replace(config, data=anchored(config.data))


def check_weights(values: Mapping[str, Any], requested: Collection[str] = ()) -> WeightsConfig:
    """The checked configuration of an import or export. Raises UserError."""
    word = values["word"]
    if word not in FORMATS:
        raise UserError(
            f"{'' if word is None else f'{word}: '}the first word is import or export, as in resnet-weights import"
            f" FILE out=…{nearest(str(word), FORMATS)}"
        )
    if values["file"] is None:
        raise UserError(f"name the file, as in resnet-weights {word} FILE out=…")
    if values["out"] is None:
        raise UserError("out: is needed; add out=…")
    config = from_dict(WeightsConfig, values)
    check_paths({"file": config.file, "out": config.out, "classes": config.classes, "data.root": config.data.root})
    if config.format not in FORMATS[word]:
        allowed = ", ".join(FORMATS[word])
        raise UserError(f"format={config.format}: resnet-weights {word} has {allowed}")
    unread = unread_keys(WeightsConfig, word)
    for key in requested:
        if key.split(".")[0] in unread:
            raise UserError(f"{key}: is not used by resnet-weights {word}; remove it")
    for key, value in (("mean", config.mean), ("std", config.std)):
        if value is not None and len(value) != 3:
            raise UserError(f"{key}={value}: must be three numbers, of red, green and blue, as [0.5,0.5,0.5]")
    check_file("file", config.file)
    if config.classes is not None:
        check_file("classes", config.classes)
    if config.data.root is not None:
        official = next((name for name in OFFICIAL if is_official(name, expand(config.data.root))), "imagenet")
        check_source(official if config.data.name == "auto" else config.data.name, config.data.root, train=False)
    if word == "export":
        if config.format == "auto":
            suffix = expand(config.out).suffix
            if suffix not in SUFFIXES:
                raise UserError(f"out={config.out}: ends in none of {' '.join(SUFFIXES)}; add format=")
            config = dataclasses.replace(config, format=SUFFIXES[suffix])  # type: ignore[arg-type]
        check_checkpoints([config.file])
    elif expand(config.out).suffix not in (".pt", ".pth"):
        raise UserError(f"out={config.out}: a checkpoint of resnet-train ends in .pt")
    if expand(config.out).absolute() == expand(config.file).absolute():
        raise UserError(f"out={config.out}: is the file itself; use another name")
    _check_weights_out(config)
    return dataclasses.replace(config, data=anchored(config.data))


def _check_weights_out(config: WeightsConfig) -> None:
    """Raises UserError for files that exist and that no earlier import or export has written."""
    if config.word == "import":
        check_out(config.out, ["imported", "measure"])
    elif config.format == "safetensors":
        check_out(config.out, ["resnet_train"])
    else:
        check_out(config.out, ["written_by", "net"], ".json")
    if config.word == "export":
        check_out(f"{config.out}.json", ["written_by", "net"])


def check_bench(values: Mapping[str, Any], requested: Collection[str] = ()) -> tuple[BenchConfig, Config]:
    """The checked configurations of a benchmark and of the training that it measures. Raises UserError."""
    own = {field.name for field in dataclasses.fields(BenchConfig)}
    names = typing.get_args(typing.get_type_hints(BenchConfig)["bench"])
    if values["bench"] is None:
        raise UserError(f"name what to measure: {', '.join(names)}; as in resnet-bench {names[1]}")
    bench = from_dict(BenchConfig, {key: value for key, value in values.items() if key in own})
    check_paths({"out": bench.out})
    check_out(bench.out, ("bench", "rows", "machine"))
    for key in UNREAD_BY_BENCH:
        if key in requested:
            raise UserError(f"{key}: is not used by resnet-bench; remove it")
    if values["devices"] != 1:
        raise UserError(f"devices={format_value(values['devices'])}: resnet-bench measures one; remove it")
    training = {key: value for key, value in values.items() if key not in own}
    config = check_train(training | FIXED_BY_BENCH, requested, needs_data=False)
    photographs = config.data.family == "imagenet" and bench.bench == "loader"
    if photographs and config.data.root is None:
        raise UserError(
            "data=imagenet: resnet-bench loader measures real photographs; add data.root=, a tree or packed"
        )
    if bench.packed is not None and not (photographs and is_packed(bench.packed)):
        raise UserError(f"packed={bench.packed}: must be a packed folder, for resnet-bench loader data=imagenet")
    if bench.packed is not None and is_packed(config.data.root or ""):
        raise UserError(f"packed={bench.packed}: data.root is packed already; name the tree there")
    if config.data.family == "imagenet" and bench.bench in ("loop", "eval", "memory"):
        raise UserError(
            f"data={config.data.name}: resnet-bench {bench.bench} measures sets in memory; use data=cifar10"
        )
    return bench, config

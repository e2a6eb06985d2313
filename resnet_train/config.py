"""What a configuration may say. Typed dataclasses and their checks; no torch here, so that errors come at once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
import types
import typing
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from resnet_train.errors import UserError
from resnet_train.files import expand, nearest_existing

IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
CIFAR_FOLDER = "cifar-10-batches-py"
PACKED = "pack.json"  # in a folder that resnet-pack has written, once it is whole
PACKING = "packing"  # in one where it is not: what is done so far
REMOTE = ("s3://", "gs://", "azure://", "r2://", "local:")  # where litdata reads from
# These may differ between a run and its continuation: none of them enters the mathematics, but for batch norm's
# statistics where bn_images=device leaves them to the devices; then a note is printed.
FREE_KEYS = {"run_dir", "resume", "checkpoint_every", "keep_every", "device", "devices", "device_batch_size"}
FREE_KEYS |= {"max_restarts", "timeout", "data.root", "data.workers", "data.broken", "activation_checkpointing"}


@dataclass(frozen=True)
class Data:
    """A data set: configs/data/."""

    name: Literal["cifar10", "digits", "imagefolder", "imagenet"]
    family: Literal["cifar", "imagenet"]
    root: str | None
    validation: int
    size: int
    workers: int
    broken: Literal["stop", "skip"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over iterations: configs/schedule/. Each kind has the keys of its own file only."""

    name: Literal["step", "plateau", "cosine"]
    lr: float
    factor: float = 1.0
    drops: list[float] = dataclasses.field(default_factory=list)
    patience: float = 1.0
    threshold: float = 0.0
    watch: Literal["train", "val"] = "train"


@dataclass(frozen=True)
class Warmup:
    """Nets of `depth` layers and more start at `lr` until the training error is below `error` %."""

    depth: int
    lr: float
    error: float


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images: zero padding and crop, flip, scale or area, colour."""

    pad: int
    flip: bool
    shorter_side: list[int] | None
    area: list[float] | None
    colour_jitter: float
    colour_noise: float


@dataclass(frozen=True)
class Config:
    """Everything that `resnet-train` is told: configs/train.yaml, the recipe, the schedule and the data set."""

    data: Data
    schedule: Schedule
    depth: int
    arch: Literal["resnet", "plain"]
    seed: int
    devices: int | Literal["auto"]
    max_restarts: int
    timeout: int
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"]
    device: Literal["auto", "cpu", "cuda"]
    checkpoint_every: int
    keep_every: int
    run_dir: str | None
    resume: str
    recipe: str
    shortcut: Literal["A", "B", "C", "none"]
    bottleneck_stride: Literal["1x1", "3x3"]
    init: Literal["fan_out", "fan_in"]
    zero_gamma: bool
    iterations: int
    batch_size: int
    device_batch_size: int | None
    bn_images: int | Literal["device", "all"]
    activation_checkpointing: bool
    eval_batch_size: int
    momentum: float
    nesterov: bool
    weight_decay: float
    decay: Literal["all", "weights"]
    warmup: Warmup
    normalise: Literal["image", "channels", "standard"]
    augment: Augment
    compile: bool
    log_every: int
    eval_every: int
    init_from: str | None = None
    freeze: Literal["conv1", "layer1", "layer2", "layer3", "layer4"] | None = None

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @property
    def net(self) -> str:
        """The network's name: resnet-110-A, plain-56."""
        return f"{self.arch}-{self.depth}" + ("" if self.arch == "plain" else f"-{self.shortcut}")

    @property
    def data_label(self) -> str:
        """The data's name in every record: a folder's own name, so that look-alikes are never called CIFAR-10."""
        if _is_official(self.data):
            return "cifar10"
        if self.data.root is None:
            return self.data.name
        name = expand(self.data.root).resolve().name or "root"
        return f"{name}-folder" if name in ("cifar10", "digits") else name


@dataclass(frozen=True)
class EvalData:
    """The data to evaluate on; `same` is what the checkpoint was trained on."""

    name: Literal["same", "cifar10", "digits", "imagefolder", "imagenet"]
    root: str | None


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `resnet-eval` is told: configs/eval.yaml."""

    data: EvalData
    checkpoint: list[str]
    protocol: Literal["center", "tencrop", "multiscale"]
    precise_bn: int
    split: Literal["test", "val", "train"]
    devices: int | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    timeout: int
    out: str | None


@dataclass(frozen=True)
class ReportConfig:
    """Everything that `resnet-report` is told: configs/report.yaml."""

    report: Literal["runs", "complexity"]
    runs: list[str]
    out: str
    open: bool


@dataclass(frozen=True)
class ResponsesConfig:
    """Everything that `resnet-responses` is told: configs/responses.yaml."""

    checkpoint: list[str]
    data: EvalData
    split: Literal["test", "val", "train"]
    images: int
    device: Literal["auto", "cpu", "cuda"]
    out: str


@dataclass(frozen=True)
class BenchConfig:
    """What `resnet-bench` is told beside a configuration of training: configs/bench.yaml."""

    bench: Literal["step", "loop", "loader", "eval", "startup", "memory"]
    rounds: int
    seconds: float
    steps: int
    packed: str | None
    out: str | None


@dataclass(frozen=True)
class PackData:
    """The tree to pack."""

    root: str | None
    broken: Literal["stop", "skip"]


@dataclass(frozen=True)
class PackConfig:
    """Everything that `resnet-pack` is told: configs/pack.yaml."""

    data: PackData
    out: str | None
    check: str | None
    shorter_side: int
    quality: int
    shard_images: int
    workers: int


@dataclass(frozen=True)
class WeightsData:
    """The data set that imported weights are for; auto is imagenet or cifar10, as the net is."""

    name: Literal["auto", "cifar10", "digits", "imagefolder", "imagenet"]
    root: str | None
    size: int | None


@dataclass(frozen=True)
class WeightsConfig:
    """Everything that `resnet-weights` is told: configs/weights.yaml."""

    word: Literal["import", "export"]
    file: str
    out: str
    format: Literal["auto", "torchvision", "akamaster", "safetensors", "onnx"]
    std: list[float] | None
    mean: list[float] | None
    arch: Literal["resnet", "plain"] | None
    bottleneck_stride: Literal["1x1", "3x3"] | None
    classes: str | None
    precision: Literal["bf16", "fp16", "fp32", "fp64"]
    data: WeightsData


@dataclass(frozen=True)
class ClassifyConfig:
    """Everything that `resnet-classify` is told beside the images: configs/classify.yaml."""

    checkpoint: str
    device: Literal["auto", "cpu", "cuda"]
    out: str | None


# What `resnet-weights` reads for one of its words only, and the formats of each word.
READ_BY_IMPORT = ("mean", "arch", "bottleneck_stride", "classes", "precision", "data")
FORMATS = {"import": ("auto", "torchvision", "akamaster"), "export": ("auto", "torchvision", "safetensors", "onnx")}
SUFFIXES = {".pth": "torchvision", ".pt": "torchvision", ".safetensors": "safetensors", ".onnx": "onnx"}
# What `resnet-bench` does not read of the recipe and the data set, and what it has in place of training's own keys.
UNREAD_BY_BENCH = ("iterations", "eval_every", "data.validation")
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
# What each family of nets and data does not read; refused when asked for.
UNREAD = {
    "cifar": (
        *("augment.shorter_side", "augment.area", "augment.colour_jitter", "augment.colour_noise", "normalise"),
        *("bottleneck_stride", "data.workers", "data.broken"),
    ),
    "imagenet": ("augment.pad",),
}
# What a number may be: at least, at most; None for no bound. Open below where the name stands in ABOVE.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**63 - 1),
    "scale": (0, 1),
    "depth": (None, 100_000),
    "iterations": (1, 10**9),
    "batch_size": (1, 10**6),
    "eval_batch_size": (1, 10**6),
    "checkpoint_every": (1, None),
    "keep_every": (0, None),
    "log_every": (1, None),
    "eval_every": (1, None),
    "momentum": (0, 1),
    "weight_decay": (0, None),
    "schedule.lr": (0, None),
    "schedule.factor": (0, 1),
    "schedule.drops": (0, 1),
    "schedule.patience": (0, 1),
    "schedule.threshold": (0, 100),
    "warmup.depth": (0, None),
    "warmup.lr": (0, None),
    "warmup.error": (0, 100),
    "augment.pad": (0, 16),
    "augment.shorter_side": (0, 4096),
    "augment.area": (0, 1),
    "augment.colour_jitter": (0, 1),
    "augment.colour_noise": (0, 1),
    "device_batch_size": (1, None),
    "bn_images": (2, None),
    "devices": (1, 100_000),
    "max_restarts": (0, 1000),
    "timeout": (1, 10**6),
    "precise_bn": (0, 10**6),
    "images": (2, None),
    "rounds": (1, 1000),
    "seconds": (0, 3600),
    "steps": (2, 10**9),
    "mean": (0, 1),
    "std": (0, 10),
    "data.validation": (0, None),
    "data.size": (8, 1024),
    "data.workers": (0, 256),
    "shorter_side": (8, 4096),
    "quality": (1, 100),
    "shard_images": (1, 100_000),
    "workers": (0, 256),
    "lr": (0, None),
    "warmup": (0, 10**9),
    "drops": (0, 1),
    "anchors": (1, 4096),
    "min_size": (32, 4096),
    "max_size": (32, 8192),
    "proposals": (1, 10_000),
    "regions": (2, 10_000),
    "score": (0, 1),
}
SCHEDULE_KEYS: dict[str, tuple[str, ...]] = {
    "step": ("name", "lr", "factor", "drops"),
    "plateau": ("name", "lr", "factor", "patience", "threshold", "watch"),
    "cosine": ("name", "lr"),
}
COUNTED = ("iterations", "log_every", "eval_every", "checkpoint_every", "keep_every")
ABOVE = {"scale", "lr", "schedule.lr", "warmup.lr", "schedule.factor", "schedule.patience", "seconds", "std"}
BELOW = {"momentum"}


# Words of other tools, and ours for them.
MEANT = {
    "epochs": "iterations",
    "learning_rate": "lr",
    "dataset": "data",
    "model": "arch",
    "gpu": "cuda",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "gpus": "devices",
    "sync_bn": "bn_images",
    "10crop": "tencrop",
    "10-crop": "tencrop",
    "multi-scale": "multiscale",
    "gradient_checkpointing": "activation_checkpointing",
    "pretrained": "init_from",
    "weights": "init_from",
    "frozen_stages": "freeze",
}


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed word most like `word`, or nothing."""
    words = {item.lower(): item for item in allowed}
    word = MEANT.get(word.lower(), word.lower())
    found = [item for item in words if item.rsplit(".", 1)[-1] == word or item == word]
    found = found or difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {words[found[0]]}?" if found else ""


def shown(value: Any) -> str:
    """A value as it is typed, if not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise UserError(f"{key}={shown(value)}: allowed are {', '.join(arguments)}{nearest(str(value), arguments)}")
    if origin in (typing.Union, types.UnionType):
        literals = [option for option in arguments if typing.get_origin(option) is Literal]
        words = [word for option in literals for word in typing.get_args(option)]
        if value in words or (value is None and type(None) in arguments):
            return value
        if words and int in arguments and isinstance(value, str):
            raise UserError(
                f"{key}={shown(value)}: must be a whole number or {' or '.join(words)}{nearest(value, words)}"
            )
        return _convert(key, value, arguments[0])
    if origin is list:
        if not isinstance(value, list):
            example = {int: "[256,480]", float: "[0.5,0.75]", str: "[one,two]"}[arguments[0]]
            raise UserError(f"{key}={shown(value)}: must be a list, such as {example}")
        return [_convert(key, item, arguments[0]) for item in value]
    if dataclasses.is_dataclass(hint):
        return typed(typing.cast(type, hint), value, key + ".")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and number and (isinstance(value, int) or value.is_integer()):
        return _in_range(key, int(value))
    if hint is float and number and abs(value) <= sys.float_info.max:
        return _in_range(key, float(value))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and (isinstance(value, str) or number):
        text = str(value)
        if text.strip() and not re.search("[\0\ud800-\udfff]", text):  # neither NUL nor what was no UTF-8
            return text
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
    raise UserError(f"{key}={shown(value)}: must be {kind}")


def _in_range(key: str, value: float) -> float:
    low, high = RANGES.get(key, (None, None))
    text = f"{value:g}" if isinstance(value, float) else shown(value)
    if low is not None and (value < low or (value == low and key in ABOVE)):
        raise UserError(f"{key}={text}: must be {'above' if key in ABOVE else 'at least'} {low}")
    if high is not None and (value > high or (value == high and key in BELOW)):
        raise UserError(f"{key}={text}: must be {'below' if key in BELOW else 'at most'} {high}")
    return value


T = TypeVar("T")


def typed(kind: type[T], values: Any, prefix: str = "") -> T:
    """The dataclass `kind` from nested plain `values`; unknown, missing and mistyped keys are refused by name."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix[:-1]}={shown(values)}: holds values of its own; set one, as in {prefix}KEY=VALUE")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: there is no such key{nearest(str(name), fields)}")
    found = {}
    for name, field in fields.items():
        if name in values:
            found[name] = _convert(prefix + name, values[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: is missing")
    return kind(**found)


def check(values: Mapping[str, Any], asked: Collection[str] = (), *, needs_data: bool = True) -> Config:
    """The checked configuration of a training run from plain, resolved `values`.

    `asked` are the keys that the user named: a shortcut for a plain net is refused only if asked for.
    `needs_data`: data.root= must be there where the data set has no other place.
    Looks at the command line and at directory listings only. Raises UserError.
    """
    config = typed(Config, {key: value for key, value in values.items() if key != "scale"})
    config = scaled(config, values.get("scale", 1))
    check_paths({"data.root": config.data.root, "run_dir": config.run_dir, "resume": config.resume})
    check_paths({"init_from": config.init_from})
    kind = config.schedule.name
    for key in sorted(values["schedule"].keys() ^ set(SCHEDULE_KEYS[kind])):
        own = ", ".join(SCHEDULE_KEYS[kind])
        raise UserError(f"schedule.{key}: schedule={kind} has {own}; choose another kind with schedule=")
    check_family(config.data)
    check_depth(config.depth, config.data.family)
    for key in UNREAD[config.data.family]:
        if key in asked:
            raise UserError(f"{key}: means nothing to {config.data.family} data; drop it")
    if config.devices != "auto":
        share(config, config.devices)
    if config.precision == "fp16" and config.device == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU take bf16 or fp32")
    if config.arch == "plain" and config.zero_gamma:
        raise UserError("zero_gamma=true: a plain net would give nothing but zeros; it is for arch=resnet")
    if config.arch == "plain":
        if "shortcut" in asked and config.shortcut != "none":
            raise UserError(f"shortcut={config.shortcut}: a plain net has no shortcuts; drop it, or take arch=resnet")
        config = dataclasses.replace(config, shortcut="none")
    elif config.shortcut == "none":
        raise UserError("shortcut=none: a residual net needs A, B or C; without shortcuts it is arch=plain")
    if config.data.name == "cifar10" and config.data.size != 32:
        raise UserError(f"data.size={config.data.size}: CIFAR-10 is 32 px; for other sizes take data=imagefolder")
    if config.data.family == "imagenet" and config.data.size % 32:
        raise UserError(
            f"data.size={config.data.size}: ImageNet nets halve the image five times; must be a multiple of 32,"
            f" such as {max(32, round(config.data.size / 32) * 32)}"
        )
    if config.data.family == "imagenet":
        check_crops(config.augment, config.data.size)
    if config.schedule.drops != sorted(set(config.schedule.drops)):
        raise UserError(f"schedule.drops={config.schedule.drops}: must rise, as [0.5,0.75] does")
    if config.schedule.watch == "val" and not config.data.validation:
        raise UserError("schedule.watch=val: needs a held-out part of the training set; add data.validation=5000")
    if config.freeze is not None:
        last = "layer3" if config.data.family == "cifar" else "layer4"
        if config.freeze > last:
            raise UserError(f"freeze={config.freeze}: the last stage of {config.data.family} nets is {last}")
        if config.init_from is None:
            raise UserError(f"freeze={config.freeze}: would keep random weights; add init_from=, or drop it")
    if config.nesterov and not config.momentum:
        raise UserError("nesterov=true: needs momentum above 0; take momentum=0.9")
    if needs_data or config.data.root is not None:
        check_source(config.data.name, config.data.root)
    check_held_out(config.data)
    source = None if config.init_from is None else str(expand(config.init_from).absolute())
    return dataclasses.replace(config, data=_anchored(config.data), init_from=source)


def scaled(config: Config, scale: Any) -> Config:
    """`config` with all that counts iterations multiplied by `scale`. Raises UserError."""
    factor = _convert("scale", scale, float)
    counts = {key: getattr(config, key) for key in COUNTED}
    return dataclasses.replace(config, **{key: max(1, round(n * factor)) for key, n in counts.items() if n})


@dataclass(frozen=True)
class Share:
    """How one batch is dealt: `images` per device and forward pass, `passes` per step, batch norm over `group`."""

    images: int
    passes: int
    group: int


def share(config: Config, devices: int) -> Share:
    """The share of each of `devices` in a batch. Raises UserError for what does not divide, naming the nearest."""
    each, rest = divmod(config.batch_size, devices)
    if rest or not each:
        near = max(1, round(config.batch_size / devices)) * devices
        raise UserError(f"batch_size={config.batch_size}: does not divide by {devices} devices; nearest: {near}")
    images = min(config.device_batch_size or each, each)
    if each % images:
        near = _nearest_divisor(each, images)
        raise UserError(f"device_batch_size={images}: does not divide the {each} images of a device; nearest: {near}")
    passes = each // images
    if config.bn_images == "device":
        return Share(images, passes, images)
    if config.bn_images == "all":
        if config.activation_checkpointing:
            raise UserError(
                "bn_images=all: would count twice what activation_checkpointing computes again; take a number"
            )
        if passes > 1:
            raise UserError("bn_images=all: a batch taken in parts has no common statistics; drop device_batch_size=")
        if config.compile:
            raise UserError("bn_images=all: PyTorch does not compile its synchronised batch norm; add compile=false")
        return Share(images, passes, config.batch_size)
    if config.bn_images > images or images % config.bn_images:
        near = _nearest_divisor(images, config.bn_images)
        raise UserError(
            f"bn_images={config.bn_images}: does not divide the {images} images that a device takes at once;"
            f" nearest: {near}"
        )
    return Share(images, passes, config.bn_images)


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Refuse what the file system cannot even look for: a name too long, the home of nobody, a closed folder."""
    for key, text in paths.items():
        try:
            Path(text or ".").expanduser().exists()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{key}={shown(text)}: {getattr(error, 'strerror', None) or error}") from error


# What earlier versions did where there was no such key yet.
EARLIER = {"data.broken": "stop", "normalise": "channels", "augment.area": None, "augment.colour_jitter": 0.0}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that an earlier version stored, with what it did where it had no key."""
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in EARLIER.items():
        group, _, name = key.rpartition(".")
        place = found.get(group) if group else found
        if isinstance(place, dict):
            place.setdefault(name, value)
    return found


def restored(values: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint or a run directory holds. Raises UserError if it is of another version."""
    try:
        return typed(Config, completed(values))
    except UserError as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def check_eval(values: Mapping[str, Any]) -> EvalConfig:
    """The checked configuration of an evaluation. Raises UserError."""
    config = typed(EvalConfig, {**values, "checkpoint": as_list(values["checkpoint"])})
    check_paths({"data.root": config.data.root, "out": config.out})
    check_checkpoints(config.checkpoint)
    _check_other_data(config.data)
    check_out(config.out)
    return dataclasses.replace(config, data=_anchored(config.data))


def _check_other_data(data: EvalData) -> None:
    """Refuse other data than the checkpoint's own that a look at the folder shows to be wrong. Raises UserError."""
    if data.name != "same":
        check_source(data.name, data.root)
    elif data.root is not None and not expand(data.root).exists():
        raise UserError(f"data.root={data.root}: there is no such file or folder")


def as_list(value: Any) -> Any:
    """Of a key that takes one or several, a list in either case."""
    return value if isinstance(value, list) else [value]


def check_checkpoints(names: list[str]) -> None:
    """Refuse what is no checkpoint at a first look. Raises UserError."""
    if not names:
        raise UserError("checkpoint=[]: name at least one")
    for number, name in enumerate(names):
        check_paths({"checkpoint": name})
        if expand(name).is_dir():
            raise UserError(f"checkpoint={name}: is a folder; name a file in it, such as checkpoints/last.pt")
        if not expand(name).is_file():
            raise UserError(f"checkpoint={name}: there is no such file; a run keeps its in RUN/checkpoints/")
        if not zipfile.is_zipfile(expand(name)):
            raise UserError(f"checkpoint={name}: is cut short or not a checkpoint")
        if name in names[:number]:
            raise UserError(f"checkpoint={name}: is named twice")


def check_report(values: Mapping[str, Any]) -> ReportConfig:
    """The checked configuration of a report. Raises UserError."""
    config = typed(ReportConfig, {**values, "runs": as_list(values["runs"])})
    if config.report == "complexity" and config.runs:
        raise UserError(f"resnet-report complexity: is about nets, not about runs; drop {config.runs[0]}")
    if config.report == "runs" and not config.runs:
        raise UserError("name the runs, or folders of runs, as in resnet-report runs out=report")
    for name in config.runs:
        check_paths({"runs": name})
        if not expand(name).is_dir():
            raise UserError(f"{name}: there is no such folder")
    check_folder(config.out)
    return config


def check_responses(values: Mapping[str, Any]) -> ResponsesConfig:
    """The checked configuration of a measurement of layer responses. Raises UserError."""
    config = typed(ResponsesConfig, {**values, "checkpoint": as_list(values["checkpoint"])})
    check_checkpoints(config.checkpoint)
    check_paths({"data.root": config.data.root})
    _check_other_data(config.data)
    check_folder(config.out)
    return dataclasses.replace(config, data=_anchored(config.data))


def check_folder(out: str) -> None:
    """Refuse a folder for results that is none or cannot be written. Raises UserError."""
    check_paths({"out": out})
    if (expand(out).exists() and not expand(out).is_dir()) or not writable(expand(out) / "file"):
        raise UserError(f"out={out}: is not a folder that you may write to")


def check_pack(values: Mapping[str, Any]) -> PackConfig:
    """The checked configuration of a packing, or of the check of a packed folder. Raises UserError."""
    config = typed(PackConfig, values)
    check_paths({"data.root": config.data.root, "out": config.out, "check": config.check})
    if config.check is not None:
        for key, value in (("data.root", config.data.root), ("out", config.out)):
            if value is not None:
                raise UserError(f"{key}={value}: means nothing to check=; drop it")
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
        raise UserError(f"out={config.out}: lies in the tree itself; take another folder")
    if not writable(out / PACKED):
        raise UserError(f"out={config.out}: is not a folder that you may write to")
    return dataclasses.replace(config, data=_anchored(config.data))


def check_weights(values: Mapping[str, Any], asked: Collection[str] = ()) -> WeightsConfig:
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
    config = typed(WeightsConfig, values)
    check_paths({"file": config.file, "out": config.out, "classes": config.classes, "data.root": config.data.root})
    if config.format not in FORMATS[word]:
        allowed = ", ".join(FORMATS[word])
        raise UserError(f"format={config.format}: resnet-weights {word} has {allowed}")
    for key in asked:
        if word == "export" and key.split(".")[0] in READ_BY_IMPORT:
            raise UserError(f"{key}: means nothing to resnet-weights export; drop it")
    for key, value in (("mean", config.mean), ("std", config.std)):
        if value is not None and len(value) != 3:
            raise UserError(f"{key}={value}: must be three numbers, of red, green and blue, as [0.5,0.5,0.5]")
    check_file("file", config.file)
    if config.classes is not None:
        check_file("classes", config.classes)
    if config.data.root is not None:
        check_source("imagenet" if config.data.name == "auto" else config.data.name, config.data.root)
    if word == "export":
        if config.format == "auto":
            suffix = expand(config.out).suffix
            if suffix not in SUFFIXES:
                raise UserError(f"out={config.out}: ends in none of {' '.join(SUFFIXES)}; say format=")
            config = dataclasses.replace(config, format=SUFFIXES[suffix])  # type: ignore[arg-type]
        check_checkpoints([config.file])
    elif expand(config.out).suffix not in (".pt", ".pth"):
        raise UserError(f"out={config.out}: a checkpoint of resnet-train ends in .pt")
    if expand(config.out).absolute() == expand(config.file).absolute():
        raise UserError(f"out={config.out}: is the file itself; take another name")
    check_out(config.out)
    return dataclasses.replace(config, data=_anchored(config.data))


def check_classify(values: Mapping[str, Any], images: Collection[str]) -> ClassifyConfig:
    """The checked configuration of a classification of `images`. Raises UserError."""
    config = typed(ClassifyConfig, values)
    check_paths({"out": config.out})
    check_checkpoints([config.checkpoint])
    check_out(config.out)
    if not images:
        raise UserError("name the images, as in resnet-classify cat.jpg dog.png checkpoint=…")
    for image in images:
        check_paths({image: image})
        if expand(image).is_dir():
            raise UserError(f"{image}: is a folder; name the images in it, as in {image.rstrip('/')}/*.jpg")
        if not expand(image).is_file():
            raise UserError(f"{image}: there is no such file")
    return config


def check_file(key: str, name: str) -> None:
    """Refuse what is no file. Raises UserError."""
    if not expand(name).is_file():
        raise UserError(f"{key}={name}: {'is a folder' if expand(name).is_dir() else 'there is no such file'}")


def check_bench(values: Mapping[str, Any], asked: Collection[str] = ()) -> tuple[BenchConfig, Config]:
    """The checked configuration of a benchmark: its own, and that of the training it measures. Raises UserError."""
    own = {field.name for field in dataclasses.fields(BenchConfig)}
    names = typing.get_args(typing.get_type_hints(BenchConfig)["bench"])
    if values["bench"] is None:
        raise UserError(f"name what to measure: {', '.join(names)}; as in resnet-bench {names[1]}")
    bench = typed(BenchConfig, {key: value for key, value in values.items() if key in own})
    check_paths({"out": bench.out})
    check_out(bench.out)
    for key in UNREAD_BY_BENCH:
        if key in asked:
            raise UserError(f"{key}: means nothing to resnet-bench; drop it")
    if values["devices"] != 1:
        raise UserError(f"devices={shown(values['devices'])}: resnet-bench measures one; drop it")
    training = {key: value for key, value in values.items() if key not in own}
    config = check(training | FIXED_BY_BENCH, asked, needs_data=False)
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
            f"data={config.data.name}: resnet-bench {bench.bench} measures sets in memory; take data=cifar10"
        )
    return bench, config


def check_out(out: str | None) -> None:
    """Refuse a file for results that cannot be written. Raises UserError."""
    if out is not None and (expand(out).is_dir() or not writable(expand(out))):
        raise UserError(f"out={out}: is not a file that you may write")


def _anchored(data: Any) -> Any:
    """`data` with an absolute root, so that the record of a run holds from any folder."""
    if data.root is None or is_remote(data.root):
        return data
    return dataclasses.replace(data, root=str(expand(data.root).absolute()))


def check_crops(augment: Augment, size: int) -> None:
    """Refuse ways to cut training images of `size` from photographs that cannot be gone. Raises UserError."""
    sides, area = augment.shorter_side, augment.area
    if (sides is None) == (area is None):
        raise UserError(
            f"augment.shorter_side={shown(sides)}: and augment.area={shown(area)} are two ways to cut; give one, and"
            " null for the other"
        )
    if sides is not None and (len(sides) != 2 or sides[0] > sides[1] or sides[0] < size):
        raise UserError(f"augment.shorter_side={sides}: must be [LOW,HIGH], LOW at least data.size={size}")
    if area is not None and (len(area) != 2 or not 0 < area[0] <= area[1]):
        raise UserError(f"augment.area={area}: must be [LOW,HIGH], parts of the image such as [0.08,1]")


def check_depth(depth: int, family: str) -> None:
    """Refuse a depth that the family does not have, naming the nearest (CIFAR: section 4.2; ImageNet: table 1)."""
    if family == "cifar":
        if depth < 8 or (depth - 2) % 6:
            below = max(8, (depth - 2) // 6 * 6 + 2)
            near = min(below, below + 6, key=lambda d: abs(d - depth))
            raise UserError(f"depth={depth}: CIFAR nets have 6n+2 layers (20, 32, 44, 56, 110, 1202); nearest: {near}")
    elif depth not in IMAGENET_DEPTHS:
        near = min(IMAGENET_DEPTHS, key=lambda d: abs(d - depth))
        allowed = ", ".join(map(str, IMAGENET_DEPTHS))
        raise UserError(f"depth={depth}: ImageNet nets have {allowed} layers; nearest: {near}")


def is_official_cifar10(root: Path) -> bool:
    """Whether `root` is the official archive (a file), or the folder that it unpacks to or that one's parent."""
    return root.is_file() or any((folder / "data_batch_1").is_file() for folder in (root, root / CIFAR_FOLDER))


def check_source(name: str, given: str | None) -> None:
    """Refuse a data.root that a directory listing shows to be wrong for the data set. Raises UserError."""
    if given is None:
        if name in ("cifar10", "digits"):
            return
        raise UserError(f"data.root: data={name} needs one: data.root=PATH, a folder with train/ and test/ or val/")
    root = expand(given)
    if name == "digits":
        raise UserError(f"data.root={given}: data=digits comes with scikit-learn and takes none; drop it")
    if "://" in given or is_remote(given):
        if name != "imagenet" or not is_remote(given):
            raise UserError(f"data.root={given}: data=imagenet reads packed folders from {' '.join(REMOTE)}")
        return
    if not root.exists():
        raise UserError(f"data.root={given}: there is no such file or folder")
    if name == "cifar10" and is_official_cifar10(root):
        return
    if not root.is_dir():
        raise UserError(f"data.root={given}: is a file; data={name} takes a folder with train/ and test/ or val/")
    if name == "imagenet" and is_packed(given):
        return
    class_folders(root)


def is_remote(root: str) -> bool:
    """Whether `root` is a place on object storage, where packed folders may lie."""
    return root.startswith(REMOTE)


def is_packed(root: str) -> bool:
    """Whether `root` is a packed folder, or may be one that is elsewhere."""
    return is_remote(root) or (expand(root) / PACKED).is_file()


def _is_official(data: Data) -> bool:
    return data.name == "cifar10" and (data.root is None or is_official_cifar10(expand(data.root)))


def check_family(data: Data) -> None:
    """Refuse a family that the data set cannot have. Raises UserError."""
    if data.family == "imagenet" and (_is_official(data) or data.name == "digits"):
        raise UserError(f"data.family=imagenet: is for folders of photographs, not for data={data.name}")


def check_held_out(data: Data) -> None:
    """Refuse a held-out part that the data set cannot have. Raises UserError."""
    if data.validation and data.family == "cifar":  # photographs are counted when they are listed
        known = 50_000 if _is_official(data) else 1_437 if data.name == "digits" else None
        images = known or _count(expand(data.root or "") / "train")
        if data.validation >= images:
            raise UserError(f"data.validation={data.validation}: the training set has {images} images; hold out fewer")


def _count(folder: Path) -> int:
    """The image files below folder/<class>/."""
    return sum(is_image(file.name) for entry in os.scandir(folder) if entry.is_dir() for file in os.scandir(entry))


def class_folders(root: Path) -> tuple[list[str], str]:
    """The class names of a train/<class>/*, test/<class>/* tree and the name of its test part (test or val).

    Raises UserError where the two parts do not have the same classes or a class has no images.
    """
    try:
        if (root / PACKED).is_file():
            raise UserError(f"data.root={root}: is a packed folder, which data=imagenet reads")
        if (root / PACKING).is_dir():
            raise UserError(f"data.root={root}: is not packed to the end; the same resnet-pack command goes on with it")
        # ImageNet's own test/ is flat, without classes: there val/ is the test part.
        test = next((name for name in ("test", "val") if any(path.is_dir() for path in root.glob(f"{name}/*"))), None)
        test = test or next((name for name in ("test", "val") if (root / name).is_dir()), None)
        if not any(root.iterdir()):
            raise UserError(f"data.root={root}: the folder is empty")
        if test is None or not (root / "train").is_dir():
            raise UserError(f"data.root={root}: has no train/ and test/ (or val/) folders with a folder for each class")
        classes = {}
        for part in ("train", test):
            classes[part] = sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir())
            if not classes[part]:
                raise UserError(f"data.root={root}: {part}/ has no folder for any class")
            for name in classes[part]:
                with os.scandir(root / part / name) as entries:
                    found = any(is_image(entry.name) for entry in entries)
                if not found:
                    raise UserError(f"data.root={root}: {part}/{name}/ has no images ({' '.join(IMAGE_SUFFIXES)})")
    except OSError as error:
        raise UserError(f"data.root={root}: {error.strerror}: {error.filename}") from error
    for here, there in (("train", test), (test, "train")):
        for name in classes[here]:
            if name not in classes[there]:
                raise UserError(f"data.root={root}: class {name} is in {here}/ and not in {there}/")
    if len(classes["train"]) < 2:
        raise UserError(f"data.root={root}: has one class, {classes['train'][0]}; at least two are needed")
    return classes["train"], test


def is_image(name: str) -> bool:
    """Whether a file name looks like an image's."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def run_directory(config: Config, asked: Iterable[str], scale: float = 1) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA/NET/ and the values of the other keys that were `asked` for.

    An experiment's runs lie where the same runs lie without it, so that experiments share them.
    """
    if config.run_dir is not None:
        return expand(config.run_dir)
    told = {"data", "depth", "arch", "shortcut", "seed"} | FREE_KEYS
    values = flat(config.plain()) | {"schedule": config.schedule.name} | ({"scale": scale} if scale != 1 else {})
    return (
        Path("runs")
        / (plain_word(config.data_label) or "images")
        / config.net
        / run_name(values, set(asked) - told, config.seed)
    )


def run_name(values: Mapping[str, Any], asked: Iterable[str], seed: int) -> str:
    """The name of a run's folder: the flat `values` of the keys that were `asked` for, then the seed."""
    rest: dict[str, Any] = {}
    for word in asked:
        named = [word] if word in values else [key for key in values if key.startswith(word + ".")]
        rest |= {key: values[key] for key in named}
    words = [plain_word(f"{key}={json.dumps(rest[key])}") for key in sorted(rest)]
    name = "+".join([*words, f"seed-{seed}"])
    return name if len(name) <= 180 else name[:160] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]


def plain_word(text: str) -> str:
    """`text` with only such characters as need no quotes on a later command line, as in checkpoint=runs/…"""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values as one level, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with the run in `where` under a configuration that changes its mathematics."""
    now = flat(new)
    was = {key: value for key, value in flat(completed(old)).items() if key in now or key not in EARLIER}
    for key in sorted(was.keys() | now.keys()):
        if key not in FREE_KEYS and was.get(key) != now.get(key):
            raise UserError(
                f"{key}={shown(now.get(key))}: the run in {where} has {key}={shown(was.get(key))};"
                f" take that, or another run_dir="
            )


def run_state(directory: Path) -> Literal["new", "unfinished", "finished"]:
    """What a run directory holds."""
    if (directory / "summary.json").is_file():
        return "finished"
    return "unfinished" if (directory / "config.json").is_file() else "new"


def writable(file: Path) -> bool:
    """Whether a file could be made or written there, with the folders that are missing."""
    parent = nearest_existing(file.parent)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


class RunConfig(Protocol):
    """What training and detection say alike of a run."""

    @property
    def resume(self) -> str:
        """Whether to go on."""

    @property
    def init_from(self) -> str | None:
        """The weights that it begins with."""

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values."""


def check_run_dir(directory: Path, config: RunConfig, *, may_be_finished: bool = False) -> None:
    """Refuse a directory that cannot take this run: finished, not a run's, of another run, not writable."""
    state = run_state(directory)
    try:
        if state == "finished" and not may_be_finished:
            raise UserError(
                f"run_dir={directory}: holds a finished run; read its summary.json, or take another seed= or run_dir="
            )
        if state == "finished" or (state == "unfinished" and config.resume != "never"):
            check_same_run(json.loads((directory / "config.json").read_text()), config.plain(), str(directory))
        if state == "new" and directory.exists() and any(path.suffix != ".part" for path in directory.iterdir()):
            raise UserError(f"run_dir={directory}: exists and holds no run; take another run_dir=")
        parent = nearest_existing(directory)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: JSON that is no dictionary
        raise UserError(f"run_dir={directory}: cannot be used: {error}") from error
    if not writable(directory / "config.json"):
        raise UserError(f"run_dir={directory}: {parent} is not a folder that you may write to; take another run_dir=")
    if config.init_from is not None and (config.resume == "never" or (config.resume == "auto" and state == "new")):
        check_file("init_from", config.init_from)  # a run that goes on has its weights
    if config.resume not in ("auto", "never") and not expand(config.resume).is_file():
        hint = nearest(config.resume, ["auto", "never"])
        raise UserError(f"resume={config.resume}: must be auto, never or a checkpoint's file{hint}")

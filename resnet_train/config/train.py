"""The configuration of `resnet-train`: typed dataclasses and their checks; no torch, so that errors come at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from resnet_train.config import keys
from resnet_train.config.augment import Augment
from resnet_train.config.data import Data, check_family, check_held_out, training_images
from resnet_train.config.keys import Alias, Counted, Free, OnlyFor, Range, StoredAs, Unnamed
from resnet_train.config.layout import OFFICIAL, check_source, name_data
from resnet_train.config.paths import anchored, check_paths
from resnet_train.config.schema import coerce, format_value, from_dict, marked, types_of, unread_keys
from resnet_train.errors import UserError
from resnet_train.files import expand, unlinked

NAMES = {"cifar": "cifar10"}  # a data set of a family that has another name
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
DEEPEST_CIFAR = 1202  # the paper's; without a limit one number could demand any amount of memory


@dataclass(frozen=True)
class Schedule:
    """The learning rate over iterations: configs/schedule/. Each kind has only the keys of its own file."""

    name: Literal["step", "plateau", "cosine"]
    lr: keys.LearningRate
    factor: Annotated[float, Range(0, 1, above=True), OnlyFor("step", "plateau")] = 1.0
    drops: Annotated[keys.Drops, OnlyFor("step")] = dataclasses.field(default_factory=list)
    patience: Annotated[float, Range(0, 1, above=True), OnlyFor("plateau")] = 1.0
    threshold: Annotated[float, Range(0, 100), OnlyFor("plateau")] = 0.0
    watch: Annotated[Literal["train", "val"], OnlyFor("plateau")] = "train"


@dataclass(frozen=True)
class Warmup:
    """Nets of at least `depth` layers start at `lr` for at least `iterations`, until the error is below `error` %."""

    depth: Annotated[int, Range(0)]
    lr: keys.LearningRate
    error: Annotated[float, Range(0, 100)]
    iterations: Annotated[int, Range(0, 10**9)]


@dataclass(frozen=True)
class Config:
    """The configuration of `resnet-train`: configs/train.yaml, the recipe, the schedule and the data set."""

    data: Annotated[Data, Alias("dataset")]
    schedule: Schedule
    depth: keys.Depth
    arch: Annotated[Literal["resnet", "plain"], Alias("model")]
    seed: keys.Seed
    devices: keys.Devices
    max_restarts: keys.MaxRestarts
    timeout: keys.Timeout
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"]
    device: keys.Device
    checkpoint_every: keys.CheckpointEvery
    keep_every: keys.KeepEvery
    run_dir: keys.RunDir
    resume: Annotated[str, Free(), StoredAs("auto")]
    recipe: str
    shortcut: Literal["A", "B", "C", "none"]
    bottleneck_stride: Annotated[Literal["1x1", "3x3"], OnlyFor("imagenet")]
    init: Literal["fan_out", "fan_in"]
    zero_gamma: bool
    iterations: keys.Iterations
    batch_size: keys.BatchSize
    device_batch_size: Annotated[int | None, Range(1), Free()]
    bn_images: Annotated[int | Literal["device", "all"], Range(2), Alias("sync_bn")]
    activation_checkpointing: Annotated[bool, Free(), Alias("gradient_checkpointing")]
    eval_batch_size: Annotated[int | Literal["auto"], Range(1, keys.LARGEST_BATCH)]
    momentum: keys.Momentum
    nesterov: bool
    weight_decay: keys.WeightDecay
    decay: Literal["all", "weights"]
    warmup: Warmup
    normalise: Annotated[Literal["image", "channels", "standard"], OnlyFor("imagenet")]
    augment: Augment
    compile: Annotated[bool | Literal["auto"], Unnamed()]
    log_every: keys.LoggingInterval
    eval_every: keys.LoggingInterval
    init_from: keys.InitFrom
    freeze: Annotated[Literal["conv1", "layer1", "layer2", "layer3", "layer4"] | None, Alias("frozen_stages")]

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values, for JSON and checkpoints."""
        return dataclasses.asdict(self)

    @property
    def net(self) -> str:
        """The network's name: resnet-110-A, plain-56."""
        return f"{self.arch}-{self.depth}" + ("" if self.arch == "plain" else f"-{self.shortcut}")

    @property
    def data_label(self) -> str:
        """The label of the data before the images are read; opened data have their own, which recognises CIFAR-10."""
        return name_data(self.data.name, self.data.root)


def check_train(values: Mapping[str, Any], requested: Collection[str] = (), *, needs_data: bool = True) -> Config:
    """The checked configuration of a training run from plain, resolved `values`.

    `requested` are the keys on the command line: a shortcut for a plain net is refused only if it is among them.
    With `needs_data`, data.root= is required for data sets without a default place. Nothing but directory listings is
    read. Raises UserError.
    """
    config = from_dict(Config, {key: value for key, value in values.items() if key != "scale"})
    config = scaled(config, values.get("scale", 1))
    check_paths({"data.root": config.data.root, "run_dir": config.run_dir, "resume": config.resume})
    check_paths({"init_from": config.init_from})
    check_family(config.data)
    check_depth(config.depth, config.data.family)
    _check_used(config, values, requested)
    if config.devices != "auto":
        split_batch(config, config.devices)
    if config.precision == "fp16" and config.device == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU use bf16 or fp32")
    config = _check_shortcut(config, requested)
    if config.data.name in OFFICIAL and config.data.size != 32:
        raise UserError(f"data.size={config.data.size}: CIFAR is 32 px; for other sizes use data=imagefolder")
    if config.data.family == "imagenet" and config.data.size % 32:
        raise UserError(
            f"data.size={config.data.size}: ImageNet nets halve the image five times; must be a multiple of 32,"
            f" such as {max(32, round(config.data.size / 32) * 32)}"
        )
    if config.data.family == "imagenet":
        _check_crops(config.augment, config.data.size)
    if config.schedule.drops != sorted(set(config.schedule.drops)):
        raise UserError(f"schedule.drops={config.schedule.drops}: must rise, as [0.5,0.75] does")
    if config.schedule.watch == "val" and not config.data.validation:
        images = training_images(config.data)
        count = "IMAGES" if images is None else max(1, images // 10)
        raise UserError(f"schedule.watch=val: needs a held-out part of the training set; add data.validation={count}")
    _check_freeze(config)
    if config.nesterov and not config.momentum:
        raise UserError("nesterov=true: needs momentum above 0; use momentum=0.9")
    if needs_data or config.data.root is not None:
        check_source(config.data.name, config.data.root)
    check_held_out(config.data)
    source = None if config.init_from is None else unlinked(expand(config.init_from))
    return dataclasses.replace(config, data=anchored(config.data), init_from=source)


def _check_used(config: Config, values: Mapping[str, Any], requested: Collection[str]) -> None:
    """Raises UserError for keys, named or set by a named recipe, that this data set or schedule does not use."""
    kind = config.schedule.name
    folder = {"imagefolder"} & {config.data.name}  # of any family
    unread = unread_keys(Config, kind, config.data.family, *folder)
    own = [key for key in types_of(Schedule) if f"schedule.{key}" not in unread]
    for key in sorted(values["schedule"].keys() ^ set(own)):
        raise UserError(f"schedule.{key}: schedule={kind} has {', '.join(own)}; choose another kind with schedule=")
    here, augment = f"data={config.data.name} (data.family={config.data.family})", values["augment"]
    for key in unread:
        if key in requested:
            kinds = sorted(marked(OnlyFor, Config)[key].readers)
            readers = " or ".join(f"data={NAMES.get(one, one)}" for one in kinds)
            raise UserError(f"{key}: is for {readers}; {here} does not use it; remove it")
        if "recipe" in requested and (value := augment.get(key.removeprefix("augment."))):
            sets = f"sets {key}={format_value(value)}, which {here} does not use"
            raise UserError(f"recipe={config.recipe}: {sets}; take another recipe, or name the keys that you mean")


def _check_shortcut(config: Config, requested: Collection[str]) -> Config:
    """The configuration, with shortcut=none for a plain net. Raises UserError for what such a net cannot have."""
    if config.arch == "plain" and config.zero_gamma:
        raise UserError("zero_gamma=true: a plain net would give nothing but zeros; it is for arch=resnet")
    if config.arch == "plain":
        if "shortcut" in requested and config.shortcut != "none":
            raise UserError(f"shortcut={config.shortcut}: a plain net has no shortcuts; remove it, or use arch=resnet")
        return dataclasses.replace(config, shortcut="none")
    if config.shortcut == "none":
        raise UserError("shortcut=none: a residual net needs A, B or C; without shortcuts it is arch=plain")
    return config


def _check_freeze(config: Config) -> None:
    """Raises UserError for stages that the net does not have, or that would keep random weights."""
    if config.freeze is None:
        return
    last = "layer3" if config.data.family == "cifar" else "layer4"
    if config.freeze > last:
        raise UserError(f"freeze={config.freeze}: the last stage of {config.data.family} nets is {last}")
    if config.init_from is None:
        raise UserError(f"freeze={config.freeze}: would keep random weights; add init_from=, or remove it")


def scaled(config: Config, scale: Any) -> Config:
    """`config` with all numbers of iterations multiplied by `scale`. Raises UserError."""
    factor = coerce("scale", scale, Annotated[float, Range(0, 1, above=True)])
    counts = {key: getattr(config, key) for key in marked(Counted, Config)}
    return dataclasses.replace(config, **{key: max(1, round(n * factor)) for key, n in counts.items() if n})


@dataclass(frozen=True)
class BatchSplit:
    """The division of a batch: `images` per device and forward pass, `passes` per step, batch norm over `group`."""

    images: int
    passes: int
    group: int


def split_batch(config: Config, devices: int) -> BatchSplit:
    """The share of each of `devices` in a batch. Raises UserError, which names the nearest value that divides."""
    check_divisible(config.batch_size, devices)
    each = config.batch_size // devices
    images = min(config.device_batch_size or each, each)
    if each % images:
        near = _nearest_divisor(each, images, config.bn_images if isinstance(config.bn_images, int) else 1)
        raise UserError(f"device_batch_size={images}: does not divide the {each} images of a device; nearest: {near}")
    passes = each // images
    # Five halvings leave maps of one pixel: with one image each channel has a single value, and no variance.
    if images == 1 and config.data.family == "imagenet" and config.data.size == 32 and config.bn_images != "all":
        key = "device_batch_size" if each > 1 else "batch_size"
        raise UserError(
            f"{key}={getattr(config, key)}: batch norm needs two images at a time on a device where data.size=32 leaves"
            f" maps of 1x1; nearest: {2 if each > 1 else 2 * devices}"
        )
    if config.bn_images == "device":
        return BatchSplit(images, passes, images)
    if config.bn_images == "all":
        if config.activation_checkpointing:
            raise UserError(
                "bn_images=all: activation_checkpointing would count recomputed statistics twice; use a number"
            )
        if passes > 1:
            raise UserError("bn_images=all: a batch taken in parts has no common statistics; remove device_batch_size=")
        if config.compile is True:
            raise UserError("bn_images=all: PyTorch does not compile its synchronised batch norm; add compile=false")
        return BatchSplit(images, passes, config.batch_size)
    if config.bn_images > images or images % config.bn_images:
        fits = _nearest_divisor(images, config.bn_images, at_least=2) if images > 1 else "device"
        raise UserError(
            f"bn_images={config.bn_images}: does not divide the {images} images that a device takes at once;"
            f" nearest: {fits}"
        )
    return BatchSplit(images, passes, config.bn_images)


def check_divisible(batch_size: int, devices: int) -> None:
    """Raises UserError, which names the nearest allowed one, for a batch size not divisible by `devices`."""
    if batch_size % devices or batch_size < devices:
        near = min(max(1, round(batch_size / devices)), keys.LARGEST_BATCH // devices) * devices
        raise UserError(f"batch_size={batch_size}: does not divide by {devices} devices; nearest: {near}")


def _nearest_divisor(number: int, near: int, of: int = 1, at_least: int = 1) -> int:
    """The divisor of `number` nearest to `near`, if possible a multiple of `of`."""
    divisors = [d for d in range(at_least, number + 1) if number % d == 0]
    return min([d for d in divisors if d % of == 0] or divisors, key=lambda d: abs(d - near))


def config_from_checkpoint(values: Mapping[str, Any]) -> Config:
    """The configuration in a checkpoint or run directory. Raises UserError if it is of another version."""
    try:
        config = from_dict(Config, values)
        check_depth(config.depth, config.data.family)
        return config
    except UserError as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def _check_crops(augment: Augment, size: int) -> None:
    """Raises UserError for contradictory or impossible ways to crop training images of `size`."""
    sides, area = augment.shorter_side, augment.area
    if (sides is None) == (area is None):
        raise UserError(
            f"augment.shorter_side={format_value(sides)}: and augment.area={format_value(area)} are two ways to cut;"
            " give one, and null for the other"
        )
    if sides is not None and (len(sides) != 2 or sides[0] > sides[1] or sides[0] < size):
        raise UserError(f"augment.shorter_side={sides}: must be [LOW,HIGH], LOW at least data.size={size}")
    if area is not None and (len(area) != 2 or not 0 < area[0] <= area[1]):
        raise UserError(f"augment.area={area}: must be [LOW,HIGH], parts of the image such as [0.08,1]")


def check_depth(depth: int, family: str) -> None:
    """Raises UserError, naming the nearest, for a depth not in the family (CIFAR: section 4.2; ImageNet: table 1)."""
    if family == "cifar":
        if not 8 <= depth <= DEEPEST_CIFAR or (depth - 2) % 6:
            near = min(max(8, (depth + 1) // 6 * 6 + 2), DEEPEST_CIFAR)
            raise UserError(
                f"depth={depth}: CIFAR nets have 6n+2 layers, {DEEPEST_CIFAR} at most (20, 32, 44, 56, 110, 1202);"
                f" nearest: {near}"
            )
    elif depth not in IMAGENET_DEPTHS:
        near = min(IMAGENET_DEPTHS, key=lambda d: abs(d - depth))
        allowed = ", ".join(map(str, IMAGENET_DEPTHS))
        raise UserError(f"depth={depth}: ImageNet nets have {allowed} layers; nearest: {near}")

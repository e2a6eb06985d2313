"""Reading weights from files of any program."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train import __version__
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import LARGEST_TEXT, read_regular
from resnet_train.models.build import check_net
from resnet_train.weights import state_dicts

FAMILIES = {"cifar": "CIFAR", "imagenet": "ImageNet"}
# The key in the header of an exported .safetensors file: the rest of the checkpoint and the preprocessing, as JSON.
HEADER = "resnet_train"
HEADER_PARTS = {name: kind for name, kind in checkpoint.PARTS.items() if name not in ("model", "mean", "label")}
HEADER_PARTS |= {"data": str}


@dataclass(frozen=True)
class Source:
    """Weights from a file, with our names, for images minus `mean`, (H, W, 3) or (1, 1, 3) in 0 to 255.

    `arch` and `classes` are None if the file does not tell them. `assumed`: other assumptions that are not in the file
    but affect the logits.
    """

    family: str
    depth: int
    arch: str | None
    shortcut: str
    bottleneck_stride: str
    model: dict[str, Tensor]
    mean: Tensor
    std: tuple[float, ...]  # images in 0 to 1 are divided by it, for this conv1
    ours: bool  # whether the file is a checkpoint of resnet-train
    classes: list[str] | None
    assumed: tuple[str, ...] = ()
    described: Mapping[str, Any] = field(default_factory=dict)  # by our export, beside a state dict

    @property
    def count(self) -> int:
        """The number of classes."""
        return len(self.model["fc.weight"])

    @property
    def name(self) -> str:
        """A description of the net: ImageNet resnet-50-B, stride in the 3x3."""
        net = f"{self.arch or 'resnet'}-{self.depth}" + ("" if self.arch == "plain" else f"-{self.shortcut}")
        return f"{FAMILIES[self.family]} {net}" + (
            f", stride in the {self.bottleneck_stride}" if self.has_bottlenecks else ""
        )

    @property
    def has_bottlenecks(self) -> bool:
        """Whether its blocks are bottlenecks."""
        return self.family == "imagenet" and self.depth >= 50

    def same_classes(self, classes: list[str]) -> bool:
        """Whether the classifier is for `classes`; unknown names are taken to be equal."""
        return self.count == len(classes) and self.classes in (None, classes)


def read_source(
    path: Path,
    *,
    form: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    content: Any = None,
) -> Source:
    """Read a checkpoint of resnet-train, or a state dict of the given `form` (state_dicts.to_our_names).

    `mean` and `std` normalise images in 0 to 1 for a state dict; None: as in the JSON file of our export beside it,
    else ImageNet's. `content`: what the file holds, if it is read. Raises UserError.
    """
    content = state_dicts.read(path) if content is None else content
    if isinstance(content, Mapping) and "model" in content and type(content.get("format")) is int:
        checkpoint.check_format(content, path)
    if checkpoint.is_ours(content):
        if (kind := checkpoint.kind_of(content)) != "net":
            raise UserError(f"{path}: is a {kind}'s, which {checkpoint.KINDS[kind]} reads")
        with checkpoint.checkpoint_errors(path):
            return _of_checkpoint(content)
    state, shape = state_dicts.to_our_names(state_dicts.tensors(content, path), form, str(path))
    description = read_description(path) or {}
    pixel_mean = description.get("mean", state_dicts.MEAN) if mean is None else mean
    mean_image = 255 * torch.tensor(pixel_mean, dtype=torch.float64)
    source = Source(
        family=shape.family,
        depth=shape.depth,
        arch=description.get("arch", None if shape.shortcut == "A" else "resnet"),
        shortcut="none" if description.get("arch") == "plain" else shape.shortcut,
        bottleneck_stride=description.get("bottleneck_stride", "3x3"),
        model=state,
        mean=mean_image.view(1, 1, 3) if mean_image.ndim == 1 else mean_image,
        std=tuple(std or description.get("std", IMAGENET_STD)),
        ours=False,
        classes=description.get("classes"),
        described=description,
    )
    if description:
        return source
    is_known = form != "auto" or state_dicts.check_architecture(content, path)
    place, *others = state_dicts.places(content) or [""]
    assumed = {
        "torchvision's net, whose names and shapes it has": is_known,
        "a residual net": is_known or source.arch,
        f"what it has under {place!r}, not {' or '.join(map(repr, others))}": not others,
        "stride in the 3x3": not source.has_bottlenecks,
        f"mean {list(state_dicts.MEAN)}": mean,
        f"std {list(IMAGENET_STD)}": std,
    }
    return dataclasses.replace(source, assumed=tuple(item for item, certain in assumed.items() if not certain))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint, or a .safetensors file that was exported from one, for evaluation.

    Raises UserError for other files.
    """
    if path.suffix != ".safetensors":
        return checkpoint.load(path)
    description = read_description(path)
    if description is None or "config" not in description:
        raise UserError(
            f"{path}: holds weights, and not what resnet-weights export writes with them; resnet-weights import"
            f" {shlex.quote(str(path))} out=net.pt makes a checkpoint of them"
        )
    source = read_source(path)
    with checkpoint.checkpoint_errors(path):
        config = config_from_checkpoint(description["config"])
        state = {name: description[name] for name in HEADER_PARTS if name != "data"} | {"label": description["data"]}
        double = state["measure"]["precision"] == "fp64"
        state["mean"] = source.mean if double else source.mean.float()
        return state | {"model": state_dicts.rescaled(source.model, source.std, divisor(config))}


def divisor(config: Config) -> tuple[float, ...]:
    """The std by which images are divided for a net of this configuration, in units of the full range."""
    standard = config.data.family == "imagenet" and config.normalise == "standard"
    return IMAGENET_STD if standard else state_dicts.UNDIVIDED


def _of_checkpoint(state: dict[str, Any]) -> Source:
    config = config_from_checkpoint(state["config"])
    check_net(config, state)
    return Source(
        family=config.data.family,
        depth=config.depth,
        arch=config.arch,
        shortcut=config.shortcut,
        bottleneck_stride=config.bottleneck_stride,
        model=state["model"],
        mean=state["mean"],
        std=divisor(config),
        ours=True,
        classes=state["classes"],
    )


def check_same_net(source: Source, config: Config, origin: str) -> None:
    """Raises UserError, which names the keys to change, for weights of another net than the configuration's."""
    if source.family != config.data.family:
        raise UserError(
            f"{origin}: is a net of the {FAMILIES[source.family]} family ({source.name}); data={config.data.name} is"
            f" for {FAMILIES[config.data.family]} nets"
        )
    values = {"depth": source.depth, "arch": source.arch or config.arch, "shortcut": source.shortcut}
    values["bottleneck_stride"] = source.bottleneck_stride if source.has_bottlenecks else config.bottleneck_stride
    if values["arch"] == "plain":
        values["shortcut"] = "none"
    changes = [f"{key}={value}" for key, value in values.items() if getattr(config, key) != value]
    if changes:
        changes = [word for word in changes if word != "shortcut=none"]  # that goes with arch=plain
        raise UserError(f"{origin}: is the {source.name}, and this run's is the {config.net}; use {' '.join(changes)}")


def read_description(path: Path) -> dict[str, Any] | None:
    """The description that our export has written for the weights in `path`, in the header or the JSON file beside it.

    None if there is none. Raises UserError.
    """
    header = state_dicts.metadata(path).get(HEADER)
    beside = path.with_name(path.name + ".json")
    if header is None and not beside.is_file():
        return None
    try:
        values = json.loads(read_regular(beside, LARGEST_TEXT) if header is None else header)
        if header is None and not (
            isinstance(values, dict) and f"{values.get('written_by')}".startswith("resnet-train")
        ):
            return None
        if values.get("format") != checkpoint.FORMAT:
            raise ValueError(
                f"format {values.get('format')}; resnet-train {__version__} reads {checkpoint.FORMAT} alone"
            )
        parts = {name: kind for name, kind in HEADER_PARTS.items() if "config" in values or name in values}
        fault = checkpoint.wrong_part(values, {"classes": list} | parts)
        mean, std = (torch.tensor(values[key], dtype=torch.float64) for key in ("mean", "std"))
        checks = {
            "mean": mean.shape in ((3,), (values["size"], values["size"], 3)) and mean.isfinite().all(),
            "std": std.shape == (3,) and std.isfinite().all() and (std > 0).all(),
            "arch": values["arch"] in ("resnet", "plain"),
            "bottleneck_stride": values["bottleneck_stride"] in ("1x1", "3x3"),
            "precision": values.get("precision", "fp32") in ("bf16", "fp16", "fp32", "fp64"),
            **{key: type(values.get(key, 0)) is int for key in ("seed", "iteration", "iterations")},
        }
        fault = fault or next((f"{key} is invalid" for key, good in checks.items() if not good), None)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, RecursionError, AttributeError) as error:
        fault = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if fault and header is None:
        raise UserError(f"{beside}: is not what resnet-weights export wrote beside {path.name} ({fault}); move it away")
    if fault:
        raise UserError(f"{path}: its header is not what resnet-weights export wrote ({fault})")
    return values

"""Weights from a file of any program, in our form."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train import __version__
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import read_regular
from resnet_train.models.build import check_net
from resnet_train.weights import state_dicts

FAMILIES = {"cifar": "CIFAR", "imagenet": "ImageNet"}
# In the header of a .safetensors file of ours: what else its checkpoint holds, and what is to be done to images. JSON.
HEADER = "resnet_train"
HEADER_PARTS = {name: kind for name, kind in checkpoint.PARTS.items() if name not in ("model", "mean", "label")}
HEADER_PARTS |= {"data": str}


@dataclass(frozen=True)
class Source:
    """Weights from a file in our form, for images of which `mean`, (H, W, 3) or (1, 1, 3) in 0 to 255, is subtracted.

    What the file does not say is None: whether option A is a plain net, and the classes. `assumed`: what else it does
    not say, though its logits depend on it.
    """

    family: str
    depth: int
    arch: str | None
    shortcut: str
    bottleneck_stride: str
    model: dict[str, Tensor]
    mean: Tensor
    std: tuple[float, ...]  # what images in 0 to 1 are divided by for this conv1
    ours: bool  # whether it is a checkpoint of ours
    classes: list[str] | None
    assumed: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of classes."""
        return len(self.model["fc.weight"])

    @property
    def name(self) -> str:
        """The net in words: ImageNet resnet-50-B, stride in the 3x3."""
        net = f"{self.arch or 'resnet'}-{self.depth}" + ("" if self.arch == "plain" else f"-{self.shortcut}")
        return f"{FAMILIES[self.family]} {net}" + (
            f", stride in the {self.bottleneck_stride}" if self.has_bottlenecks else ""
        )

    @property
    def has_bottlenecks(self) -> bool:
        """Whether its blocks are bottlenecks."""
        return self.family == "imagenet" and self.depth >= 50

    def same_classes(self, classes: list[str]) -> bool:
        """Whether its classifier is one for `classes`, as far as it is known."""
        return self.count == len(classes) and self.classes in (None, classes)


def read_source(
    path: Path,
    *,
    form: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    double: bool = False,
) -> Source:
    """The weights in a checkpoint of ours or in a state dict of the given `form` (state_dicts.to_our_names).

    `mean` and `std` are what a state dict's images, in 0 to 1, have subtracted and are divided by; None: what the JSON
    file beside it says that an export of ours leaves, else ImageNet's. `double`: in float64. Raises UserError.
    """
    found = state_dicts.read(path)
    if isinstance(found, Mapping) and "model" in found and type(found.get("format")) is int:
        checkpoint.check_format(found, path)
    if checkpoint.is_ours(found):
        if (kind := checkpoint.kind_of(found)) != "net":
            raise UserError(f"{path}: is a {kind}'s, which {checkpoint.KINDS[kind]} reads")
        with checkpoint.checkpoint_errors(path):
            return _of_checkpoint(found)
    state, shape = state_dicts.to_our_names(state_dicts.tensors(found, path), form, str(path))
    if double:
        state = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    told = read_description(path) or {}
    mean_image = 255 * torch.tensor(told.get("mean", state_dicts.MEAN) if mean is None else mean, dtype=torch.float64)
    source = Source(
        family=shape.family,
        depth=shape.depth,
        arch=told.get("arch", None if shape.shortcut == "A" else "resnet"),
        shortcut="none" if told.get("arch") == "plain" else shape.shortcut,
        bottleneck_stride=told.get("bottleneck_stride", "3x3"),
        model=state,
        mean=mean_image.view(1, 1, 3) if mean_image.ndim == 1 else mean_image,
        std=tuple(std or told.get("std", IMAGENET_STD)),
        ours=False,
        classes=told.get("classes"),
    )
    if told:
        return source
    named = form != "auto" or state_dicts.check_said(found, path)
    taken, *others = state_dicts.places(found) or [""]
    assumed = {
        "torchvision's net, whose names and shapes it has": named,
        "a residual net": named or source.arch,
        f"what it has under {taken!r}, not {' or '.join(map(repr, others))}": not others,
        "stride in the 3x3": not source.has_bottlenecks,
        f"mean {list(state_dicts.MEAN)}": mean,
        f"std {list(IMAGENET_STD)}": std,
    }
    return dataclasses.replace(source, assumed=tuple(what for what, known in assumed.items() if not known))


def load(path: Path) -> dict[str, Any]:
    """What evaluation needs of a checkpoint, or of the .safetensors file that export has made of one.

    Raises UserError for other files.
    """
    if path.suffix != ".safetensors":
        return checkpoint.load(path)
    told = read_description(path)
    if told is None or "config" not in told:
        raise UserError(
            f"{path}: holds weights, and not what resnet-weights export writes with them; resnet-weights import"
            f" {shlex.quote(str(path))} out=net.pt makes a checkpoint of them"
        )
    source = read_source(path)
    with checkpoint.checkpoint_errors(path):
        config = config_from_checkpoint(told["config"])
        state = {name: told[name] for name in HEADER_PARTS if name != "data"} | {"label": told["data"]}
        double = state["measure"]["precision"] == "fp64"
        state["mean"] = source.mean if double else source.mean.float()
        return state | {"model": state_dicts.rescaled(source.model, source.std, divisor(config))}


def divisor(config: Config) -> tuple[float, ...]:
    """What a net of this configuration has its images divided by, in units of the full range."""
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


def check_same_net(source: Source, config: Config, where: str) -> None:
    """Refuse weights of another net than the configuration's. Raises UserError, which says what would be the same."""
    if source.family != config.data.family:
        raise UserError(
            f"{where}: is a net of the {FAMILIES[source.family]} family ({source.name}); data={config.data.name} is for"
            f" {FAMILIES[config.data.family]} nets"
        )
    theirs = {"depth": source.depth, "arch": source.arch or config.arch, "shortcut": source.shortcut}
    theirs["bottleneck_stride"] = source.bottleneck_stride if source.has_bottlenecks else config.bottleneck_stride
    if theirs["arch"] == "plain":
        theirs["shortcut"] = "none"
    take = [f"{key}={value}" for key, value in theirs.items() if getattr(config, key) != value]
    if take:
        take = [word for word in take if word != "shortcut=none"]  # that goes with arch=plain
        raise UserError(f"{where}: is the {source.name}, and this run's is the {config.net}; use {' '.join(take)}")


def read_description(path: Path) -> dict[str, Any] | None:
    """What an export of ours says of the weights in `path`, in their header or in the file beside it; None if none.

    Raises UserError.
    """
    header = state_dicts.metadata(path).get(HEADER)
    beside = path.with_name(path.name + ".json")
    if header is None and not beside.is_file():
        return None
    try:
        found = json.loads(read_regular(beside) if header is None else header)
        if header is None and not str(found["written_by"]).startswith("resnet-train"):
            return None
        if found.get("format") != checkpoint.FORMAT:
            raise ValueError(
                f"format {found.get('format')}; resnet-train {__version__} reads {checkpoint.FORMAT} alone"
            )
        parts = {name: kind for name, kind in HEADER_PARTS.items() if "config" in found or name in found}
        wrong = checkpoint.wrong_part(found, {"classes": list} | parts)
        mean, std = (torch.tensor(found[key], dtype=torch.float64) for key in ("mean", "std"))
        fine = {
            "mean": mean.shape[-1:] == (3,) and mean.shape[:-1] in ((), (found["size"],) * 2) and mean.isfinite().all(),
            "std": std.shape == (3,) and std.isfinite().all() and (std > 0).all(),
            "arch": found["arch"] in ("resnet", "plain"),
            "bottleneck_stride": found["bottleneck_stride"] in ("1x1", "3x3"),
        }
        wrong = wrong or next((f"{key} is not what it must be" for key, good in fine.items() if not good), None)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, RecursionError, AttributeError) as error:
        wrong = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if wrong and header is None:
        raise UserError(f"{beside}: is not what resnet-weights export wrote beside {path.name} ({wrong}); move it away")
    if wrong:
        raise UserError(f"{path}: its header is not what resnet-weights export wrote ({wrong})")
    return found

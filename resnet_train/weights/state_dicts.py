"""State dicts of other programs in our form, and back. Names are torchvision's; what differs is said here.

**Pixels.** Others divide by a standard deviation, and most of our nets do not. conv1(w, (x - m) / s) is
conv1(w / s, x - m), and the zeros that pad the image are zeros in both: with the weights of conv1 multiplied or divided
once, it is the same net for other pixels (`rescaled`).

**Padding of option A.** akamaster's pytorch_resnet_cifar10 puts half of the new zero channels before the old ones and
half after them; ours stand after them. The same net with its channels in another order is ours: `end_padded`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import open_regular, read_if_object
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import IMAGENET

# What torchvision, timm and pytorch_resnet_cifar10 subtract from images in 0 to 1; they divide by IMAGENET_STD.
MEAN = (0.485, 0.456, 0.406)
UNDIVIDED = (1.0, 1.0, 1.0)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, compiled modules and Lightning's own
# Where programs put the state dict among other things, and what of two that are there is taken.
PLACES = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema", "ema")
SAYS = ("architecture", "arch")  # where files say which net they hold
# A net with the names and shapes of torchvision's may be another: an anti-aliased one of timm's, or one of Caffe, whose
# stride and pixels are others. Of what a file says, the words that are torchvision's; of its name, those that are not.
PLAIN = re.compile(r"([\w:.-]*[/:])?((tv|gluon|ssl|swsl)_)?resnet([_-]?\d+([_-]?v1b|[_-]?v1\.5)?([^a-z0-9].*)?)?")
OTHERS = re.compile(r"resnet[_-]?aa|blur|anti-?_?alias|caffe|msra")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Shape:
    """What a state dict shows of its net; `shortcut` A may be a plain net, which has the same parameters."""

    family: str
    depth: int
    shortcut: str
    classes: int


def read(path: Path) -> Any:
    """What is in a .safetensors file or in one that torch.save wrote. Raises UserError."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else checkpoint.read(path)


def tensors(found: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what was read from `path`: itself, or in one of PLACES. Raises UserError.

    Prefixes of wrappers are taken off.
    """
    place = next(iter(places(found)), None)
    state = found[place] if place is not None and isinstance(found, Mapping) else found
    if not _is_state_dict(state):
        raise UserError(f"{path}: is no state dict, which holds a tensor for each name{_holds(found)}")
    state = {str(name): value.detach() for name, value in state.items()}
    try:
        checkpoint.check_own_memory(state)
    except ValueError as error:
        raise UserError(f"{path}: declares {error}") from error
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def places(found: object) -> list[str]:
    """Under which of PLACES there is a state dict; the first is taken."""
    return [key for key in PLACES if isinstance(found, Mapping) and _is_state_dict(found.get(key))]


def _is_state_dict(value: Any) -> TypeGuard[Mapping[Any, Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _holds(found: object) -> str:
    """What there is in a file in place of a state dict, as far as a line has room."""
    if not isinstance(found, Mapping):
        return f"; it is a {type(found).__name__}"
    kinds = [
        f"{str(key)[:40]!r} ({f'{len(item)} entries' if isinstance(item, (Mapping, list)) else type(item).__name__})"
        for key, item in found.items()
    ]
    return f"; it has {_some(kinds, 6)}" if kinds else "; it is empty"


def check_said(found: object, path: Path) -> bool:
    """Whether a file says that its net is torchvision's: in itself, in timm's config.json beside it, or by its name.

    Raises UserError where it says another, whose names and shapes may be the same.
    """
    notes = [found, metadata(path), {"architecture": read_if_object(path.with_name("config.json")).get("architecture")}]
    words = [(key, note.get(key)) for note in notes if isinstance(note, Mapping) for key in SAYS]
    told = [(f"{key}={word[:60]}", PLAIN.fullmatch(word.lower())) for key, word in words if isinstance(word, str)]
    told += [("its name", None)] if OTHERS.search(path.name.lower()) else []
    for what, plain in told:
        if not plain:
            raise UserError(
                f"{path}: is another net by {what}, though its weights have torchvision's names and shapes; if it"
                " is torchvision's, resnet-weights import takes it with format=torchvision"
            )
    return bool(told) or re.search(r"(?<![a-z])resnet[_-]?\d+(?![a-z])", path.name.lower()) is not None


def metadata(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says beside its tensors."""
    if path.suffix != ".safetensors":
        return {}
    with _safetensors_errors(path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.metadata() or {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _safetensors_errors(path):
        from safetensors.torch import load_file

        return load_file(path)


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    """Make a UserError of what the reading of a .safetensors file raises."""
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise UserError(f"{path}: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    try:
        with open_regular(path):  # lest safetensors wait for a FIFO
            pass
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is cut short or no safetensors file ({error})") from error


def to_our_names(state: Mapping[str, Tensor], form: str, where: str) -> tuple[dict[str, Tensor], Shape]:
    """A state dict of `form` (torchvision, akamaster, or auto to see by its names) in our form, but for the pixels.

    Weights come out in float32, or in float64 where they are. Raises UserError, beginning with `where`.
    """
    akamaster = form == "akamaster" or (form == "auto" and "linear.weight" in state)
    if akamaster:
        state = {
            name.replace("linear.", "fc.").replace(".shortcut.", ".downsample."): value for name, value in state.items()
        }
    shape = shape_of(state, where)
    _check_values(state, where)
    half = (torch.float16, torch.bfloat16)
    state = {name: value.float() if value.dtype in half else value for name, value in complete(state).items()}
    return end_padded(state) if akamaster and shape.shortcut == "A" else state, shape


def _check_values(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that no logits can be computed with. Raises UserError."""
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.dtype not in FLOATS:
            raise UserError(
                f"{where}: {name} is {str(value.dtype).removeprefix('torch.')}; taken are"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}"
            )
        if not bool(value.isfinite().all()):
            raise UserError(f"{where}: {name} has values that are not finite")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise UserError(f"{where}: {name} has values below 0, as no variance is")


def end_padded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The CIFAR net of option A whose zero channels stand on both sides, as one whose zeros stand at the end.

    `order[i]` is the channel there that is our channel i of the features which the shortcuts of a stage hand on. The
    first block of the next stage pads C channels to 2C, with C/2 zeros before them: the old ones come first with us.
    Whatever writes these features (conv2 and bn2 of each block) or reads them (conv1 of each block, fc) is put in that
    order; the channels inside of a block stay. The same sums in another order, so equal up to rounding.
    """
    state = dict(state)
    order = torch.arange(len(state["conv1.weight"]))
    for stage in _blocks(state):
        for index, block in enumerate(stage):
            before = order
            if index == 0 and block != "layer1.0.":
                channels = len(order)
                old = order + channels // 2
                order = torch.cat([old, torch.tensor(sorted(set(range(2 * channels)) - set(old.tolist())))])
            state[f"{block}conv1.weight"] = state[f"{block}conv1.weight"][:, before]
            state[f"{block}conv2.weight"] = state[f"{block}conv2.weight"][order]
            for name in NORM:
                state[f"{block}bn2.{name}"] = state[f"{block}bn2.{name}"][order]
    state["fc.weight"] = state["fc.weight"][:, order]
    return state


def _blocks(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The prefixes of the blocks of each stage, from the input on: layer1.0., layer1.1., …"""
    stages: list[list[str]] = []
    while f"layer{len(stages) + 1}.0.conv1.weight" in state:
        stage, blocks = f"layer{len(stages) + 1}.", 0
        while f"{stage}{blocks}.conv1.weight" in state:
            blocks += 1
        stages.append([f"{stage}{index}." for index in range(blocks)])
    return stages


def rescaled(state: Mapping[str, Tensor], of: Sequence[float], to: Sequence[float]) -> dict[str, Tensor]:
    """The net for images that are divided by `to` (a number for each channel), from one for images divided by `of`.

    Where these are the same, the same bits; else conv1 is computed in float64 and rounded to what it was.
    """
    if tuple(of) == tuple(to):
        return dict(state)
    weight = state["conv1.weight"]
    factors = torch.tensor(to, dtype=torch.float64) / torch.tensor(of, dtype=torch.float64)
    return {**state, "conv1.weight": (weight.double() * factors.view(1, 3, 1, 1)).to(weight.dtype)}


def shape_of(state: Mapping[str, Tensor], where: str) -> Shape:
    """What net of the paper a state dict of torchvision's names is. Raises UserError, beginning with `where`."""
    found = _guess(state)
    if found is None:
        raise UserError(
            f"{where}: is no net of the paper, whose keys are conv1.weight, bn1.…, layer1.0.conv1.weight, …, fc.bias;"
            f" it has {_some(list(state))}"
        )
    with torch.device("meta"):
        make = cifar_resnet if found.family == "cifar" else imagenet_resnet
        wanted = make(found.depth, found.shortcut, num_classes=found.classes).state_dict()
    faults = {
        "has": [name for name in state if name not in wanted],
        "lacks": [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")],
        "differs in": [
            f"{name} ({'x'.join(map(str, state[name].shape))} for {'x'.join(map(str, value.shape))})"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        looks = f"{'CIFAR' if found.family == 'cifar' else 'ImageNet'} resnet-{found.depth}-{found.shortcut}"
        told = "; ".join(f"it {word} {_some(names)}" for word, names in faults.items() if names)
        raise UserError(f"{where}: looks like the {looks}, but is not: {told}")
    return found


def _guess(state: Mapping[str, Tensor]) -> Shape | None:
    """The net that the names and the first and the last weights look like."""
    stem, fc, stages = state.get("conv1.weight"), state.get("fc.weight"), _blocks(state)
    counts = tuple(map(len, stages))
    if stem is None or fc is None or stem.ndim != 4 or fc.ndim != 2 or not stages:
        return None
    family = "imagenet" if stem.shape[-1] == 7 else "cifar"
    kind = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    depths = [depth for depth, net in IMAGENET.items() if net == (kind, counts)] if family == "imagenet" else []
    if family == "cifar" and len(counts) == 3 and len(set(counts)) == 1:
        depths = [6 * counts[0] + 2]
    if not depths:
        return None
    projected = [f"{block}downsample.0.weight" in state for stage in stages for block in stage]
    shortcut = "C" if all(projected) else "B" if any(projected) else "A"
    return Shape(family, depths[0], shortcut, len(fc))


def complete(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the counters of batch norm, which old files lack and no net uses."""
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return {**{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}, **state}


def _some(names: Sequence[str], count: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

"""Conversion of state dicts from and to other programs. Our names are torchvision's; the differences are these.

**Pixels.** Others divide by a standard deviation, most of our nets do not. conv1(w, (x - m) / s) equals
conv1(w / s, x - m), and padding is zero in both: with the weights of conv1 multiplied or divided, it is the same net
for other pixels (`rescaled`).

**Padding of option A.** akamaster's pytorch_resnet_cifar10 puts half of the new zero channels before the old ones and
half after them; ours are all after them. A permutation of channels makes the nets the same: `end_padded`.
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
from resnet_train.errors import UserError, first_few
from resnet_train.files import open_regular, read_if_object
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import IMAGENET

# Subtracted from images in 0 to 1 by torchvision, timm and pytorch_resnet_cifar10; they divide by IMAGENET_STD.
MEAN = (0.485, 0.456, 0.406)
UNDIVIDED = (1.0, 1.0, 1.0)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, compiled modules and Lightning's own
# Keys under which programs store the state dict; if there are several, the first is used.
PLACES = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema", "ema")
ARCHITECTURE_KEYS = ("architecture", "arch")  # keys of the net's name in files
# A net with torchvision's names and shapes may be different: an anti-aliased one from timm, or one from Caffe with
# other strides and pixels. PLAIN matches torchvision's architectures, OTHERS the file names of nets that are not.
PLAIN = re.compile(r"([\w:.-]*[/:])?((tv|gluon|ssl|swsl)_)?resnet([_-]?\d+([_-]?v1b|[_-]?v1\.5)?([^a-z0-9].*)?)?")
OTHERS = re.compile(r"resnet[_-]?aa|blur|anti-?_?alias|caffe|msra")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Shape:
    """The net of a state dict; `shortcut` A may also be a plain net, which has the same parameters."""

    family: str
    depth: int
    shortcut: str
    classes: int


def read(path: Path) -> Any:
    """The content of a .safetensors file or a file of torch.save. Raises UserError."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else checkpoint.read(path)


def tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in the `content` of `path`: itself, or under one of PLACES. Raises UserError.

    Prefixes of wrappers are removed.
    """
    place = next(iter(places(content)), None)
    state = content[place] if place is not None and isinstance(content, Mapping) else content
    if not _is_state_dict(state):
        raise UserError(f"{path}: is no state dict, which holds a tensor for each name{_describe_content(content)}")
    state = {str(name): value.detach() for name, value in state.items()}
    try:
        checkpoint.check_own_memory(state)
    except ValueError as error:
        raise UserError(f"{path}: declares {error}") from error
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def places(content: object) -> list[str]:
    """Those of PLACES under which there is a state dict; the first is used."""
    return [key for key in PLACES if isinstance(content, Mapping) and _is_state_dict(content.get(key))]


def _is_state_dict(value: Any) -> TypeGuard[Mapping[Any, Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _describe_content(content: object) -> str:
    """A short description of a file's content that is not a state dict."""
    if not isinstance(content, Mapping):
        return f"; it is a {type(content).__name__}"
    kinds = [
        f"{str(key)[:40]!r} ({f'{len(item)} entries' if isinstance(item, (Mapping, list)) else type(item).__name__})"
        for key, item in content.items()
    ]
    return f"; it has {first_few(kinds, 6)}" if kinds else "; it is empty"


def check_architecture(content: object, path: Path) -> bool:
    """Whether a file declares its net to be torchvision's, in its content, in timm's config.json, or by its name.

    Raises UserError if it declares another, whose names and shapes may be the same.
    """
    timm_config = read_if_object(path.with_name("config.json"))
    notes = [content, metadata(path), {"architecture": timm_config.get("architecture")}]
    words = [(key, note.get(key)) for note in notes if isinstance(note, Mapping) for key in ARCHITECTURE_KEYS]
    claims = [(f"{key}={word[:60]}", PLAIN.fullmatch(word.lower())) for key, word in words if isinstance(word, str)]
    claims += [("its name", None)] if OTHERS.search(path.name.lower()) else []
    for claim, is_torchvision in claims:
        if not is_torchvision:
            raise UserError(
                f"{path}: is another net by {claim}, though its weights have torchvision's names and shapes; if it"
                " is torchvision's, resnet-weights import takes it with format=torchvision"
            )
    return bool(claims) or re.search(r"(?<![a-z])resnet[_-]?\d+(?![a-z])", path.name.lower()) is not None


def metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file."""
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
    """Turn the exceptions of reading a .safetensors file into a UserError."""
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise UserError(f"{path}: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    try:
        with open_regular(path):  # else safetensors would wait for a FIFO
            pass
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is cut short or no safetensors file ({error})") from error


def to_our_names(state: Mapping[str, Tensor], form: str, where: str) -> tuple[dict[str, Tensor], Shape]:
    """Convert a state dict of `form` (torchvision, akamaster, or auto: by its names) to our names and channel order.

    16-bit weights become float32; conv1 is not rescaled. Raises UserError, beginning with `where`.
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
    """Raises UserError for weights that are not floats, not finite, or variances below 0."""
    for name, value in state.items():
        if value.dtype not in FLOATS and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"{where}: {name} is {str(value.dtype).removeprefix('torch.')}; allowed are"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}"
            )
        if not bool(value.isfinite().all()):
            raise UserError(f"{where}: {name} has values that are not finite")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise UserError(f"{where}: {name} has values below 0, as no variance is")


def end_padded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a CIFAR net of option A with zero channels on both sides to one with zeros at the end.

    `order[i]` is the channel of the original net that is our channel i, in the features that a stage's shortcuts pass
    on. The first block of the next stage pads C channels to 2C, with C/2 zeros before them; with us the old channels
    come first. All layers that write these features (conv2 and bn2 of each block) or read them (conv1 of each block,
    fc) are permuted; channels inside a block are not. The sums are the same in another order, so equal up to rounding.
    """
    state = dict(state)
    order = torch.arange(len(state["conv1.weight"]))
    for stage in _blocks(state):
        for index, block in enumerate(stage):
            previous = order
            if index == 0 and block != "layer1.0.":
                channels = len(order)
                moved = order + channels // 2
                order = torch.cat([moved, torch.tensor(sorted(set(range(2 * channels)) - set(moved.tolist())))])
            state[f"{block}conv1.weight"] = state[f"{block}conv1.weight"][:, previous]
            state[f"{block}conv2.weight"] = state[f"{block}conv2.weight"][order]
            for name in NORM:
                state[f"{block}bn2.{name}"] = state[f"{block}bn2.{name}"][order]
    state["fc.weight"] = state["fc.weight"][:, order]
    return state


def _blocks(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The prefixes of the blocks of each stage, in order: layer1.0., layer1.1., …"""
    stages: list[list[str]] = []
    while f"layer{len(stages) + 1}.0.conv1.weight" in state:
        stage, blocks = f"layer{len(stages) + 1}.", 0
        while f"{stage}{blocks}.conv1.weight" in state:
            blocks += 1
        stages.append([f"{stage}{index}." for index in range(blocks)])
    return stages


def rescaled(state: Mapping[str, Tensor], old: Sequence[float], new: Sequence[float]) -> dict[str, Tensor]:
    """Convert a net for images divided by `old` (a number per channel) to one for images divided by `new`.

    If they are equal, the weights are unchanged; else conv1 is computed in float64 and rounded to its own type.
    """
    if tuple(old) == tuple(new):
        return dict(state)
    weight = state["conv1.weight"]
    factors = torch.tensor(new, dtype=torch.float64) / torch.tensor(old, dtype=torch.float64)
    return {**state, "conv1.weight": (weight.double() * factors.view(1, 3, 1, 1)).to(weight.dtype)}


def shape_of(state: Mapping[str, Tensor], where: str) -> Shape:
    """The net of the paper for a state dict with torchvision's names. Raises UserError, beginning with `where`."""
    shape = _guess(state)
    if shape is None:
        raise UserError(
            f"{where}: is no net of the paper, whose keys are conv1.weight, bn1.…, layer1.0.conv1.weight, …, fc.bias;"
            f" it has {first_few(list(state))}"
        )
    if not shape.classes:
        raise UserError(f"{where}: its fc.weight has no rows, so that the net has no classes")
    with torch.device("meta"):
        make = cifar_resnet if shape.family == "cifar" else imagenet_resnet
        expected = make(shape.depth, shape.shortcut, num_classes=shape.classes).state_dict()
    faults = {
        "has": [name for name in state if name not in expected],
        "lacks": [name for name in expected if name not in state and not name.endswith("num_batches_tracked")],
        "differs in": [
            f"{name} ({'x'.join(map(str, state[name].shape))} for {'x'.join(map(str, value.shape))})"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        looks = f"{'CIFAR' if shape.family == 'cifar' else 'ImageNet'} resnet-{shape.depth}-{shape.shortcut}"
        differences = "; ".join(f"it {word} {first_few(names)}" for word, names in faults.items() if names)
        raise UserError(f"{where}: looks like the {looks}, but is not: {differences}")
    return shape


def _guess(state: Mapping[str, Tensor]) -> Shape | None:
    """The most likely net, from the names and the first and last weights; None if there is none."""
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
    """Add the batch counters of batch norm, which are missing in old files and not used by any net."""
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return {**{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}, **state}

"""The command `resnet-weights`, and the weights that a run begins with: from other programs' files and for them."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnet_train import __version__
from resnet_train.classification.load import build_network, check_net
from resnet_train.config.commands import WeightsConfig
from resnet_train.config.layout import class_folders, is_official_cifar10, is_packed
from resnet_train.config.train import Config, check_train, config_from_checkpoint
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.data.images import CLASSES
from resnet_train.data.packed import open_packed
from resnet_train.engine import checkpoint
from resnet_train.errors import RunError, UserError
from resnet_train.files import expand, read_regular, write_result, write_whole
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say
from resnet_train.weights import state_dicts

BN_IMAGES = {"cifar": 64, "imagenet": 32}
FAMILIES = {"cifar": "CIFAR", "imagenet": "ImageNet"}
# In the header of a .safetensors file of ours: what else its checkpoint holds, and what is to be done to images. JSON.
HEADER = "resnet_train"
HEADER_PARTS = {name: kind for name, kind in checkpoint.PARTS.items() if name not in ("model", "mean")} | {"data": str}
TOLERANCE = 1e-4  # of ONNX logits, in absolute terms and relative to the largest


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
    """The weights in a checkpoint of ours or in a state dict of the given `form` (state_dicts.ours).

    `mean` and `std` are what a state dict's images, in 0 to 1, have subtracted and are divided by; None: what the JSON
    file beside it says that an export of ours leaves, else ImageNet's. `double`: in float64. Raises UserError.
    """
    found = state_dicts.read(path)
    if checkpoint.is_ours(found):
        if "detector" in found:
            raise UserError(f"{path}: is a detector's, which resnet-detect reads")
        with checkpoint.checkpoint_errors(path):
            return _of_checkpoint(found)
    state, shape = state_dicts.to_our_names(state_dicts.tensors(found, path), form, str(path))
    if double:
        state = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    told = _description(path) or {}
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
    told = _description(path)
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
        raise UserError(f"{where}: is the {source.name}, and this run's is the {config.net}; take {' '.join(take)}")


# --- Import ----------------------------------------------------------------------------------------------------------


def import_weights(asked: WeightsConfig, bases: dict[str, dict[str, Any]]) -> None:
    """The command `resnet-weights import`: a checkpoint that gives the logits that the file's own program gives.

    `bases` has for each family of nets the values of a training run, of which evaluation reads some.
    """
    path, out = expand(asked.file), expand(asked.out)
    double = asked.precision == "fp64"
    source = read_source(path, form=asked.format, mean=asked.mean, std=asked.std, double=double)
    if source.ours:
        raise UserError(f"file={path}: is a checkpoint of resnet-train already; resnet-weights export is the other way")
    config = _config(asked, source, bases[source.family])
    classes = _classes(asked, source)
    state = {
        "config": config.plain(),
        "classes": classes,
        "digest": "",  # of the images that it was trained on, which nobody knows
        # How batch norm's statistics were taken, nobody knows either; for precise_bn, the paper's groups.
        "measure": {"precision": asked.precision, "compile": False, "bn_images": BN_IMAGES[source.family]},
        "mean": source.mean if double else source.mean.float(),
        "iteration": 0,
        "model": state_dicts.rescaled(source.model, source.std, divisor(config)),
    }
    with checkpoint.checkpoint_errors(path):
        build_network(config, len(classes)).load_state_dict(source.model)
    checkpoint.save(out, state)
    shown = [round(value, 4) for value in (source.mean.mean((0, 1)) / 255).tolist()]
    stride = f", stride in the {config.bottleneck_stride}" if source.has_bottlenecks else ""
    folded = "" if divisor(config) == source.std else " (in conv1 now)"
    say(
        f"{FAMILIES[source.family]} {config.net}{stride}, {len(classes)} classes ({', '.join(classes[:3])}…); images in"
        f" 0 to 1 minus {shown}, divided by {list(source.std)}{folded}; {asked.precision}; {out}"
    )
    given = {"stride in the 3x3": asked.bottleneck_stride, "a residual net": asked.arch}
    if assumed := [what for what in source.assumed if not given.get(what)]:
        say(f"assumed, for the file does not say: {'; '.join(assumed)}")


def _config(asked: WeightsConfig, source: Source, base: dict[str, Any]) -> Config:
    """What a training run of such a net would have had for its configuration."""
    data = dict(base["data"]) | {"family": source.family, "root": asked.data.root}
    data["name"] = data["name"] if asked.data.name == "auto" else asked.data.name
    data["size"] = asked.data.size or data["size"]
    values = base | {
        "data": data,
        "depth": source.depth,
        "arch": asked.arch or source.arch or "resnet",
        "shortcut": source.shortcut,
        "bottleneck_stride": asked.bottleneck_stride or source.bottleneck_stride,
        "precision": asked.precision,
        "compile": False,
        "recipe": "imported",
    }
    if source.family == "imagenet":
        values["augment"] = base["augment"] | {"shorter_side": [max(256, data["size"]), max(480, data["size"])]}
        values["normalise"] = "standard" if source.std == IMAGENET_STD else "channels"
    if values["arch"] == "plain" and source.shortcut not in ("A", "none"):
        raise UserError(f"arch=plain: {asked.file} has projections (option {source.shortcut}), as no plain net has")
    if values["arch"] == "resnet" and source.shortcut == "none":
        values["shortcut"] = "A"
    return check_train(values, needs_data=False)


def _classes(asked: WeightsConfig, source: Source) -> list[str]:
    """The names of the classes, from the first place that has them. Raises UserError where they are too few or many."""
    root, count = asked.data.root, source.count
    if asked.classes is not None:
        where = f"classes={asked.classes}"
        try:
            names = read_regular(expand(asked.classes)).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read as text: {error}") from error
        names = [name.strip() for name in names if name.strip()]
    elif root is not None and not is_official_cifar10(Path(root)):
        names, where = (
            open_packed(root).classes if is_packed(root) else class_folders(Path(root))[0],
            f"data.root={root}",
        )
    elif source.classes is not None:
        names, where = source.classes, f"{asked.file}.json"
    elif count == 10 and asked.data.name in ("auto", "cifar10") and source.family == "cifar":
        return CLASSES
    else:
        return list(imagenet_classes()) if count == 1000 else [str(number) for number in range(count)]
    if len(names) != count:
        raise UserError(f"{where}: names {len(names)} classes, the net in {asked.file} has {count}")
    return names


def _description(path: Path) -> dict[str, Any] | None:
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


# --- Export ----------------------------------------------------------------------------------------------------------


def export(asked: WeightsConfig) -> None:
    """The command `resnet-weights export`: the file, and beside it in JSON what is to be done to images."""
    path, out = expand(asked.file), expand(asked.out)
    state = load(path)
    with checkpoint.checkpoint_errors(path):
        config = config_from_checkpoint(state["config"])
        check_net(config, state)
        net = build_network(config, len(state["classes"]))
        net = net.double() if state["measure"]["precision"] == "fp64" else net
        net.load_state_dict(state["model"])
        mean = (state["mean"].double() / 255).view(-1, 3)
        image = mean.view(state["mean"].shape)
    mean = mean[0] if bool((mean == mean[0]).all()) else image
    std = list(asked.std or (IMAGENET_STD if mean.ndim == 1 else divisor(config)))
    note, images = "", "RGB in 0 to 1, minus mean, divided by std"
    if asked.format == "onnx":
        if asked.std is not None:
            raise UserError("std: means nothing to an ONNX file, which takes images in 0 to 1 as they are; drop it")
        difference, content = _onnx(net, mean, divisor(config), config.data.size)
        images = f"float32 RGB in 0 to 1, (N, 3, {config.data.size}, {config.data.size}); mean and std are inside"
        note = f"; logits as PyTorch's to {difference:.1g} by onnxruntime"
    described = {
        "written_by": f"resnet-train {__version__}",
        "checkpoint": asked.file,
        "net": config.net,
        "family": config.data.family,
        "arch": config.arch,
        "depth": config.depth,
        "shortcut": config.shortcut,
        "bottleneck_stride": config.bottleneck_stride,
        "data": state.get("label", config.data_label),
        "size": config.data.size,
        "seed": config.seed,
        "iteration": state["iteration"],
        "iterations": config.iterations,
        "precision": state["measure"]["precision"],
        "images": images,
        "mean": mean.tolist(),
        "std": std if asked.format != "onnx" else list(state_dicts.UNDIVIDED),
        "classes": state["classes"],
    }
    if asked.format != "onnx":
        tensors = {k: v.contiguous() for k, v in state_dicts.rescaled(net.state_dict(), divisor(config), std).items()}
        if asked.format == "safetensors":
            # What `load` makes a checkpoint of again. Where the data lie elsewhere, data.root= says.
            values = config.plain() | {"init_from": config.init_from and Path(config.init_from).name}
            values["data"] |= {"root": None}
            kept = {"config": values, "digest": state["digest"], "measure": state["measure"]}
            content = _safetensors(tensors, described | kept)
        else:
            content = _saved(tensors)
        if mean.ndim == 3 and config.data.family == "imagenet":
            note = "; note: torchvision subtracts one mean of each channel, as nets trained with normalise=channels do"
        stride = config.bottleneck_stride if config.data.family == "imagenet" and config.depth >= 50 else "3x3"
        if stride == "1x1":
            note += "; note: its stride is in the first 1x1, torchvision's is in the 3x3: there it gives other logits"
    write_whole(out, content)
    write_result(out.with_name(out.name + ".json"), described)
    of = "the mean image in the JSON file" if mean.ndim == 3 else str([round(value, 4) for value in mean.tolist()])
    takes = images if asked.format == "onnx" else f"RGB in 0 to 1, minus {of}, divided by {std}"
    say(f"{FAMILIES[config.data.family]} {config.net}, {len(state['classes'])} classes; images: {takes}{note}; {out}")


def _saved(tensors: dict[str, Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _safetensors(tensors: dict[str, Tensor], told: dict[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("format=safetensors: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    return save(tensors, metadata={"format": "pt", HEADER: json.dumps(told)})


class _FromPixels(nn.Module):
    """The net for images (N, 3, H, W) in 0 to 1: it subtracts the mean, (3, 1, 1) or (3, H, W), itself."""

    mean: Tensor

    def __init__(self, net: ResNet, mean: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images - self.mean)


def _onnx(net: ResNet, mean: Tensor, std: Sequence[float], size: int) -> tuple[float, bytes]:
    """An ONNX file for any number of images, and how far its logits are off. Raises UserError and RunError."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"format=onnx: needs {error.name}: pip install 'resnet-train[onnx]'") from error
    net.load_state_dict(state_dicts.rescaled(net.state_dict(), std, state_dicts.UNDIVIDED))
    channels_first = mean.view(3, 1, 1) if mean.ndim == 1 else mean.permute(2, 0, 1)
    whole = _FromPixels(net, channels_first).float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            whole,
            (torch.rand(2, 3, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    for count in (1, 3):
        images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            wanted = whole(images).numpy()
        found = session.run(None, {"images": images.numpy()})[0]
        difference = max(difference, float(np.abs(found - wanted).max()))
        if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise RunError(f"the ONNX file's logits differ by {difference:.2g} from PyTorch's; it is not written")
    return difference, content

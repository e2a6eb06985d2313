"""The command `resnet-weights`: import of other programs' weights, and export for them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train import __version__
from resnet_train.config.commands import WeightsConfig
from resnet_train.config.layout import OFFICIAL, check_source, class_folders, is_official, is_packed
from resnet_train.config.train import Config, check_train, config_from_checkpoint
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.data.cifar10 import CLASSES
from resnet_train.data.crops import center_side
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.data.packed import open_packed
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import LARGEST_TEXT, expand, read_regular, writing
from resnet_train.models.build import build_network, check_net
from resnet_train.terminal import say
from resnet_train.weights import state_dicts
from resnet_train.weights.onnx import to_onnx
from resnet_train.weights.source import FAMILIES, HEADER, Source, divisor, load, read_source

BN_IMAGES = {"cifar": 64, "imagenet": 32}


def import_weights(args: WeightsConfig, bases: dict[str, dict[str, Any]]) -> None:
    """The command `resnet-weights import`: write a checkpoint with the same logits as in the file's own program.

    `bases` has the values of a training run for each family of nets, some of which are used in evaluation.
    """
    path, out = expand(args.file), expand(args.out)
    source = read_source(path, form=args.format, mean=args.mean, std=args.std)
    if source.ours:
        raise UserError(f"file={path}: is a checkpoint of resnet-train already; resnet-weights export is the other way")
    config = _config(args, source, bases[source.family])
    classes = _classes(args, source)
    if len(classes) < 2:
        raise UserError(f"file={path}: its fc.weight has one row; a net has at least two classes")
    double, model = config.precision == "fp64", source.model
    if double:
        model = {name: value.double() if value.is_floating_point() else value for name, value in model.items()}
    state = {
        "config": config.plain(),
        "classes": classes,
        "label": config.data_label if args.data.root is not None else source.described.get("data", config.data_label),
        "digest": "",  # of the training images: unknown
        # The groups of batch norm's statistics are unknown as well; for precise_bn, the paper's.
        "measure": {"precision": config.precision, "compile": False, "bn_images": BN_IMAGES[source.family]},
        "mean": source.mean if double else source.mean.float(),
        "iteration": source.described.get("iteration", 0),
        "model": state_dicts.rescaled(model, source.std, divisor(config)),
    }
    with checkpoint.checkpoint_errors(path):
        build_network(config, len(classes)).load_state_dict(model)
    checkpoint.save(out, state)
    mean = [round(value, 4) for value in (source.mean.mean((0, 1)) / 255).tolist()]
    what = f"{mean}" if source.mean.shape[:2] == (1, 1) else f"a mean image (of the channels: {mean})"
    stride = f", stride in the {config.bottleneck_stride}" if source.has_bottlenecks else ""
    folded = "" if divisor(config) == source.std else " (in conv1 now)"
    named = ", ".join(classes[:3]) + "…" * (len(classes) > 3)
    say(
        f"{FAMILIES[source.family]} {config.net}{stride}, {len(classes)} classes ({named}); images in 0 to 1 minus"
        f" {what}, divided by {list(source.std)}{folded}; {config.data.size} px, {config.precision}; {out}"
    )
    specified = {"stride in the 3x3": args.bottleneck_stride, "a residual net": args.arch}
    if assumed := [item for item in source.assumed if not specified.get(item)]:
        say(f"assumed, for the file does not say: {'; '.join(assumed)}")


def _config(args: WeightsConfig, source: Source, base: dict[str, Any]) -> Config:
    """The configuration of a training run of such a net, with what is described beside its weights."""
    described = source.described
    data = dict(base["data"]) | {"family": source.family, "root": None}
    data["size"] = args.data.size or described.get("size", data["size"])
    usual = data["name"] if source.family == "imagenet" or data["size"] == 32 else "imagefolder"
    if source.family == "cifar" and "data" in described:
        usual = described["data"] if described["data"] in (*OFFICIAL, "digits") else "imagefolder"
    data["name"] = usual if args.data.name == "auto" else args.data.name
    if source.mean.shape[0] not in (1, data["size"]):
        side = source.mean.shape[0]
        raise UserError(f"data.size={data['size']}: the mean image of {args.file} has {side} px; use data.size={side}")
    values = base | {
        "data": data,
        "depth": source.depth,
        "arch": args.arch or source.arch or "resnet",
        "shortcut": source.shortcut,
        "bottleneck_stride": args.bottleneck_stride or source.bottleneck_stride,
        "precision": args.precision or described.get("precision", "fp32"),
        "compile": False,
        "recipe": "imported",
    }
    values |= {key: described[key] for key in ("seed", "iterations") if key in described}
    if source.family == "imagenet":
        values["augment"] = base["augment"] | {"shorter_side": [max(256, data["size"]), max(480, data["size"])]}
        values["normalise"] = "standard" if source.std == IMAGENET_STD else "channels"
    if values["arch"] == "plain" and source.shortcut not in ("A", "none"):
        raise UserError(f"arch=plain: {args.file} has projections (option {source.shortcut}), as no plain net has")
    if values["arch"] == "resnet" and source.shortcut == "none":
        values["shortcut"] = "A"
    config = check_train(values, needs_data=False)
    if args.data.root is not None:
        check_source(config.data.name, args.data.root, train=False)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=args.data.root))


def _classes(args: WeightsConfig, source: Source) -> list[str]:
    """The names of the classes, from the first source that has them. Raises UserError if their number is wrong."""
    root, count = args.data.root, source.count
    if args.classes is not None:
        origin = f"classes={args.classes}"
        try:
            names = read_regular(expand(args.classes), LARGEST_TEXT).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{origin}: cannot be read as text: {error}") from error
        names = [name.strip() for name in names if name.strip()]
    elif root is not None and not any(is_official(name, Path(root)) for name in OFFICIAL):
        names, origin = (
            open_packed(root).classes if is_packed(root) else class_folders(Path(root), train=False)[0],
            f"data.root={root}",
        )
    elif source.classes is not None:
        names, origin = source.classes, f"{args.file}.json"
    elif count == 10 and args.data.name in ("auto", "cifar10") and source.family == "cifar":
        return CLASSES
    else:
        return list(imagenet_classes()) if count == 1000 else [str(number) for number in range(count)]
    if len(names) != count:
        raise UserError(f"{origin}: names {len(names)} classes, the net in {args.file} has {count}")
    return names


def export(args: WeightsConfig) -> None:
    """The command `resnet-weights export`: write the file, and beside it JSON with the preprocessing of images."""
    path, out = expand(args.file), expand(args.out)
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
    std = list(args.std or (IMAGENET_STD if mean.ndim == 1 else divisor(config)))
    note, images = "", "RGB in 0 to 1, minus mean, divided by std"
    if args.format == "onnx":
        if args.std is not None:
            raise UserError("std: is not used by an ONNX file, which takes images in 0 to 1 as they are; remove it")
        difference, content = to_onnx(net, mean, divisor(config), config.data.size)
        images = f"float32 RGB in 0 to 1, (N, 3, {config.data.size}, {config.data.size}); mean and std are inside"
        note = f"; logits as PyTorch's to {difference:.1g} by onnxruntime"
    divided = std if args.format != "onnx" else list(state_dicts.UNDIVIDED)
    preprocessing = {"images": images, "mean": mean.tolist(), "std": divided}
    description = _describe(args.file, config, state) | preprocessing | {"classes": state["classes"]}
    if args.format != "onnx":
        tensors = {k: v.contiguous() for k, v in state_dicts.rescaled(net.state_dict(), divisor(config), std).items()}
        if args.format == "safetensors":
            # The rest of the checkpoint, for `load`. If the data are in another place, data.root= is needed.
            values = config.plain() | {"init_from": config.init_from and Path(config.init_from).name}
            values["data"] |= {"root": None}
            checkpoint_parts = {"config": values, "digest": state["digest"], "measure": state["measure"]}
            content = _safetensors(tensors, description | checkpoint_parts)
        else:
            content = _to_bytes(tensors)
        if mean.ndim == 3 and config.data.family == "imagenet":
            note = "; note: torchvision subtracts one mean of each channel, as nets trained with normalise=channels do"
        stride = config.bottleneck_stride if config.data.family == "imagenet" and config.depth >= 50 else "3x3"
        if stride == "1x1":
            note += "; note: its stride is in the first 1x1, torchvision's is in the 3x3: there it gives other logits"
    beside = out.with_name(out.name + ".json")
    with writing(out) as weights, writing(beside) as described:  # renamed once both are written
        described.write_text(json.dumps(description, indent=2) + "\n")
        weights.write_bytes(content)
    shift = "the mean image in the JSON file" if mean.ndim == 3 else str([round(value, 4) for value in mean.tolist()])
    inputs = images if args.format == "onnx" else f"RGB in 0 to 1, minus {shift}, divided by {std}"
    say(f"{FAMILIES[config.data.family]} {config.net}, {len(state['classes'])} classes; images: {inputs}{note}; {out}")


def _describe(file: str, config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The net of a checkpoint, as exports describe it."""
    return {
        "written_by": f"resnet-train {__version__}",
        "format": checkpoint.FORMAT,
        "checkpoint": file,
        "net": config.net,
        "family": config.data.family,
        "arch": config.arch,
        "depth": config.depth,
        "shortcut": config.shortcut,
        "bottleneck_stride": config.bottleneck_stride,
        "data": state["label"],
        "size": config.data.size,
        "shorter_side": center_side(config.data.size) if config.data.family == "imagenet" else config.data.size,
        "seed": config.seed,
        "iteration": state["iteration"],
        "iterations": config.iterations,
        "precision": state["measure"]["precision"],
    }


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _safetensors(tensors: dict[str, Tensor], header: dict[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("format=safetensors: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    return save(tensors, metadata={"format": "pt", HEADER: json.dumps(header)})

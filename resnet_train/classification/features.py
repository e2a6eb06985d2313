"""The command `resnet-features`: the output of a layer for images, preprocessed as in evaluation, in one file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from resnet_train.classification.command import with_data
from resnet_train.classification.load import check_split, open_dataset, pick_eval_batch
from resnet_train.classification.predict import Classifier, load
from resnet_train.config.data import EvalData
from resnet_train.config.images import FeaturesConfig
from resnet_train.config.layout import count_unreadable
from resnet_train.engine.compute import pick_device
from resnet_train.engine.limits import check_memory
from resnet_train.errors import RunError, UserError, nearest
from resnet_train.files import check_result, expand, writing
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say


def features(args: FeaturesConfig, data: EvalData | None, images: list[str]) -> None:
    """Write the output of `args.layer` for `images`, or for a split of `data`, in order.

    Raises UserError, in which case no file is left.
    """
    out = expand(args.out)
    if out.suffix == ".safetensors":
        _import_safetensors(args.out)
    model = load(args.checkpoint, pick_device(args.device))
    check_layer(model.net, args.layer)
    metadata: dict[str, Any] = {"checkpoint": str(expand(args.checkpoint).absolute()), "net": model.config.net}
    metadata |= {"iteration": model.iteration, "layer": args.layer}
    batches: Iterator[tuple[Tensor, Tensor | None]]
    if data is None:
        metadata |= {"images": images}
        batches = ((batch, None) for _, batch in model.batches(images))
    else:
        config = with_data(model.config, data)
        dataset = open_dataset(config)
        check_split(dataset, args.split)
        metadata |= {"data": dataset.label, "split": args.split, "classes": dataset.classes}
        metadata |= {"images": dataset.names(args.split)}
        batch_size = pick_eval_batch(config, model.device)
        batches = iter(dataset.eval_batches(args.split, model.mean.to(model.device), model.device, batch_size))
    check_result(out)
    arrays = gather(model, args.layer, batches, len(metadata["images"]))
    unreadable = 0
    if "labels" in arrays and not (read := arrays["labels"] >= 0).all():
        arrays = {name: values[read] for name, values in arrays.items()}
        metadata["images"] = [name for name, kept in zip(metadata["images"], read, strict=True) if kept]
        unreadable = int((~read).sum())
    _write(out, arrays, metadata)
    shape = f"{list(arrays['features'].shape)} {arrays['features'].dtype}"
    line = f"{model.config.net}, {args.layer}: {len(metadata['images'])} images, {shape}"
    say("; ".join(filter(None, [line, count_unreadable(unreadable), str(out)])))


def check_layer(net: ResNet, layer: str) -> None:
    """Raises UserError, which names the layers of the net, for a layer that it does not have."""
    names = [name for name, _ in net.named_modules() if name]
    if layer not in names:
        first = ", ".join(name for name, _ in net.named_children())
        raise UserError(
            f"layer={layer}: allowed are {first}, and what is in the stages, from {net.stages[0]}.0 to"
            f" {[name for name in names if name.startswith('layer')][-1]}{nearest(layer, names)}"
        )


def gather(
    model: Classifier, layer: str, batches: Iterator[tuple[Tensor, Tensor | None]], count: int
) -> dict[str, np.ndarray]:
    """The outputs of `layer` for `count` images: `features` (N, C), or (N, C, H, W) for a layer before the pooling.

    Computed in the precision of the net's evaluation; stored as float32, or float64 for fp64. If `batches` have labels,
    also `labels` (N,) int64, which are -1 for broken images; padding of the last batch is left out. Raises UserError if
    the arrays do not fit in memory.
    """
    arrays: dict[str, np.ndarray] = {}
    start = 0
    with outputs(model.net, layer) as captured:
        for images, labels in batches:
            model.logits(images)
            values = captured.pop()[: count - start]
            values = values.double() if model.precision == "fp64" else values.float()
            values = values.flatten(1) if values.shape[2:] == (1, 1) else values
            if not arrays:
                arrays["features"] = _allocate(layer, (count, *values.shape[1:]), 8 if model.precision == "fp64" else 4)
                arrays |= {} if labels is None else {"labels": np.empty(count, np.int64)}
            stop = start + len(values)
            arrays["features"][start:stop] = values.cpu().numpy()
            if labels is not None:
                arrays["labels"][start:stop] = labels[: len(values)].cpu().numpy()
            start = stop
    assert start == count, f"{start} images of {count}"
    return arrays


def _allocate(layer: str, shape: tuple[int, ...], size: int) -> np.ndarray:
    """An empty array of floats of `size` bytes. Raises UserError if it is larger than the machine's memory."""
    what = f"layer={layer}: {shape[0]:,} images of {list(shape[1:])}"
    check_memory(math.prod(shape) * size, what, "use a later layer, or fewer images")
    return np.empty(shape, np.dtype(f"f{size}"))


@contextlib.contextmanager
def outputs(net: ResNet, layer: str) -> Iterator[list[Tensor]]:
    """A list to which every forward pass appends the output of `layer`."""
    captured: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        captured.append(output)

    handle = net.get_submodule(layer).register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


def _write(out: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write the arrays and `metadata`, in .npz as further arrays, in .safetensors as JSON in the header."""
    with writing(out) as part:
        if out.suffix == ".safetensors":
            save_file, SafetensorError = _import_safetensors(str(out))
            try:
                save_file(arrays, part, metadata={key: json.dumps(value) for key, value in metadata.items()})
            except SafetensorError as error:  # such as a full disk
                raise RunError(f"out={out}: cannot be written ({error})") from error
        else:
            with part.open("wb") as file:
                np.savez(file, **arrays, **{key: np.array(value) for key, value in metadata.items()})  # type: ignore[arg-type]


def _import_safetensors(out: str) -> tuple[Any, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(f"out={out}: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    return save_file, SafetensorError

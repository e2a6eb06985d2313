"""The command `resnet-features`: what a layer gives for images, seen as evaluation sees them, in one file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from resnet_train.classification.evaluate import with_data
from resnet_train.classification.load import open_dataset, pick_eval_batch
from resnet_train.classification.predict import Classifier, load
from resnet_train.config.data import EvalData
from resnet_train.config.images import FeaturesConfig
from resnet_train.engine.compute import pick_device
from resnet_train.errors import RunError, UserError, nearest
from resnet_train.files import check_result, expand, writing
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say


def features(asked: FeaturesConfig, data: EvalData | None, images: list[str]) -> None:
    """Write what `asked.layer` gives for each of `images`, or of a part of `data`, in order.

    Raises UserError, and then leaves no file.
    """
    out = expand(asked.out)
    if out.suffix == ".safetensors":
        _import_safetensors(asked.out)
    model = load(asked.checkpoint, pick_device(asked.device))
    check_layer(model.net, asked.layer)
    told: dict[str, Any] = {"checkpoint": str(expand(asked.checkpoint).absolute()), "net": model.config.net}
    told |= {"iteration": model.iteration, "layer": asked.layer}
    batches: Iterator[tuple[Tensor, Tensor | None]]
    if data is None:
        told |= {"images": images}
        batches = ((batch, None) for _, batch in model.batches(images))
    else:
        config = with_data(model.config, data)
        dataset = open_dataset(config)
        if dataset.sizes[asked.split] == 0:
            raise UserError(f"split={asked.split}: no part of the training set was held out; use split=test")
        told |= {"data": dataset.label, "split": asked.split, "classes": dataset.classes}
        told |= {"images": dataset.names(asked.split)}
        at_once = pick_eval_batch(config, model.device)
        batches = iter(dataset.eval_batches(asked.split, model.mean.to(model.device), model.device, at_once))
    check_result(out)
    arrays = gather(model, asked.layer, batches, len(told["images"]))
    _write(out, arrays, told)
    say(
        f"{model.config.net}, {asked.layer}: {len(told['images'])} images, {list(arrays['features'].shape)}"
        f" {arrays['features'].dtype}; {out}"
    )


def check_layer(net: ResNet, layer: str) -> None:
    """Refuse a layer that the net does not have. Raises UserError, which names those that it has."""
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
    """What `layer` gives for `count` images: `features` (N, C), or (N, C, H, W) of a layer before the pooling.

    In the precision of the net's evaluation; stored in float32, or float64 for fp64. And their `labels` (N,) int64,
    where `batches` have them; of a batch those that are -1 fill it. Raises UserError for more than the memory holds.
    """
    found: dict[str, np.ndarray] = {}
    start = 0
    with outputs(model.net, layer) as kept:
        for images, labels in batches:
            model.logits(images)
            values = kept.pop() if labels is None else kept.pop()[labels >= 0]
            values = values.double() if model.precision == "fp64" else values.float()
            values = values.flatten(1) if values.shape[2:] == (1, 1) else values
            if not found:
                found["features"] = _room(layer, (count, *values.shape[1:]), 8 if model.precision == "fp64" else 4)
                found |= {} if labels is None else {"labels": np.empty(count, np.int64)}
            stop = start + len(values)
            found["features"][start:stop] = values.cpu().numpy()
            if labels is not None:
                found["labels"][start:stop] = labels[labels >= 0].cpu().numpy()
            start = stop
    assert start == count, f"{start} images of {count}"
    return found


def _room(layer: str, shape: tuple[int, ...], size: int) -> np.ndarray:
    """An array for numbers of `size` bytes. Raises UserError for one that is larger than the machine's memory."""
    need, memory = int(np.prod(shape)) * size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise UserError(
            f"layer={layer}: {shape[0]:,} images of {list(shape[1:])} are {need / 1e9:.0f} GB, and this machine has"
            f" {memory / 1e9:.0f}; use a later layer, or fewer images"
        )
    return np.empty(shape, np.dtype(f"f{size}"))


@contextlib.contextmanager
def outputs(net: ResNet, layer: str) -> Iterator[list[Tensor]]:
    """What `layer` gives in each forward pass, in a list that grows."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output)

    handle = net.get_submodule(layer).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _write(out: Path, arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    """The arrays, and what is `told` of them: in .npz as arrays as well, in .safetensors as JSON in the header."""
    with writing(out) as part:
        if out.suffix == ".safetensors":
            save_file, SafetensorError = _import_safetensors(str(out))
            try:
                save_file(arrays, part, metadata={key: json.dumps(value) for key, value in told.items()})
            except SafetensorError as error:  # such as a full disk
                raise RunError(f"out={out}: cannot be written ({error})") from error
        else:
            with part.open("wb") as file:
                np.savez(file, **arrays, **{key: np.array(value) for key, value in told.items()})  # type: ignore[arg-type]


def _import_safetensors(out: str) -> tuple[Any, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(f"out={out}: needs safetensors: pip install 'resnet-train[safetensors]'") from error
    return save_file, SafetensorError

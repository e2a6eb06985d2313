"""From a configuration to data and a network: the one place that reads their keys."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from resnet_train.config.train import Config
from resnet_train.data.sets import MemoryDataset, StreamingDataset
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import autocast, to_device, wrap_ddp
from resnet_train.engine.distributed import is_main
from resnet_train.errors import UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.batchnorm import use_group_batch_norm
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say

COMPILED_FROM = 1000  # iterations
WHOLE = 110  # deeper nets are compiled block by block: compiling the whole takes time in proportion to its depth


def build_network(config: Config, num_classes: int) -> ResNet:
    """The network that the configuration names, initialised from torch's random state."""
    if config.data.family == "cifar":
        return cifar_resnet(
            config.depth, config.shortcut, num_classes=num_classes, init=config.init, zero_gamma=config.zero_gamma
        )
    return imagenet_resnet(
        config.depth,
        config.shortcut,
        num_classes=num_classes,
        bottleneck_stride=config.bottleneck_stride,
        init=config.init,
        zero_gamma=config.zero_gamma,
    )


def open_dataset(config: Config) -> MemoryDataset | StreamingDataset:
    """The data sets that the configuration names. Raises UserError for data that are not what they should be."""
    data = config.data
    if data.family == "cifar":
        return MemoryDataset(name=data.name, root=data.root, size=data.size, validation=data.validation)
    assert data.root is not None  # check_train has seen to it
    return StreamingDataset(
        root=data.root,
        size=data.size,
        validation=data.validation,
        workers=pick_workers(config),
        broken=data.broken,
        subtract=config.normalise,
    )


def pick_compile(config: Config, device: torch.device) -> bool:
    """auto as true on a GPU, and on a CPU where the run is long enough to earn the time that compiling takes.

    With bn_images=all, which PyTorch does not compile, as false.
    """
    if config.compile != "auto":
        return config.compile
    long = config.iterations >= COMPILED_FROM
    if device.type != "cuda" and not long and is_main():
        say(f"compile=auto: {config.iterations} iterations are too few to earn the time of compiling")
    return config.bn_images != "all" and (long or device.type == "cuda")


def pick_eval_batch(config: Config, device: torch.device) -> int:
    """auto as a batch of small images that keeps a GPU busy, or as one that stays in a CPU's cache."""
    if config.eval_batch_size != "auto":
        return config.eval_batch_size
    if config.data.family == "imagenet":
        return 100
    return max(1, 2000 * 32**2 // config.data.size**2) if device.type == "cuda" else 250


def pick_workers(config: Config) -> int:
    """auto as this process's share of the machine's cores; on a CPU, where they compute as well, at most four."""
    workers = config.data.workers
    if workers != "auto":
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return share if torch.cuda.is_available() and config.device != "cpu" else min(4, share)


def check_net(config: Config, state: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint's `state` does not hold the net that its `config` declares; makes none."""
    checkpoint.check_net(state["model"], lambda: build_network(config, len(state["classes"])), config.depth)
    checkpoint.check_mean(state["mean"])


def load_model(
    path: Path,
    config: Config,
    state: dict[str, Any],
    classes: list[str],
    device: torch.device,
    *,
    precise_bn: bool = False,
) -> tuple[ResNet, Tensor, str, bool]:
    """The net, mean image and precision of the checkpoint `path`, and whether it was compiled. Raises UserError.

    `config` and `state` are what the checkpoint holds, `classes` those of the data. With `precise_bn`, batch norm is of
    the kind that `batchnorm.average_statistics` sets.
    """
    if classes != state["classes"]:
        raise UserError(
            f"data: {config.data_label} has the classes {', '.join(classes)[:60]}…, the checkpoint was trained on"
            f" {', '.join(map(str, state['classes']))[:60]}…"
        )
    with checkpoint.checkpoint_errors(path):
        precision = str(state["measure"]["precision"])
        if precision not in get_args(get_type_hints(Config)["precision"]):
            raise ValueError(f"precision {precision}")
        check_net(config, state)
        model = build_network(config, len(classes))
        if precise_bn:
            use_group_batch_norm(model, state["measure"]["bn_images"])
        if config.freeze is not None:
            model.freeze(config.freeze)
        model = to_device(model, device, precision)
        model.load_state_dict(state["model"])
        return model, state["mean"].to(device), precision, state["measure"]["compile"]


def wrap_image_ddp(model: nn.Module, precision: str, shape: tuple[int, ...]) -> nn.Module:
    """`parallel` for a net; `shape` is that of its batches. All move its buffers alike: batchnorm.update_statistics."""
    device = next(model.parameters()).device
    images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    return wrap_ddp(model, lambda net: compute_logits(net, images, precision).sum())


def compute_logits(net: nn.Module, images: Tensor, precision: str) -> Tensor:
    """A forward pass in `precision`; logits in float32, or in float64 for fp64."""
    if precision == "fp64":
        return net(images.double())
    with autocast(images.device, precision):
        return net(images).float()


def compile_network(model: ResNet, depth: int, device: torch.device) -> bool:
    """Compile in place, the whole net or block by block; False where there is no compiler.

    Block by block above 110 layers, and where activations are computed again, which is done between blocks.

    Shapes are fixed: the same batch gives the same kernels, in training and in every later evaluation.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if is_main():
            say(f"compile=true: there is no working compiler ({reason}); going on without, slower")
        return False
    if depth <= WHOLE and not model.recompute:
        model.compile(dynamic=False)
        return True
    with contextlib.suppress(AttributeError):  # one kernel set for each shape and mode, however many blocks share it
        torch._dynamo.config.recompile_limit = 64
    for block in model.blocks():
        block.compile(dynamic=False)
    return True

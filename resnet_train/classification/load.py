"""Build data and networks from a configuration or a checkpoint, and resolve values of auto."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.config.train import Config
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import BatchOrder
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import DTYPES, compute_logits, precision_of, to_device
from resnet_train.engine.distributed import is_main, rank, world_size
from resnet_train.engine.limits import most_workers, share_of_cores
from resnet_train.errors import UserError, first_few
from resnet_train.models.batchnorm import average_statistics, use_group_batch_norm
from resnet_train.models.build import build_network, check_net
from resnet_train.models.compile import compiles_in_blocks
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say

COMPILED_FROM = 1000  # iterations
WORKERS = 24  # for one GPU; an H200 with ResNet-50 is fed by 16 (docs/speed.md), and each takes shared memory
PRECISIONS = (*DTYPES, "fp64")  # in which a checkpoint can have been trained


def open_dataset(config: Config) -> MemoryDataset | StreamingDataset:
    """Open the data of the configuration. Raises UserError for data that are missing or damaged."""
    data = config.data
    if data.family == "cifar":
        return MemoryDataset(
            name=data.name, root=data.root, size=data.size, validation=data.validation, broken=data.broken
        )
    assert data.root is not None  # ensured by check_train
    return StreamingDataset(
        root=data.root,
        size=data.size,
        validation=data.validation,
        workers=pick_workers(config),
        broken=data.broken,
        subtract=config.normalise,
    )


def check_split(dataset: MemoryDataset | StreamingDataset, split: str) -> None:
    """Raises UserError for a part that the data do not have."""
    if dataset.sizes[split] == 0:
        alone = not dataset.sizes["train"]
        lacks = f"{dataset.label} has a test part alone" if alone else "no part of the training set was held out"
        raise UserError(f"split={split}: {lacks}; use split=test")


def pick_compile(config: Config, device: torch.device) -> bool:
    """Resolve compile=auto: true on a GPU, and on a CPU for runs long enough to be worth the time of compilation.

    False with bn_images=all, which PyTorch does not compile.
    """
    if config.compile != "auto":
        return config.compile
    long = config.iterations >= COMPILED_FROM
    if device.type != "cuda" and not long and is_main():
        say(f"compile=auto: {config.iterations} iterations are too few to earn the time of compiling")
    return config.bn_images != "all" and (long or device.type == "cuda")


def pick_eval_batch(config: Config, device: torch.device) -> int:
    """Resolve eval_batch_size=auto: for small images, large enough to fill a GPU or small enough for a CPU's cache."""
    if config.eval_batch_size != "auto":
        return config.eval_batch_size
    if config.data.family == "imagenet":
        return 100
    return max(1, 2000 * 32**2 // config.data.size**2) if device.type == "cuda" else 250


def pick_workers(config: Config) -> int:
    """Resolve data.workers=auto: this process's share of the cores; at most `WORKERS`, or four if the CPU trains."""
    workers = config.data.workers
    if workers != "auto":
        return workers
    most = WORKERS if torch.cuda.is_available() and config.device != "cpu" else 4
    return min(share_of_cores(), most_workers(), most)


def average_batch_norm(
    model: ResNet,
    mean: Tensor,
    config: Config,
    images: int,
    dataset: MemoryDataset | StreamingDataset,
    count: int,
    precision: str,
) -> None:
    """Set batch norm's statistics to averages over `count` training batches of `images`, shared among the processes."""
    start, stop = rank() * count // world_size(), (rank() + 1) * count // world_size()
    batches = dataset.train_batches(mean, mean.device, BatchOrder(config.seed, images, config.augment, start))
    passes = (compute_logits(model, images, precision) for images, _ in islice(batches, stop - start))
    average_statistics(model, passes, count)


def _differ(classes: list[str], trained: list[str]) -> str:
    """In what the `classes` of data are not those that a checkpoint was trained on."""
    text = f"{len(classes)} classes, the checkpoint was trained on {len(trained)}"
    for what, names in (("missing", set(trained) - set(classes)), ("unknown", set(classes) - set(trained))):
        text += f"; {what}: {first_few(sorted(names))}" if names else ""
    return text if set(classes) != set(trained) else f"{text}, the same in another order"


def trained_in_blocks(state: dict[str, Any], model: ResNet, config: Config) -> bool:
    """Whether the net of a checkpoint was compiled block by block; older ones do not say, and it was by the depth."""
    return bool(state["measure"].get("blocks", compiles_in_blocks(model, config.depth)))


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

    `state` is its content, `config` its configuration, `classes` those of the data. With `precise_bn`, batch norm is
    prepared for `batchnorm.average_statistics`.
    """
    if classes != state["classes"]:
        raise UserError(f"data: {config.data_label} has {_differ(classes, list(map(str, state['classes'])))}")
    with checkpoint.checkpoint_errors(path):
        precision = precision_of(state, PRECISIONS)
        check_net(config, state)
        model = build_network(config, len(classes))
        if precise_bn:
            use_group_batch_norm(model, state["measure"]["bn_images"])
        if config.freeze is not None:
            model.freeze(config.freeze)
        model = to_device(model, device, precision)
        model.load_state_dict(state["model"])
        return model, state["mean"].to(device), precision, state["measure"]["compile"]

"""The command `resnet-train`: from a configuration to a trained classifier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_train.classification.load import PRECISIONS, open_dataset, pick_compile, trained_in_blocks
from resnet_train.classification.step import TrainMetrics
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.train import Config, split_batch
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.sampler import generator
from resnet_train.data.streaming import StreamingDataset
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import check_synchronised, pick_device, pick_precision, precision_of, sgd, to_device
from resnet_train.engine.distributed import local_rank_zero_first, raise_on_all_ranks, world_size
from resnet_train.engine.run import check_compute, run
from resnet_train.engine.schedule import Progress
from resnet_train.models.batchnorm import use_group_batch_norm
from resnet_train.models.build import build_network
from resnet_train.models.compile import compile_network, compiles_in_blocks
from resnet_train.weights import state_dicts
from resnet_train.weights.source import Source, check_same_net, divisor, read_source


def train(config: Config, directory: Path) -> int:
    """Train in `directory`, resuming a run that was cut there. The exit code and errors of `engine.run.run`."""
    return run(config, directory, command="resnet-train", open_data=open_data, build=build_or_resume)


def open_data(config: Config) -> MemoryDataset | StreamingDataset:
    """The images that the configuration names. Raises UserError."""
    raise_on_all_ranks(lambda: _check_compute(config))  # before minutes of reading
    dataset = local_rank_zero_first(lambda: open_dataset(config))
    local_rank_zero_first(dataset.mean_image)  # for photographs computed once and cached
    return dataset


def _check_compute(config: Config) -> None:
    """Raises UserError for a batch that cannot be divided as configured, or a precision not supported here."""
    split_batch(config, world_size())
    check_compute(config.batch_size, config.device, config.precision)


def build_or_resume(
    config: Config, dataset: MemoryDataset | StreamingDataset, device: torch.device, state: dict[str, Any] | None
) -> ClassificationTask:
    """The task, new (with the weights of `init_from`, if given) or restored from the checkpoint `state`."""
    task = build(config, dataset)
    if state is not None:
        with checkpoint.checkpoint_errors(state["path"]):
            task.precision = precision_of(state, PRECISIONS)
            task.compiled = bool(state["measure"]["compile"])
            task.blocks = trained_in_blocks(state, task.model, config)
            task.load(state)
    elif config.init_from is not None:
        begin_from(task, read_matching_source(config))
    compiled = task.compiled if state is not None else pick_compile(config, device)  # a resumed run stays as it began
    if compiled:
        compile_task(task)
    return task


def compile_task(task: ClassificationTask) -> None:
    """Compile the net; without a compiler it stays as it is."""
    task.compiled = compile_network(task.model, task.device, blocks=task.blocks)


def build(config: Config, dataset: MemoryDataset | StreamingDataset | None = None) -> ClassificationTask:
    """Network and optimiser on the images of `dataset`, by default those of the configuration. Raises UserError."""
    device = pick_device(config.device)
    precision, share = pick_precision(config.precision, device), split_batch(config, world_size())
    dataset = dataset or open_data(config)
    torch.backends.cudnn.benchmark = True  # shapes are fixed
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    model = build_network(config, len(dataset.classes))
    if config.bn_images == "all" and world_size() > 1:
        check_synchronised(device)
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world_size() > 1 or share.passes > 1 or share.group < share.images or config.activation_checkpointing:
        use_group_batch_norm(model, share.group)
    model.recompute = config.activation_checkpointing
    if config.freeze is not None:
        model.freeze(config.freeze)
    model = to_device(model, device, precision)
    task = ClassificationTask(
        config=config,
        device=device,
        precision=precision,
        compiled=False,
        blocks=False,
        dataset=dataset,
        mean=dataset.mean_image().to(device),
        model=model,
        net=model,
        share=share,
        optimizer=sgd_of(model, config, precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        metrics=TrainMetrics(device),
        progress=Progress(warm=0 < config.warmup.depth <= config.depth),
    )
    task.blocks = compiles_in_blocks(model, config.depth, captured=task.is_capturable)
    return task


def sgd_of(model: nn.Module, config: Config, precision: str) -> torch.optim.SGD:
    """SGD with weight decay on all parameters, as in the paper, or on convolution and linear weights only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay == "all" or p.ndim > 1]
    spared = [p for p in trained if config.decay == "weights" and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    lr, momentum, nesterov = config.schedule.lr, config.momentum, config.nesterov
    return sgd(groups, lr=lr, momentum=momentum, nesterov=nesterov, precision=precision)


def read_matching_source(config: Config) -> Source:
    """The weights of `init_from`. Raises UserError if they are of another net than the configuration's."""
    path = Path(str(config.init_from))
    source = read_source(path)
    check_same_net(source, config, f"init_from={path}")
    return source


def begin_from(task: ClassificationTask, source: Source) -> None:
    """Start from the weights of `source` and the mean that was subtracted from its images; for other classes fc is new.

    For images of another size the mean image is replaced by its channel averages.
    """
    state = state_dicts.rescaled(source.model, source.std, divisor(task.config))
    if not source.same_classes(task.dataset.classes):
        state = state | {f"fc.{name}": value for name, value in task.model.fc.state_dict().items()}
    with checkpoint.checkpoint_errors(f"init_from={task.config.init_from}"):
        task.model.load_state_dict(state)
    mean = source.mean.to(task.mean)
    task.mean = mean if mean.shape == task.mean.shape else mean.mean((0, 1)).expand_as(task.mean).contiguous()
    # The classifier's weights alone: the others are the network's now.
    task.source = dataclasses.replace(source, model={"fc.weight": source.model["fc.weight"]})

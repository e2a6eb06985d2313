"""What each of several processes that train together finds, for test_distributed.py; alone, what one process finds.

Each leaves FOLDER/RANK.pt.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

from resnet_train.classification.evaluate import count_errors
from resnet_train.classification.run import build
from resnet_train.classification.step import TrainMetrics, step
from resnet_train.config.options import CONFIG_DIR
from resnet_train.config.train import check_train
from resnet_train.data.views import BatchOrder
from resnet_train.engine import checkpoint
from resnet_train.engine.distributed import (
    local_rank_zero_first,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from resnet_train.errors import UserError

CPU = torch.device("cpu")
DIGITS = ["data=digits", "data.size=8", "augment.pad=1", "data.validation=137", "batch_size=128", "device=cpu"]
STEPS = 3
# Name: batch norm's groups, precision, and the most images at once.
CASES = {
    "fp32": ["bn_images=32", "precision=fp32"],
    "fp32 in parts": ["bn_images=32", "precision=fp32", "device_batch_size=32"],
    "fp64": ["bn_images=32", "precision=fp64"],
    "fp64 in parts": ["bn_images=32", "precision=fp64", "device_batch_size=32"],
    "fp64 by device": ["bn_images=device", "precision=fp64"],
}
# What evaluation batches hold: 360 test and 137 validation images make 8 and 3 batches, or 2 and 1.
EVALUATED = (50, 200)


def composed(*overrides):
    """What the command line would make of `overrides`."""
    with hydra.initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return check_train(OmegaConf.to_container(hydra.compose("train", list(overrides)), resolve=True))


def batches(run):
    """The training batches of this process."""
    config = run.config
    order = BatchOrder(config.seed, config.batch_size, config.augment, 0, rank(), world_size())
    return run.dataset.train_batches(run.mean, run.device, order)


def trained(config):
    """Some steps: the gradients and running statistics of the first, and the state after the last."""
    run = build(dataclasses.replace(config, devices=world_size()))
    if world_size() > 1:
        run.wrap_ddp()
    gradients, buffers = [], []
    run.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in run.model.parameters()]))
    for images, labels in itertools.islice(batches(run), STEPS):
        step(run, images, labels, 0.1)
        buffers.append({name: value.clone() for name, value in run.model.state_dict().items() if "running" in name})
    return {"gradients": gradients[0], "statistics": buffers[0], "state": run.state()}


def counted(config):
    """The outcome of evaluations in batches of several sizes."""
    run = build(config)
    return {
        f"{split} {size}": dataclasses.asdict(
            count_errors(
                run.model,
                run.dataset.eval_batches(split, run.mean, run.device, size, rank(), world_size()),
                run.precision,
                run.dataset.sizes[split],
            )
        )
        for split in ("test", "val")
        for size in EVALUATED
    }


def taken_over():
    """The sums of meters that other numbers of processes have left in a checkpoint."""
    found = {}
    for rows in (1, 2, 3, 4):
        metrics = TrainMetrics(CPU)
        wrong = torch.arange(2 * rows).view(rows, 2)
        metrics.load({"loss": torch.arange(rows).double(), "wrong": wrong, "seen": 100 * rows, "skipped": 0})
        state = metrics.state()
        found[str(rows)] = [state["loss"].sum().item(), *state["wrong"].sum(0).tolist(), state["seen"]]
    return found


def refused(config):
    """The error that building a run raises here, and whether another process tells of it."""
    try:
        raise_on_all_ranks(lambda: build(config))
    except UserError as error:
        return f"{type(error).__name__}: {error}", error.shared
    return None


def work(folder, cases, plain, synchronised):
    """One process: what it finds, to FOLDER/RANK.pt."""
    with process_group(CPU, 300):
        found = {name: trained(config) for name, config in cases.items()}
        found |= {"counts": counted(plain), "refused": refused(synchronised), "taken over": taken_over()}
        checkpoint.save(Path(folder) / f"{rank()}.pt", found)
    return 0


def job(folder):
    """`work` with its configurations."""
    cases = {name: composed(*DIGITS, *words) for name, words in CASES.items()}
    # In float64 a sum of losses depends on its order; float32's have room in it.
    return functools.partial(
        work, folder, cases, composed(*DIGITS, "precision=fp64"), composed(*DIGITS, "bn_images=all", "precision=fp32")
    )


def slow(timeout, seconds):
    """Read for longer than a lost process is waited for."""
    with process_group(CPU, timeout):
        local_rank_zero_first(lambda: (time.sleep(seconds * (rank() == 0)), Path(f"read-{rank()}").touch()))

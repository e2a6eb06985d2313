"""Remake tests/golden.json, the numbers that change only on purpose, and print which did.

make golden, or python scripts/golden.py (a minute): parameters and multiply-adds of every net of the paper with
every shortcut, the learning rates of its schedules, and the losses of 20 training steps on real digits. The losses are
the same to the last bit on the same processor, with the same torch and number of threads; hence `machine`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

from resnet_train.classification.run import build
from resnet_train.classification.step import step
from resnet_train.classification.train import rate
from resnet_train.config.options import CONFIG_DIR
from resnet_train.config.schema import flat
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.views import BatchOrder
from resnet_train.engine.environment import processor
from resnet_train.engine.schedule import Progress, end_warmup, watch_plateau
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import IMAGENET, multiply_adds, parameters

FILE = Path(__file__).resolve().parent.parent / "tests" / "golden.json"
NETS = {  # name: its family, depth and shortcut
    f"{family} " + (f"plain-{depth}" if shortcut == "none" else f"resnet-{depth}-{shortcut}"): (family, depth, shortcut)
    for family, depths in (("cifar", (20, 32, 44, 56, 110, 1202)), ("imagenet", IMAGENET))
    for depth in depths
    for shortcut in ("none", "A", "B", "C")
}
SCHEDULES = ("data=cifar10", "data=cifar10 depth=110", "data=cifar10 iterations=6400", "data=imagenet")
TINY = ["data=digits", "depth=8", "iterations=20", "batch_size=32", "log_every=1"]
TINY += ["precision=fp32", "compile=false", "device=cpu"]
# At 0.1 a last bit grows to 0.5 % of a loss in 20 steps; at this rate to 0.02 %, well below the tolerance elsewhere.
TINY += ["schedule.lr=0.003"]
THREADS = 2


def composed(overrides: Iterable[str]) -> Config:
    """What the command line would make of `overrides`; data need not be there."""
    with hydra.initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose("train", list(overrides)), resolve=True)
    return config_from_checkpoint({key: value for key, value in values.items() if key != "scale"})


def size(family: str, depth: int, shortcut: str) -> dict[str, int]:
    """Parameters of a net, and multiply-adds for one image of its paper's size."""
    make, side = (cifar_resnet, 32) if family == "cifar" else (imagenet_resnet, 224)
    with torch.device("meta"):
        net = make(depth, shortcut)
    return {"parameters": parameters(net), "multiply_adds": multiply_adds(net, side)}


def rates(overrides: str) -> list[tuple[float, int]]:
    """The learning rates of a whole run as (rate, number of steps in a row).

    The training error that warm-up and plateau see is made up: from 90 % towards a floor that is lower after a drop.
    """
    config = composed(overrides.split())
    progress, error, found = Progress(warm=0 < config.warmup.depth <= config.depth), 90.0, []
    for iteration in range(config.iterations):
        found.append(rate(config, iteration, progress))
        if (iteration + 1) % config.log_every == 0:
            error += ((40, 30, 27)[min(progress.dropped, 2)] - error) * 15 * config.log_every / config.iterations
            at_least = config.warmup.iterations
            end_warmup(progress, iteration + 1, error, below=config.warmup.error, at_least=at_least)
            if config.schedule.name == "plateau":
                patience = config.schedule.patience * config.iterations
                watch_plateau(progress, iteration + 1, error, patience=patience, threshold=config.schedule.threshold)
    return [(value, len(list(group))) for value, group in itertools.groupby(found)]


def losses() -> list[float]:
    """The training loss of each step of the tiny run. Raises UserError without scikit-learn."""
    config, threads, found = composed(TINY), torch.get_num_threads(), []
    torch.set_num_threads(THREADS)
    try:
        run = build(config)
        order = BatchOrder(config.seed, config.batch_size, config.augment)
        batches = run.dataset.train_batches(run.mean, run.device, order)
        for images, labels in itertools.islice(batches, config.iterations):
            run.metrics.reset()
            step(run, images, labels, run.learning_rate())
            found.append(run.metrics.loss.item() / run.metrics.seen)
    finally:
        torch.set_num_threads(threads)
    return found


def machine() -> dict[str, str | int]:
    """What the last bits of a loss depend on."""
    return {
        "torch": torch.__version__,
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
    }


def golden() -> dict[str, dict[str, Any]]:
    """Everything in the golden file."""
    return {
        "machine": machine(),
        "nets": {name: size(*net) for name, net in NETS.items()},
        "rates": {overrides: rates(overrides) for overrides in SCHEDULES},
        "losses": {str(iteration): loss for iteration, loss in enumerate(losses())},
    }


def text(numbers: dict[str, dict[str, Any]]) -> str:
    """JSON with one line for each number, for diffs that can be read."""
    sections = []
    for name, entries in numbers.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        sections.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each entry that is not the same in both."""
    was, now = flat(old), flat(new)
    return [f"{key}: {was.get(key)} -> {now.get(key)}" for key in was | now if was.get(key) != now.get(key)]


def main() -> None:
    """Write the file and say what changed."""
    old = json.loads(FILE.read_text()) if FILE.exists() else {}
    new = text(golden())
    found = changes(old, json.loads(new))
    FILE.write_text(new)
    print("\n".join(found) if found else "nothing changed")


if __name__ == "__main__":
    main()

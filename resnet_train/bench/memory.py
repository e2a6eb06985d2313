"""Memory with and without activation checkpointing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from resnet_train.bench.subject import Outcome, bare, changed, opened, recording, sets_of, trained
from resnet_train.bench.timing import (
    SPEED,
    in_new_process,
    row,
    speeds,
    spread,
)
from resnet_train.config.commands import BenchConfig
from resnet_train.config.train import Config
from resnet_train.engine.compute import pick_device
from resnet_train.engine.environment import memory_held, peak_memory


def memory(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """Memory over that at the start, in a process for each way to train, and the speed of their steps in this one."""
    ways = {
        "checkpointing": changed(config, activation_checkpointing=True),
        "plain": changed(config, activation_checkpointing=False),
    }
    held = {name: in_new_process(_memory, way, asked.steps) for name, way in ways.items()}
    dataset = sets_of(config)
    runs = {name: opened(way, dataset) for name, way in ways.items()}
    found = speeds({name: bare(run) for name, run in runs.items()}, asked.seconds, asked.rounds, device)
    rows = [
        row(f"{name}, {when}", "MB", [size / 1e6], plain=[held["plain"][when] / 1e6])
        for name in ways
        for when, size in held[name].items()
    ]
    rows += [row(f"{name}, step", SPEED, found[name], plain=found["plain"]) for name in ways]
    slower = spread([fast / slow for fast, slow in zip(found["plain"], found["checkpointing"], strict=True)])
    values = {
        "peak_bytes": {name: sizes["peak"] for name, sizes in held.items()},
        "growth_bytes": {name: list(sizes.values())[2] - list(sizes.values())[1] for name, sizes in held.items()},
        "step_time_ratio": slower["median"],
    }
    return Outcome(rows, values, ["memory: over that after the imports, the data included; one process each"])


def _memory(config: Config, count: int) -> dict[str, int]:
    """The memory of `count` iterations of the loop over that at the start, in bytes: its peak, early, at the end."""
    device, early = pick_device(config.device), min(500, count // 2)
    start = memory_held(device)
    with tempfile.TemporaryDirectory(prefix="resnet-bench-") as folder:
        run = opened(config, sets_of(config))
        with recording(run, Path(folder)) as logger:
            trained(run, Path(folder), logger, early)
            then = memory_held(device)
            trained(run, Path(folder), logger, count - early)
            now = memory_held(device)
    most = max(peak_memory(device), then, now)  # the system counts its peak a little late
    return {"peak": most - start, f"step {early}": then - start, f"step {count}": now - start}

"""Benchmark of memory with and without activation checkpointing."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from resnet_train.bench.subject import Outcome, bare_step, build_task, make_dataset, open_logger, train_steps
from resnet_train.bench.timing import (
    SPEED,
    in_new_process,
    measure_speeds,
    row,
    spread,
)
from resnet_train.config.commands import BenchConfig
from resnet_train.config.train import Config
from resnet_train.engine.compute import pick_device
from resnet_train.engine.environment import memory_held, peak_memory


def memory(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """Memory above that at the start, each configuration in its own process, and the speed of steps in this process."""
    configs = {
        "checkpointing": dataclasses.replace(config, activation_checkpointing=True),
        "plain": dataclasses.replace(config, activation_checkpointing=False),
    }
    usage = {name: in_new_process(_memory, variant, args.steps) for name, variant in configs.items()}
    dataset = make_dataset(config)
    runs = {name: build_task(variant, dataset) for name, variant in configs.items()}
    rates = measure_speeds({name: bare_step(run) for name, run in runs.items()}, args.seconds, args.rounds, device)
    rows = [
        row(f"{name}, {when}", "MB", [size / 1e6], plain=[usage["plain"][when] / 1e6])
        for name in configs
        for when, size in usage[name].items()
    ]
    rows += [row(f"{name}, step", SPEED, rates[name], plain=rates["plain"]) for name in configs]
    slower = spread([fast / slow for fast, slow in zip(rates["plain"], rates["checkpointing"], strict=True)])
    values = {
        "peak_bytes": {name: sizes["peak"] for name, sizes in usage.items()},
        "growth_bytes": {name: list(sizes.values())[2] - list(sizes.values())[1] for name, sizes in usage.items()},
        "step_time_ratio": slower["median"],
    }
    return Outcome(rows, values, ["memory: over that after the imports, the data included; one process each"])


def _memory(config: Config, count: int) -> dict[str, int]:
    """The memory of the loop above that at the start, in bytes: its peak, early on, and after `count` iterations."""
    device, early = pick_device(config.device), min(500, count // 2)
    start = memory_held(device)
    with tempfile.TemporaryDirectory(prefix="resnet-bench-") as folder:
        run = build_task(config, make_dataset(config))
        with open_logger(run, Path(folder)) as logger:
            train_steps(run, Path(folder), logger, early)
            at_early = memory_held(device)
            train_steps(run, Path(folder), logger, count - early)
            at_end = memory_held(device)
    peak = max(peak_memory(device), at_early, at_end)  # the system updates its peak with a delay
    return {"peak": peak - start, f"step {early}": at_early - start, f"step {count}": at_end - start}

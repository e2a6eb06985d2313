"""Benchmarks of the start-up of commands and of the time to the first step."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from resnet_train.bench.subject import Outcome, bare_step, build_task, make_dataset
from resnet_train.bench.timing import (
    environment,
    in_new_process,
    measure_seconds,
    row,
    run_interleaved,
)
from resnet_train.config.commands import BenchConfig
from resnet_train.config.train import Config
from resnet_train.errors import RunError


def startup(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The start-up of commands, against Python and `import torch`; the time to the end of a run's first step."""
    train, cache = "from resnet_train.cli import train; train()", folder / "cache"
    commands = {
        "resnet-train --help": (train, "--help"),
        "resnet-train --cfg job": (train, "--cfg", "job"),
        "resnet-train depth=21": (train, "depth=21"),
        "python -c pass": ("pass",),
        "python -c 'import torch'": ("import torch",),
    }
    starts = {"first step, eager": functools.partial(_to_first_step, dataclasses.replace(config, compile=False), cache)}
    if config.compile:
        starts["first step, compiled, empty cache"] = functools.partial(_to_first_step, config, cache, empty=True)
        starts["first step, compiled, filled cache"] = functools.partial(_to_first_step, config, cache)
    jobs = {name: functools.partial(_to_the_end, words, folder) for name, words in commands.items()}
    seconds = run_interleaved({**jobs, **starts}, args.rounds)
    python, torch_, eager = seconds["python -c pass"], seconds["python -c 'import torch'"], seconds["first step, eager"]
    rows = [row(name, "s", seconds[name], python=python, import_torch=torch_) for name in commands]
    rows += [row(name, "s", seconds[name], eager=eager) for name in starts]
    return Outcome(rows, {}, ["a first step counts from the start of its process; a ratio says how many times as long"])


def _to_the_end(words: Sequence[str], folder: Path) -> float:
    """The run time of `python -c` with these arguments, in seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 2):
        raise RunError(f"python -c {words[0]!r}: {done.stderr.strip()}")
    return time.perf_counter() - start


def _to_first_step(config: Config, cache: Path, empty: bool = False) -> float:
    """The seconds from the start of a process to the end of its first training step."""
    if empty:
        shutil.rmtree(cache)
    cache.mkdir(exist_ok=True)
    start = time.perf_counter()
    return in_new_process(_first_step, config, cache) - start


def _first_step(config: Config, cache: Path) -> float:
    """The time of the end of the first step, by a clock that all processes share."""
    with environment("TORCHINDUCTOR_CACHE_DIR", str(cache)), environment("TRITON_CACHE_DIR", str(cache / "triton")):
        run = build_task(config, make_dataset(config))
        measure_seconds(lambda: bare_step(run).do(1), run.device)
    return time.perf_counter()

"""The start of a command and the time to the first step."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from resnet_train.bench.subject import Outcome, bare, changed, opened, sets_of
from resnet_train.bench.timing import (
    clocked,
    environment,
    in_new_process,
    interleaved,
    row,
)
from resnet_train.config.commands import BenchConfig
from resnet_train.config.train import Config
from resnet_train.errors import RunError


def startup(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The command line against bare Python and `import torch`; the time to the end of a run's first step."""
    train, cache = "from resnet_train.cli import train; train()", folder / "cache"
    commands = {
        "resnet-train --help": (train, "--help"),
        "resnet-train --cfg job": (train, "--cfg", "job"),
        "resnet-train depth=21": (train, "depth=21"),
        "python -c pass": ("pass",),
        "python -c 'import torch'": ("import torch",),
    }
    starts = {"first step, eager": functools.partial(_to_first_step, changed(config, compile=False), cache)}
    if config.compile:
        starts["first step, compiled, empty cache"] = functools.partial(_to_first_step, config, cache, empty=True)
        starts["first step, compiled, filled cache"] = functools.partial(_to_first_step, config, cache)
    jobs = {name: functools.partial(_to_the_end, words, folder) for name, words in commands.items()}
    found = interleaved({**jobs, **starts}, asked.rounds)
    python, torch_, eager = found["python -c pass"], found["python -c 'import torch'"], found["first step, eager"]
    rows = [row(name, "s", found[name], python=python, import_torch=torch_) for name in commands]
    rows += [row(name, "s", found[name], eager=eager) for name in starts]
    return Outcome(rows, {}, ["a first step counts from the start of its process; a ratio says how many times as long"])


def _to_the_end(words: Sequence[str], folder: Path) -> float:
    """The seconds that `python -c` takes with these words."""
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
    """When the first step has ended, by the clock that all processes share."""
    with environment("TORCHINDUCTOR_CACHE_DIR", str(cache)):
        run = opened(config, sets_of(config))
        clocked(lambda: bare(run).do(1), run.device)
    return time.perf_counter()

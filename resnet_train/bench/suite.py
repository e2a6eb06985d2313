"""The command `resnet-bench`: each figure beside a reference that runs in the same process, round by round.

The references: `classic`, the training that everybody writes, and `bare`, our own step on one batch, the ceiling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from resnet_train.bench import baseline
from resnet_train.bench.loader import loader
from resnet_train.bench.memory import memory
from resnet_train.bench.startup import startup
from resnet_train.bench.subject import (
    Outcome,
    bare,
    batches_of,
    changed,
    in_memory,
    is_synthetic,
    opened,
    recording,
    sets_of,
    trained,
)
from resnet_train.bench.timing import (
    Work,
    clocked,
    compared,
    environment,
    speeds,
    table,
)
from resnet_train.classification.evaluate import count_errors
from resnet_train.classification.load import pick_eval_batch
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.commands import BenchConfig
from resnet_train.config.train import Config
from resnet_train.engine.compute import pick_device, pick_precision
from resnet_train.engine.environment import git_commit, processor, versions
from resnet_train.engine.logger import MetricsLogger, prepare_process
from resnet_train.engine.loop import Clock, log_training
from resnet_train.files import check_result, expand, write_result
from resnet_train.models.build import build_network
from resnet_train.terminal import say


def bench(asked: BenchConfig, config: Config) -> None:
    """Run one sub-benchmark; print its table and write the JSON. Raises UserError and RunError."""
    out = expand(asked.out) if asked.out is not None else None
    if out is not None:
        check_result(out)
    prepare_process()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # takes the temporary folder along
    device = pick_device(config.device)
    config = changed(config, precision=pick_precision(config.precision, device))
    measure = {
        "step": steps,
        "loop": whole_loop,
        "loader": loader,
        "eval": evaluation,
        "startup": startup,
        "memory": memory,
    }
    with tempfile.TemporaryDirectory(prefix="resnet-bench-") as folder:
        found = measure[asked.bench](asked, config, Path(folder), device)
    title = _title(asked, config, device)
    for line in (title, *table(found.rows), *found.notes):
        say(line)
    if out is None:
        return
    result = {
        "bench": asked.bench,
        "title": title,
        **{f"ratio_to_{name}": ratio["median"] for name, ratio in found.rows[0]["ratios"].items()},
        **found.values,
        "rows": found.rows,
        "machine": _machine(device),
        "versions": versions(device),
        "git_commit": git_commit(),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "settings": {**dataclasses.asdict(asked), "random_images": is_synthetic(config), "config": config.plain()},
    }
    write_result(out, result)


def steps(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The step on one batch, as configured and in other precisions, against the classic step; first steps apart."""
    kinds = [(config.precision, config.compile), ("fp32", False), ("bf16", False), ("bf16", config.compile)]
    dataset, works = sets_of(config), {}
    for precision, compiled in dict.fromkeys(kinds):
        run = opened(changed(config, precision=precision, compile=compiled), dataset)
        works[f"{precision} {'compiled' if run.compiled else 'eager'}"] = bare(run)
    images, labels = next(batches_of(run))
    batch = images.contiguous(), labels
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    works["classic"] = Work(functools.partial(trainer.steps, itertools.repeat(batch)), len(images))
    # Empty ones; Triton's lies in the other's unless that has been used before.
    with environment("TORCHINDUCTOR_CACHE_DIR", str(folder)), environment("TRITON_CACHE_DIR", str(folder / "triton")):
        first = {name: clocked(functools.partial(work.do, 1), device) for name, work in works.items()}
    found = speeds(works, asked.seconds, asked.rounds, device)
    rows = compared(found, "classic")
    text = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in first.items())
    return Outcome(rows, {"first_step_seconds": first}, [f"first step, compile cache empty: {text}"])


def whole_loop(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The training loop with its record, evaluation and checkpoints aside, against `bare` and `classic`."""
    dataset, batch = in_memory(config), config.batch_size
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    batches = baseline.endless(baseline.loader(dataset.parts["train"], batch, device, train=True))
    run = opened(config, dataset)
    with recording(run, folder) as logger:
        works = {
            "loop": Work(functools.partial(trained, run, folder, logger), batch, config.log_every),
            "bare": bare(run),
            "classic": Work(functools.partial(trainer.steps, batches), batch),
        }
        found = speeds(works, asked.seconds, asked.rounds, device)
        shares = _shares(run, folder, logger)
    rows = compared(found, "classic", "bare")
    text = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    return Outcome(rows, {"shares": shares}, [f"of the loop, taken apart: {text}"])


def _shares(run: ClassificationTask, folder: Path, logger: MetricsLogger) -> dict[str, float]:
    """What the parts of the loop take of it, from one logged point to the next, each waited for."""
    batches, clock, spent = run.batches(), Clock(run.iteration), dict.fromkeys(("data", "step", "record"), 0.0)
    lr, batch = run.learning_rate(), next(batches)

    def fetch() -> None:
        nonlocal batch
        batch = next(batches)

    for _ in range(run.config.log_every):
        spent["data"] += clocked(fetch, run.device)
        spent["step"] += clocked(lambda: run.step(batch, lr), run.device)
        spent["record"] += clocked(logger.bar.update, run.device)
    with contextlib.redirect_stdout(io.StringIO()):
        spent["record"] += clocked(lambda: log_training(run, folder, logger, clock, lr), run.device)
    return {name: seconds / sum(spent.values()) for name, seconds in spent.items()}


def evaluation(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """A pass over the test images against the classic one."""
    dataset = in_memory(config)
    size, batch = dataset.sizes["test"], pick_eval_batch(config, device)
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    theirs = baseline.loader(dataset.parts["test"], batch, device, train=False)
    run = opened(config, dataset)

    def ours(count: int) -> None:
        for _ in range(count):
            count_errors(run.model, dataset.eval_batches("test", run.mean, device, batch), run.precision, size)

    def classically(count: int) -> None:
        for _ in range(count):
            trainer.evaluate(theirs)

    works = {"ours": Work(ours, size), "classic": Work(classically, size)}
    found = speeds(works, asked.seconds, asked.rounds, device)
    rows = compared(found, "classic")
    return Outcome(rows, {"images": size}, [f"a pass: {size} images in batches of {batch}"])


def _title(asked: BenchConfig, config: Config, device: torch.device) -> str:
    data = "random images" if is_synthetic(config) else config.data_label
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"resnet-bench {asked.bench}: {config.net}, batch {config.batch_size}, {config.precision}"
        f" {'compiled' if config.compile else 'eager'}, {data}, {device} ({where}),"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, {asked.rounds} rounds"
    )


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }

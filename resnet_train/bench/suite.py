"""The command `resnet-bench`: each measurement beside a reference that runs in the same process, round by round.

The references are `classic`, a conventional PyTorch loop, and `bare`, our own step on a single batch, an upper bound.
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
    bare_step,
    build_task,
    is_synthetic,
    make_dataset,
    memory_dataset,
    open_logger,
    train_batches,
    train_steps,
)
from resnet_train.bench.timing import (
    Work,
    comparison_rows,
    environment,
    measure_seconds,
    measure_speeds,
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


def bench(args: BenchConfig, config: Config) -> None:
    """Run one benchmark, print its table and write the JSON. Raises UserError and RunError."""
    out = expand(args.out) if args.out is not None else None
    if out is not None:
        check_result(out)
    prepare_process()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the temporary folder
    device = pick_device(config.device)
    precision: Any = pick_precision(config.precision, device)
    config = dataclasses.replace(config, precision=precision)
    measure = {
        "step": steps,
        "loop": whole_loop,
        "loader": loader,
        "eval": evaluation,
        "startup": startup,
        "memory": memory,
    }
    with tempfile.TemporaryDirectory(prefix="resnet-bench-") as folder:
        outcome = measure[args.bench](args, config, Path(folder), device)
    title = _title(args, config, device)
    for line in (title, *table(outcome.rows), *outcome.notes):
        say(line)
    if out is None:
        return
    result = {
        "bench": args.bench,
        "title": title,
        **{f"ratio_to_{name}": ratio["median"] for name, ratio in outcome.rows[0]["ratios"].items()},
        **outcome.values,
        "rows": outcome.rows,
        "machine": _machine(device),
        "versions": versions(device),
        "git_commit": git_commit(),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "settings": {**dataclasses.asdict(args), "random_images": is_synthetic(config), "config": config.plain()},
    }
    write_result(out, result)


def steps(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The step on one batch, as configured and in other precisions, against the classic step; also the first steps."""
    kinds = [(config.precision, config.compile), ("fp32", False), ("bf16", False), ("bf16", config.compile)]
    dataset, works = make_dataset(config), {}
    for precision, compiled in dict.fromkeys(kinds):
        run = build_task(dataclasses.replace(config, precision=precision, compile=compiled), dataset)
        works[f"{precision} {'compiled' if run.compiled else 'eager'}"] = bare_step(run)
    images, labels = next(train_batches(run))
    batch = images.contiguous(), labels
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    works["classic"] = Work(functools.partial(trainer.steps, itertools.repeat(batch)), len(images))
    # Empty caches; Triton's is in Inductor's unless that has been used before.
    with environment("TORCHINDUCTOR_CACHE_DIR", str(folder)), environment("TRITON_CACHE_DIR", str(folder / "triton")):
        first = {name: measure_seconds(functools.partial(work.do, 1), device) for name, work in works.items()}
    rates = measure_speeds(works, args.seconds, args.rounds, device)
    rows = comparison_rows(rates, "classic")
    text = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in first.items())
    return Outcome(rows, {"first_step_seconds": first}, [f"first step, compile cache empty: {text}"])


def whole_loop(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The training loop with logging, without evaluation and checkpoints, against `bare` and `classic`."""
    dataset, batch = memory_dataset(config), config.batch_size
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    batches = baseline.endless(baseline.loader(dataset.parts["train"], batch, device, train=True))
    run = build_task(config, dataset)
    with open_logger(run, folder) as logger:
        works = {
            "loop": Work(functools.partial(train_steps, run, folder, logger), batch, config.log_every),
            "bare": bare_step(run),
            "classic": Work(functools.partial(trainer.steps, batches), batch),
        }
        rates = measure_speeds(works, args.seconds, args.rounds, device)
        shares = _shares(run, folder, logger)
    rows = comparison_rows(rates, "classic", "bare")
    text = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    return Outcome(rows, {"shares": shares}, [f"of the loop, taken apart: {text}"])


def _shares(run: ClassificationTask, folder: Path, logger: MetricsLogger) -> dict[str, float]:
    """The fraction of time of each part of the loop, between two logged points, with a wait for each part."""
    batches, clock, seconds = run.batches(), Clock(run.iteration), dict.fromkeys(("data", "step", "record"), 0.0)
    lr, batch = run.learning_rate(), next(batches)

    def fetch() -> None:
        nonlocal batch
        batch = next(batches)

    for _ in range(run.config.log_every):
        seconds["data"] += measure_seconds(fetch, run.device)
        seconds["step"] += measure_seconds(lambda: run.step(batch, lr), run.device)
        seconds["record"] += measure_seconds(logger.bar.update, run.device)
    with contextlib.redirect_stdout(io.StringIO()):
        seconds["record"] += measure_seconds(lambda: log_training(run, folder, logger, clock, lr), run.device)
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def evaluation(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """A pass over the test images against the classic one."""
    dataset = memory_dataset(config)
    size, batch = dataset.sizes["test"], pick_eval_batch(config, device)
    trainer = baseline.Trainer(build_network(config, len(dataset.classes)), device)
    batches = baseline.loader(dataset.parts["test"], batch, device, train=False)
    run = build_task(config, dataset)

    def evaluate(count: int) -> None:
        for _ in range(count):
            count_errors(run.model, dataset.eval_batches("test", run.mean, device, batch), run.precision, size)

    def evaluate_baseline(count: int) -> None:
        for _ in range(count):
            trainer.evaluate(batches)

    works = {"ours": Work(evaluate, size), "classic": Work(evaluate_baseline, size)}
    rates = measure_speeds(works, args.seconds, args.rounds, device)
    rows = comparison_rows(rates, "classic")
    return Outcome(rows, {"images": size}, [f"a pass: {size} images in batches of {batch}"])


def _title(args: BenchConfig, config: Config, device: torch.device) -> str:
    data = "random images" if is_synthetic(config) else config.data_label
    processor_name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"resnet-bench {args.bench}: {config.net}, batch {config.batch_size}, {config.precision}"
        f" {'compiled' if config.compile else 'eager'}, {data}, {device} ({processor_name}),"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds"
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

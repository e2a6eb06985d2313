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
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet_train.bench import baseline
from resnet_train.bench.synthetic import SyntheticDataset
from resnet_train.bench.timing import (
    SPEED,
    Work,
    clocked,
    compared,
    environment,
    in_new_process,
    interleaved,
    row,
    speeds,
    spread,
    table,
    threads,
)
from resnet_train.classification.evaluate import count_errors
from resnet_train.classification.load import open_dataset, pick_compile, pick_eval_batch
from resnet_train.classification.run import build
from resnet_train.classification.step import step
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.commands import BenchConfig
from resnet_train.config.layout import is_packed
from resnet_train.config.train import Config
from resnet_train.data.decode import decode
from resnet_train.data.imagefolder import ImageSource, open_image_splits
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.sampler import generator
from resnet_train.data.streaming import StreamingDataset, random_views
from resnet_train.data.views import Batches
from resnet_train.engine.compute import pick_device, pick_precision
from resnet_train.engine.environment import git_commit, memory_held, peak_memory, processor, versions
from resnet_train.engine.logger import MetricsLogger
from resnet_train.engine.loop import Clock, Stop, log_training, loop
from resnet_train.errors import RunError
from resnet_train.files import check_result, expand, write_result
from resnet_train.models.build import build_network
from resnet_train.models.compile import compile_network
from resnet_train.terminal import say


class Outcome(NamedTuple):
    """What a sub-benchmark found: rows of the table, the first of which is ours, further values, and lines to read."""

    rows: list[dict[str, Any]]
    values: dict[str, Any]
    notes: list[str]


def bench(asked: BenchConfig, config: Config) -> None:
    """Run one sub-benchmark; print its table and write the JSON. Raises UserError and RunError."""
    out = expand(asked.out) if asked.out is not None else None
    if out is not None:
        check_result(out)
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
        "settings": {**dataclasses.asdict(asked), "random_images": _is_made_up(config), "config": config.plain()},
    }
    write_result(out, result)


# --- What is timed ---------------------------------------------------------------------------------------------------


def _is_made_up(config: Config) -> bool:
    return config.data.root is None and config.data.name != "digits"


def sets_of(config: Config) -> MemoryDataset | StreamingDataset:
    """The data that the configuration names, or random images where it names no place."""
    return (
        SyntheticDataset(family=config.data.family, size=config.data.size)
        if _is_made_up(config)
        else open_dataset(config)
    )


def in_memory(config: Config) -> MemoryDataset:
    """The same; check_bench has seen to it that it is a set in memory."""
    dataset = sets_of(config)
    assert isinstance(dataset, MemoryDataset)
    return dataset


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with other values."""
    return dataclasses.replace(config, **changes)


def opened(config: Config, dataset: MemoryDataset | StreamingDataset) -> ClassificationTask:
    """A task ready to train, as resnet-train would build it."""
    run = build(config, dataset)
    run.compiled = pick_compile(config, run.device) and compile_network(run.model, config.depth, run.device)
    return run


def batches_of(run: ClassificationTask) -> Batches:
    """The run's augmented batches, without end."""
    augment = dataclasses.asdict(run.config.augment)
    return run.dataset.train_batches(
        run.mean, run.device, seed=run.config.seed, batch_size=run.config.batch_size, augment=augment, start=0
    )


def bare(run: ClassificationTask, images: Tensor, labels: Tensor) -> Work:
    """Our step on one batch."""

    def do(count: int) -> None:
        for _ in range(count):
            step(run, images, labels, run.learning_rate())

    return Work(do, len(images))


class _Until(Stop):
    """Ends the loop after so many iterations."""

    def __init__(self, run: ClassificationTask, count: int) -> None:
        self.run, self.end = run, run.iteration + count

    def agreed(self) -> bool:
        return self.run.iteration >= self.end


def trained(run: ClassificationTask, folder: Path, logger: MetricsLogger, count: int) -> None:
    """So many iterations of the training loop, without a checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):
        loop(run, folder, logger, Clock(run.iteration), _Until(run, count), saved_at=run.iteration + count)


@contextlib.contextmanager
def recording(run: ClassificationTask, folder: Path) -> Iterator[MetricsLogger]:
    """The record of a run, as it is where there is no terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        logger = MetricsLogger(folder, {"data": "bench", "seed": run.config.seed}, 0, run.config.iterations)
    try:
        yield logger
    finally:
        logger.close()


# --- The six ---------------------------------------------------------------------------------------------------------


def steps(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """The step on one batch, as configured and in other precisions, against the classic step; first steps apart."""
    kinds = [(config.precision, config.compile), ("fp32", False), ("bf16", False), ("bf16", config.compile)]
    dataset, works = sets_of(config), {}
    for precision, compiled in dict.fromkeys(kinds):
        run = opened(changed(config, precision=precision, compile=compiled), dataset)
        images, labels = next(batches_of(run))
        works[f"{precision} {'compiled' if run.compiled else 'eager'}"] = bare(run, images, labels)
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
            "bare": bare(run, *next(batches_of(run))),
            "classic": Work(functools.partial(trainer.steps, batches), batch),
        }
        found = speeds(works, asked.seconds, asked.rounds, device)
        shares = _shares(run, folder, logger)
    rows = compared(found, "classic", "bare")
    text = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    return Outcome(rows, {"shares": shares}, [f"of the loop, taken apart: {text}"])


def _shares(run: ClassificationTask, folder: Path, logger: MetricsLogger) -> dict[str, float]:
    """What the parts of the loop take of it, from one logged point to the next, each waited for."""
    batches, clock, spent = batches_of(run), Clock(run.iteration), dict.fromkeys(("data", "step", "record"), 0.0)
    lr, batch = run.learning_rate(), list(next(batches_of(run)))

    def fetch() -> None:
        batch[:] = next(batches)

    for _ in range(run.config.log_every):
        spent["data"] += clocked(fetch, run.device)
        spent["step"] += clocked(lambda: step(run, batch[0], batch[1], lr), run.device)
        spent["record"] += clocked(logger.bar.update, run.device)
    with contextlib.redirect_stdout(io.StringIO()):
        spent["record"] += clocked(lambda: log_training(run, folder, logger, clock, lr), run.device)
    return {name: seconds / sum(spent.values()) for name, seconds in spent.items()}


def loader(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """Augmentation on one core against torchvision's transforms of one image at a time, and its share of a step."""
    if config.data.family == "imagenet":
        return decoding(asked, config)
    dataset = in_memory(config)
    pictures = baseline.TransformedImages(dataset.parts["train"], train=True)
    places = itertools.cycle(range(len(pictures)))
    run = opened(config, dataset)
    batches, batch = batches_of(run), config.batch_size

    def augment(count: int) -> None:
        for _ in range(count):
            next(batches)

    def transform(count: int) -> None:
        for _ in range(count * batch):
            pictures[next(places)]

    ours, theirs = Work(augment, batch), Work(transform, batch)
    works = {"ours, one thread": _on_one_thread(ours), "classic, one thread": _on_one_thread(theirs)}
    works |= {"ours": ours, "bare": bare(run, *next(batches))}
    found = speeds(works, asked.seconds, asked.rounds, device)
    one, other, all_threads, step_ = found.values()
    rows = [
        row("ours, one thread", SPEED, one, classic=other),
        row("classic, one thread", SPEED, other),
        row("ours, all threads", SPEED, all_threads, bare=step_),
        row("bare", SPEED, step_),
    ]
    share = spread([slow / fast for slow, fast in zip(step_, all_threads, strict=True)])
    note = f"share of a step: {share['median']:.2%} ({share['min']:.2%} to {share['max']:.2%})"
    return Outcome(rows, {"share_of_step": share["median"]}, [note])


def decoding(asked: BenchConfig, config: Config) -> Outcome:
    """Photographs in a DataLoader's worker, from files and packed, against torchvision's recipe and decoding alone.

    Images per second of one core: of the worker's own time, whatever else the machine does.
    """
    size, batch, seed = config.data.size, config.batch_size, config.seed
    augment = dataclasses.asdict(config.augment)
    parts = {
        "packed" if is_packed(root) else "files": open_image_splits(root).train
        for root in (config.data.root, asked.packed)
        if root is not None
    }
    first = next(iter(parts))
    loaders = {}
    for name, part in parts.items():
        loaders[f"ours, {name}"] = functools.partial(random_views, part, size, seed, batch, augment)
    loaders[f"classic, {first}"] = functools.partial(_whole, baseline.TransformedPhotographs(parts[first], size), batch)
    for name, part in parts.items():
        loaders[f"decoding alone, {name}"] = functools.partial(_whole, _Decoded(part), batch)
    found = interleaved({name: _per_core(make, batch, asked.seconds) for name, make in loaders.items()}, asked.rounds)
    reference, alone = found[f"classic, {first}"], found[f"decoding alone, {first}"]
    rows = [row(name, SPEED, values, classic=reference, decoding=alone) for name, values in found.items()]
    values = {f"ratio_of_{name}": r["ratios"]["classic"]["median"] for name, r in zip(parts, rows, strict=False)}
    images = ", ".join(f"{len(part)} ({name})" for name, part in parts.items())
    return Outcome(rows, values, [f"of one core, a worker's own time, batches of {batch}; images: {images}"])


def _per_core(make: Callable[[int], DataLoader], batch: int, seconds: float) -> Callable[[], float]:
    """Measures images per second of a worker process' own time, over about `seconds` of it."""

    def spent(count: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in make(count):
            pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended: the loader's worker
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    spent(1)
    count = max(1, round(seconds / (spent(3) - spent(1)) * 2))
    return lambda: count * batch / spent(count)


class _Decoded(Dataset[int]):
    """Decodes photographs and gives nothing."""

    def __init__(self, part: ImageSource) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> int:
        name, data, label = self.part.read(index)
        decode(data, name)
        return label


def _whole(data: Dataset[Any], batch: int, count: int) -> DataLoader:
    """`count` batches of a data set, shuffled, over and over."""
    order = torch.randint(len(data), (count, batch), generator=generator(0, "bench", count))  # type: ignore[arg-type]
    return DataLoader(data, batch_sampler=order.tolist(), num_workers=1)


def _on_one_thread(work: Work) -> Work:
    def do(count: int) -> None:
        with threads(1):
            work.do(count)

    return work._replace(do=do)


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
        clocked(lambda: bare(run, *next(batches_of(run))).do(1), run.device)
    return time.perf_counter()


def memory(asked: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """Memory over that at the start, in a process for each way to train, and the speed of their steps in this one."""
    ways = {
        "checkpointing": changed(config, activation_checkpointing=True),
        "plain": changed(config, activation_checkpointing=False),
    }
    held = {name: in_new_process(_memory, way, asked.steps) for name, way in ways.items()}
    dataset = sets_of(config)
    runs = {name: opened(way, dataset) for name, way in ways.items()}
    batch = next(batches_of(runs["plain"]))
    found = speeds({name: bare(run, *batch) for name, run in runs.items()}, asked.seconds, asked.rounds, device)
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


def _title(asked: BenchConfig, config: Config, device: torch.device) -> str:
    data = "random images" if _is_made_up(config) else config.data_label
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

"""Benchmarks of data loading, against torchvision's transforms."""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from resnet_train.bench import baseline
from resnet_train.bench.subject import Outcome, bare_step, build_task, memory_dataset, train_batches
from resnet_train.bench.timing import (
    SPEED,
    Work,
    measure_speeds,
    row,
    run_interleaved,
    spread,
    threads,
)
from resnet_train.config.commands import BenchConfig
from resnet_train.config.layout import is_packed
from resnet_train.config.train import Config
from resnet_train.data.decode import decode
from resnet_train.data.imagefolder import ImageSource, open_image_splits
from resnet_train.data.sampler import generator
from resnet_train.data.streaming import random_views
from resnet_train.data.views import BatchOrder


def loader(args: BenchConfig, config: Config, folder: Path, device: torch.device) -> Outcome:
    """Augmentation on one core, against torchvision's transforms of one image at a time, and its share of a step."""
    if config.data.family == "imagenet":
        return decoding(args, config)
    dataset = memory_dataset(config)
    transformed = baseline.TransformedImages(dataset.parts["train"], train=True)
    indices = itertools.cycle(range(len(transformed)))
    run = build_task(config, dataset)
    batches, batch = train_batches(run), config.batch_size

    def augment(count: int) -> None:
        for _ in range(count):
            next(batches)

    def transform(count: int) -> None:
        for _ in range(count * batch):
            transformed[next(indices)]

    our_work, classic_work = Work(augment, batch), Work(transform, batch)
    works = {"ours, one thread": _on_one_thread(our_work), "classic, one thread": _on_one_thread(classic_work)}
    works |= {"ours": our_work, "bare": bare_step(run)}
    rates = measure_speeds(works, args.seconds, args.rounds, device)
    one_thread, classic, all_threads, step = rates.values()
    rows = [
        row("ours, one thread", SPEED, one_thread, classic=classic),
        row("classic, one thread", SPEED, classic),
        row("ours, all threads", SPEED, all_threads, bare=step),
        row("bare", SPEED, step),
    ]
    share = spread([slow / fast for slow, fast in zip(step, all_threads, strict=True)])
    note = f"share of a step: {share['median']:.2%} ({share['min']:.2%} to {share['max']:.2%})"
    return Outcome(rows, {"share_of_step": share["median"]}, [note])


def decoding(args: BenchConfig, config: Config) -> Outcome:
    """Photographs in a DataLoader's worker, from files and packed, against torchvision's transforms and pure decoding.

    Images per second of CPU time of the worker, independent of other processes.
    """
    size, batch = config.data.size, config.batch_size
    order = BatchOrder(config.seed, batch, config.augment)
    parts = {
        "packed" if is_packed(root) else "files": open_image_splits(root).train
        for root in (config.data.root, args.packed)
        if root is not None
    }
    first = next(iter(parts))
    loaders = {}
    for name, part in parts.items():
        loaders[f"ours, {name}"] = functools.partial(random_views, part, size, order)
    loaders[f"classic, {first}"] = functools.partial(_whole, baseline.TransformedPhotographs(parts[first], size), batch)
    for name, part in parts.items():
        loaders[f"decoding alone, {name}"] = functools.partial(_whole, _Decoded(part), batch)
    rates = run_interleaved({name: _per_core(make, batch, args.seconds) for name, make in loaders.items()}, args.rounds)
    reference, decoding_rates = rates[f"classic, {first}"], rates[f"decoding alone, {first}"]
    rows = [row(name, SPEED, values, classic=reference, decoding=decoding_rates) for name, values in rates.items()]
    values = {f"ratio_of_{name}": r["ratios"]["classic"]["median"] for name, r in zip(parts, rows, strict=False)}
    images = ", ".join(f"{len(part)} ({name})" for name, part in parts.items())
    return Outcome(rows, values, [f"of one core, a worker's own time, batches of {batch}; images: {images}"])


def _per_core(make: Callable[[int], DataLoader], batch: int, seconds: float) -> Callable[[], float]:
    """A function that measures images per second of a worker's CPU time, over `seconds` of it or more."""

    def spent(count: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in make(count):
            pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # includes the loader's worker, which has ended
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    start, count = spent(1), 1  # mostly that of the worker itself
    while spent(count) - start < seconds:
        count *= 2
    return lambda: count * batch / spent(count)


class _Decoded(Dataset[int]):
    """Photographs that are decoded and then dropped."""

    def __init__(self, part: ImageSource) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> int:
        name, data, label = self.part.read(index)
        decode(data, name)
        return label


def _whole(data: Dataset[Any], batch: int, count: int) -> DataLoader:
    """A loader of `count` random batches of a data set."""
    order = torch.randint(len(data), (count, batch), generator=generator(0, "bench", count))  # type: ignore[arg-type]
    return DataLoader(data, batch_sampler=order.tolist(), num_workers=1)


def _on_one_thread(work: Work) -> Work:
    def do(count: int) -> None:
        with threads(1):
            work.do(count)

    return work._replace(do=do)

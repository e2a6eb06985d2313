"""The code under measurement: a task as resnet-train builds it, its step and its loop."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from resnet_train.bench.synthetic import SyntheticDataset
from resnet_train.bench.timing import (
    Work,
)
from resnet_train.classification.load import open_dataset, pick_compile
from resnet_train.classification.run import build, compile_task
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.train import Config
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import Batches, BatchOrder
from resnet_train.engine.logger import MetricsLogger
from resnet_train.engine.loop import Clock, Stop, loop


class Outcome(NamedTuple):
    """The result of a benchmark: rows of the table, the first of which is ours, further values, and lines to print."""

    rows: list[dict[str, Any]]
    values: dict[str, Any]
    notes: list[str]


def is_synthetic(config: Config) -> bool:
    """Whether random images are used, as the configuration names no data."""
    return config.data.root is None and config.data.name != "digits"


def make_dataset(config: Config) -> MemoryDataset | StreamingDataset:
    """The data of the configuration, or random images if it names none."""
    return (
        SyntheticDataset(family=config.data.family, size=config.data.size)
        if is_synthetic(config)
        else open_dataset(config)
    )


def memory_dataset(config: Config) -> MemoryDataset:
    """The same, for a configuration that check_bench has limited to data in memory."""
    dataset = make_dataset(config)
    assert isinstance(dataset, MemoryDataset)
    return dataset


def build_task(config: Config, dataset: MemoryDataset | StreamingDataset) -> ClassificationTask:
    """A task ready to train, as resnet-train builds it."""
    run = build(config, dataset)
    if pick_compile(config, run.device):
        compile_task(run)
    return run


def train_batches(run: ClassificationTask) -> Batches:
    """The run's endless augmented batches."""
    order = BatchOrder(run.config.seed, run.config.batch_size, run.config.augment)
    return run.dataset.train_batches(run.mean, run.device, order)


def bare_step(run: ClassificationTask) -> Work:
    """Our step on a single batch, as in the loop; on a GPU it is captured and includes augmentation."""
    batch = next(run.batches())

    def do(count: int) -> None:
        for _ in range(count):
            run.step(batch, run.learning_rate())

    return Work(do, run.config.batch_size)


class _Until(Stop):
    """Ends the loop after `count` iterations."""

    def __init__(self, run: ClassificationTask, count: int) -> None:
        self.run, self.end = run, run.iteration + count

    def agreed(self) -> bool:
        return self.run.iteration >= self.end


def train_steps(run: ClassificationTask, folder: Path, logger: MetricsLogger, count: int) -> None:
    """Run `count` iterations of the training loop, without a checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):
        loop(run, folder, logger, Clock(run.iteration), _Until(run, count), saved_at=run.iteration + count)


@contextlib.contextmanager
def open_logger(run: ClassificationTask, folder: Path) -> Iterator[MetricsLogger]:
    """The logger of a run, as without a terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        logger = MetricsLogger(folder, {"data": "bench", "seed": run.config.seed}, 0, run.config.iterations)
    try:
        yield logger
    finally:
        logger.close()

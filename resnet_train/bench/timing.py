"""Timing of jobs that take turns, round by round, and the table of results."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from resnet_train.errors import RunError

SPEED = "images/s"


class Work(NamedTuple):
    """Work to time: `do(n)` repeats it n times, n a multiple of `least`; each time processes `images` images."""

    do: Callable[[int], Any]
    images: int
    least: int = 1


def measure_seconds(job: Callable[[], Any], device: torch.device) -> float:
    """The run time of `job` in seconds, including the work that it has started on the device."""
    _wait(device)
    start = time.perf_counter()
    job()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_interleaved(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The results of each job in each round, in the order A B C A B C …, so that changes of speed affect all jobs."""
    results: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for name, job in jobs.items():
            results[name].append(job())
    return results


def measure_speeds(works: dict[str, Work], seconds: float, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Images per second of each work in each round, measured for about `seconds`.

    Before every measurement it is done once untimed, for compilation and memory, and so that it is not affected by the
    previous work (caches, workers that still read ahead).
    """

    def prepare(work: Work) -> Callable[[], float]:
        work.do(1)
        each = measure_seconds(lambda: work.do(1), device)
        count = math.ceil(seconds / each / work.least) * work.least

        def measure() -> float:
            work.do(1)
            return count * work.images / measure_seconds(lambda: work.do(count), device)

        return measure

    return run_interleaved({name: prepare(work) for name, work in works.items()}, rounds)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch's threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def in_new_process(job: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `job` in a new process. Raises RunError if it is killed."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(job, *arguments).result()
        except BrokenProcessPool as error:
            raise RunError("the process that was measured was killed; is there enough memory?") from error


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and maximum, and the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def row(name: str, unit: str, values: Sequence[float], **references: Sequence[float]) -> dict[str, Any]:
    """A row of the table, with its ratio to each reference, round by round."""
    ratios = {
        reference: spread([value / other for value, other in zip(values, others, strict=True)])
        for reference, others in references.items()
    }
    return {"name": name, "unit": unit, **spread(values), "ratios": ratios}


def comparison_rows(rates: dict[str, list[float]], *references: str) -> list[dict[str, Any]]:
    """A row for each work, with the ratios of its rates to those of the `references`."""
    return [row(name, SPEED, values, **{other: rates[other] for other in references}) for name, values in rates.items()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as aligned lines under a heading."""
    references = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    lines = [["", "median", "min", "max", "", *(f"/ {name}" for name in references)]]
    for row in rows:
        ratios = [row["ratios"].get(name) for name in references]
        cells = [f"{r['median']:.3g} ({r['min']:.3g} to {r['max']:.3g})" if r else "" for r in ratios]
        lines.append([row["name"], *(_number(row[key]) for key in ("median", "min", "max")), row["unit"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 4)  # names and units
    return [
        "  ".join(
            w.ljust(n) if i in left else w.rjust(n) for i, (w, n) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

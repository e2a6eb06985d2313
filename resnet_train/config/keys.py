"""Marks for the fields of configurations, as in Annotated[int, Range(1, 100), Free()].

Also the marked types of keys that several commands have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """The range of a number, or of each in a list: `low` (excluded if `above`) to `high` (excluded if `below`)."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False


@dataclass(frozen=True)
class Free:
    """May change when a run is resumed, since it does not affect the mathematics.

    The exceptions are batch norm's statistics with bn_images=device; then a note is printed.
    """


@dataclass(frozen=True)
class Unnamed:
    """Does not affect what is learned: like a Free key it is not part of the name of a run's folder."""


@dataclass(frozen=True)
class StoredAs:
    """Affects neither the results of a run nor its division among devices: checkpoints have `value` in its place."""

    value: Any


@dataclass(frozen=True)
class Counted:
    """A number of iterations, multiplied by scale=."""


class OnlyFor:
    """Used by these families, kinds or commands only; refused for others if given on the command line."""

    def __init__(self, *readers: str) -> None:
        self.readers = frozenset(readers)


class Alias:
    """Names of the key in other programs."""

    def __init__(self, *names: str) -> None:
        self.names = names


LARGEST_BATCH = 10**6

# The data.
Root = Annotated[str | None, Free()]
Broken = Annotated[Literal["stop", "skip"], Free()]
IMAGE_SIZE = Range(8, 1024)
ShorterSide = Annotated[int, Range(8, 4096)]
Quality = Annotated[int, Range(1, 100)]
ShardImages = Annotated[int, Range(1, 100_000)]

# The machine.
Device = Annotated[Literal["auto", "cpu", "cuda"], Free()]
Devices = Annotated[int | Literal["auto"], Range(1, 100_000), Free(), Alias("gpus")]
Timeout = Annotated[int, Range(1, 10**6), Free(), StoredAs(600)]
MaxRestarts = Annotated[int, Range(0, 1000), Free(), StoredAs(0)]

# A run.
Depth = Annotated[int, Range(high=100_000)]  # further checked by check_depth
Seed = Annotated[int, Range(0, 2**63 - 1)]
RunDir = Annotated[str | None, Free(), StoredAs(None)]
InitFrom = Annotated[str | None, Alias("pretrained", "weights")]
Iterations = Annotated[int, Range(1, 10**9), Counted(), Alias("epochs")]
Interval = Annotated[int, Range(1), Counted()]
LoggingInterval = Annotated[Interval, Unnamed()]
CheckpointEvery = Annotated[Interval, Free()]
KeepEvery = Annotated[int, Range(0), Counted(), Free()]
BatchSize = Annotated[int, Range(1, LARGEST_BATCH)]
LearningRate = Annotated[float, Range(0, above=True), Alias("learning_rate")]
Drops = Annotated[list[float], Range(0, 1)]
Momentum = Annotated[float, Range(0, 1, below=True)]
WeightDecay = Annotated[float, Range(0)]

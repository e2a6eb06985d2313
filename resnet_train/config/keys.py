"""What is known of a key, as marks at its field: Annotated[int, Range(1, 100), Free()].

And the types, with their marks, of keys that several commands have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """What a number, or each of a list, may be: from `low` to `high`, themselves left out where `above` and `below`."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False


@dataclass(frozen=True)
class Free:
    """May differ between a run and its continuation, as it does not enter the mathematics.

    But for batch norm's statistics where bn_images=device leaves them to the devices; then a note is printed.
    """


@dataclass(frozen=True)
class Unnamed:
    """Changes nothing that is learned: it stays out of the name of a run's folder, as a Free key does."""


@dataclass(frozen=True)
class StoredAs:
    """Has no say in what a run computes, nor in how it is dealt to devices: checkpoints hold `value` in its place."""

    value: Any


@dataclass(frozen=True)
class Counted:
    """Counts iterations: scale= multiplies it."""


class OnlyFor:
    """Read for these families, kinds or commands only, and refused when asked for elsewhere."""

    def __init__(self, *readers: str) -> None:
        self.readers = frozenset(readers)


class Alias:
    """What other programs call the key."""

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
Depth = Annotated[int, Range(high=100_000)]  # check_depth says which there are
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

"""The types of the keys that several commands have, with what is known of each."""

from __future__ import annotations

from typing import Annotated, Literal

from resnet_train.config.schema import Alias, Counted, Free, Range, StoredAs

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
CheckpointEvery = Annotated[Interval, Free()]
KeepEvery = Annotated[int, Range(0), Counted(), Free()]
BatchSize = Annotated[int, Range(1, LARGEST_BATCH)]
LearningRate = Annotated[float, Range(0, above=True), Alias("learning_rate")]
Drops = Annotated[list[float], Range(0, 1)]
Momentum = Annotated[float, Range(0, 1, below=True)]
WeightDecay = Annotated[float, Range(0)]

"""The learning rate as a function of the iteration, and the state of warm-up and plateau, which depend on errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Progress:
    """The state of warm-up and plateau; saved in the checkpoint."""

    warm: bool  # still warming up
    recent: int = 0  # wrong answers from the last check of the warm-up up to the last logged point
    dropped: int = 0  # drops that the plateau has made
    best: float = math.inf  # the lowest error so far, in %
    best_at: int = 0  # its iteration


def learning_rate(
    iteration: int,
    iterations: int,
    progress: Progress,
    *,
    name: str,
    lr: float,
    warmup_lr: float,
    factor: float = 1.0,
    drops: Sequence[float] = (),
) -> float:
    """The learning rate of the step after `iteration` steps, in a run of `iterations`.

    step, and thirds (with other drops): `lr` times `factor` for each of `drops` passed (fractions of `iterations`;
    section 4.2: 0.5 and 0.75 of 64k).
    plateau: times `factor` for each drop made so far (section 3.4). cosine: half a cosine from `lr` to zero.
    In all of them: `warmup_lr` during the warm-up (section 4.2, 110 layers).
    """
    if progress.warm:
        return warmup_lr
    if name == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    if name == "plateau":
        return lr * factor**progress.dropped
    assert name == "step"
    return lr * factor ** sum(iteration >= max(1, round(drop * iterations)) for drop in drops)


def end_warmup(progress: Progress, iteration: int, train_error: float, *, below: float, at_least: int) -> None:
    """End the warm-up when the training error (%) is below `below`, not before iteration `at_least`.

    Section 4.2: 80 %, which took the paper about 400 iterations.
    """
    progress.warm = progress.warm and not (train_error < below and iteration >= at_least)
    progress.recent = progress.recent if progress.warm else 0


def watch_plateau(progress: Progress, iteration: int, error: float, *, patience: float, threshold: float) -> None:
    """Record the watched error (%); drop when it has not fallen by `threshold` points for `patience` iterations."""
    if error < progress.best - threshold:
        progress.best, progress.best_at = error, iteration
    elif progress.warm:
        progress.best_at = iteration  # patience counts from the end of the warm-up
    elif iteration - progress.best_at >= patience:
        progress.dropped += 1
        progress.best_at = iteration

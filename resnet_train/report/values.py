"""What a run's files hold, taken for data: JSON, words and numbers of a known form, and text that may be shown."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_train import terminal
from resnet_train.engine.metrics import read_metrics
from resnet_train.errors import UserError

LONGEST = 4000  # characters of a string in a run's files
SMALL = 1000  # test images; of fewer a figure says little
# What values of another type, form or depth than a run's files have make of the code that reads them.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def escape_and_clip(text: str) -> str:
    """Text of a file as it may be shown: control characters and lone surrogates escaped, and not endless.

    So are backticks, which in a report's own words are around code.
    """
    shown = terminal.printable(text[:LONGEST]).replace("`", "\\x60")
    return shown + ("…" if len(text) > LONGEST else "")


@contextlib.contextmanager
def reading(folder: Path, command: str) -> Iterator[None]:
    """Around the reading of a run's files. Raises UserError for what is not theirs."""
    try:
        yield
    except MALFORMED as error:
        reason = escape_and_clip(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"{folder}: holds other things than a run of {command} leaves ({reason})") from error


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """The points of a run's metrics. Raises UserError."""
    path = folder / "metrics.jsonl"
    try:
        return read_metrics(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def word(value: Any) -> str:
    """A string of a run's files, as it may be shown. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return escape_and_clip(value)


def test_images(count: int) -> str:
    """So many test images, in words."""
    return f"{count:,} test image{'s' if count != 1 else ''}" + (", a small set" if count < SMALL else "")


def number(value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """A finite number of a run's files. Raises TypeError and ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.100} is no number")
    if not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"{value!r:.100} is not from {least:g} to {most:g}")
    return value


def whole(value: Any, least: int = 0, most: int = 2**63) -> int:
    """A whole number of a run's files. Raises TypeError and ValueError."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r:.100} is no whole number")
    return int(number(value, least, most))


def plain(value: Any) -> Any:
    """A value of a configuration: a number, a word, nothing, or a list of those. Raises TypeError and ValueError."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool):
        return value
    return word(value) if isinstance(value, str) else number(value, -math.inf)

"""Read values from a run's files, which anyone may have written: checked for type and range, text escaped."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_train import terminal
from resnet_train.engine.metrics import read_metrics
from resnet_train.errors import UserError

LONGEST = 4000  # characters of a string in a run's files
SMALL = 1000  # a test of fewer images is marked as small
# What the reading of a run raises where values have another type, form or depth than expected.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def escape_and_clip(text: str) -> str:
    """Text from a file, safe to show: control characters and lone surrogates escaped, the length limited.

    Backticks are escaped too: in the report's own text they enclose code.
    """
    escaped = terminal.printable(text[:LONGEST]).replace("`", "\\x60")
    return escaped + ("…" if len(text) > LONGEST else "")


@contextlib.contextmanager
def reading(path: Path, author: str) -> Iterator[None]:
    """Turn errors from reading a malformed file that `author` should have written, or its folder, into a UserError."""
    try:
        yield
    except MALFORMED as error:
        reason = escape_and_clip(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"{path}: holds other things than {author} leaves ({reason})") from error


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """The points of a run's metrics. Raises UserError."""
    path = folder / "metrics.jsonl"
    try:
        return read_metrics(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def word(value: Any) -> str:
    """A string from a run's files, safe to show. Raises TypeError for other types."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return escape_and_clip(value)


def devices(environment: dict[str, Any]) -> str:
    """The device of a run and, first, those on which it was before it was resumed. Raises TypeError."""
    names = [word(one.get("device", "")) for one in [*environment.get("before", []), environment]]
    return ", then ".join(name for name, _ in itertools.groupby(filter(None, names)))


def used_precision(recorded: dict[str, Any]) -> dict[str, str]:
    """The precision that a run was with, also of precision=auto, by its key; nothing where it is not recorded."""
    precision = recorded.get("precision") or (recorded.get("measure") or {}).get("precision")
    return {"precision": word(precision)} if precision else {}


def resolve_auto(settings: list[dict[str, Any]]) -> None:
    """Give runs that do not record what precision=auto came to that of the only runs whose setting is else the same."""
    for setting in (setting for setting in settings if setting["precision"] == "auto"):
        alike = {other["precision"] for other in settings if other | {"precision": "auto"} == setting}
        if len(alike - {"auto"}) == 1:
            (setting["precision"],) = alike - {"auto"}


def describe_test(error: float, so_far: str = "") -> str:
    """A run's test error in words; NaN: there is none yet."""
    return "not yet tested" if math.isnan(error) else f"test error{so_far} {error:.2f} %"


def test_images(count: int) -> str:
    """The number of test images, as text."""
    return f"{count:,} test image{'s' if count != 1 else ''}" + (", a small set" if count < SMALL else "")


def number(value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """A finite number from a run's files, from `least` to `most`. Raises TypeError and ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.100} is no number")
    if not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"{value!r:.100} is not from {least:g} to {most:g}")
    return value


def whole(value: Any, least: int = 0, most: int = 2**63) -> int:
    """A whole number from a run's files. Raises TypeError and ValueError."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r:.100} is no whole number")
    return int(number(value, least, most))


def config_value(value: Any) -> Any:
    """A value from a configuration: a number, a string, None, or a list of these. Raises TypeError and ValueError."""
    if isinstance(value, list):
        return [config_value(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    return word(value) if isinstance(value, str) else number(value, -math.inf)

"""The metrics file of a run: a line of JSON for each point of its curves. Needs no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from resnet_train.files import read_regular
from resnet_train.terminal import say

SPLITS = ("train", "val", "test")
WORDS = ("split", "data", "protocol")  # keys of a line whose values are strings; all other values are numbers
LARGEST = 2**30  # bytes of a metrics file: more than three million lines
MOST = {"iteration": 2**63, "error": 100, "error5": 100, "seconds": sys.float_info.max}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The points in a metrics file; none if the file does not exist. Raises OSError.

    Nothing is computed from the curves, so invalid lines are left out, with one warning for all of them. An incomplete
    last line, of a run that is being written or was killed, is left out without a warning.
    """
    if not path.is_file():
        return []
    *lines, _ = read_regular(path, LARGEST).split(b"\n")
    points = [_point(line) for line in lines]
    if bad := [str(number) for number, point in enumerate(points, 1) if point is None]:
        numbers = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        damaged = f"line {numbers} is damaged and" if len(bad) == 1 else f"lines {numbers} are damaged and"
        say(f"warning: {path}: {damaged} left out")
    return [point for point in points if point is not None]


def count_replaced(metrics: list[dict[str, Any]]) -> int:
    """How often others stood in for broken training images, with data.broken=skip: each point has its own number."""
    return sum(point.get("skipped", 0) for point in metrics if point["split"] == "train")


def describe_replaced(count: int) -> str:
    """The same in words; empty if never."""
    times = "once" if count == 1 else f"{count:,} times"
    return f"broken training images were replaced by others {times}" if count else ""


def _point(line: bytes) -> dict[str, Any] | None:
    """The point in a line of a metrics file; None if the line is not JSON or a value has the wrong type or range."""
    try:
        point = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(point, dict) or type(point.get("iteration")) is not int or point.get("split") not in SPLITS:
        return None
    result = "loss" if point["split"] == "train" else "map07"  # of a detector, which has no error
    if "data" not in point or not point.keys() & {"error", result}:
        return None
    valid = all(isinstance(value, str) if key in WORDS else type(value) in (int, float) for key, value in point.items())
    valid = valid and point["iteration"] > 0 and all(0 <= point.get(key, 0) <= most for key, most in MOST.items())
    return point if valid else None

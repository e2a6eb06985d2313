"""The metrics file of a run: a line of JSON for each point of its curves. Needs no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from resnet_train.files import read_regular
from resnet_train.terminal import say

SPLITS = ("train", "val", "test")
WORDS = ("split", "data", "protocol")  # of a line of the metrics; all else in it are numbers
MOST = {"iteration": 2**63, "error": 100, "error5": 100, "seconds": sys.float_info.max}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The points in a metrics file; none where there is no such file. Raises OSError.

    The curves are a record and no part of what is computed: a line that is no point is left out, with one warning for
    all of them. Half a line at the end, of a run that is being written or was killed, is left out without one.
    """
    if not path.is_file():
        return []
    *lines, _ = read_regular(path).split(b"\n")
    found = [_point(line) for line in lines]
    if bad := [str(number) for number, point in enumerate(found, 1) if point is None]:
        numbers = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        damaged = f"line {numbers} is damaged and" if len(bad) == 1 else f"lines {numbers} are damaged and"
        say(f"warning: {path}: {damaged} left out")
    return [point for point in found if point is not None]


def _point(line: bytes) -> dict[str, Any] | None:
    """The point that a line of a metrics file holds, if it is one: everything in it has the type that it must."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("iteration")) is not int or found.get("split") not in SPLITS:
        return None
    result = "loss" if found["split"] == "train" else "map07"  # of a detector, which has no error
    if "data" not in found or not found.keys() & {"error", result}:
        return None
    fine = all(isinstance(value, str) if key in WORDS else type(value) in (int, float) for key, value in found.items())
    fine = fine and found["iteration"] > 0 and all(0 <= found.get(key, 0) <= most for key, most in MOST.items())
    return found if fine else None

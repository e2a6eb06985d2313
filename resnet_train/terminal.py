"""Output to a terminal. Names of files and classes may contain control characters, which are escaped."""

from __future__ import annotations

import math
import sys
from typing import TextIO


def printable(text: object) -> str:
    """`text` with control and other unprintable characters escaped: ESC as \\x1b, a line's end as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line and flush it."""
    print(printable(text), file=file or sys.stdout, flush=True)


def format_share(share: float) -> str:
    """A share from 0 to 1 in %, one near 1 with more digits to tell it from 1: 63.20 %, 99.9998 %, >99.9999 %."""
    if math.isnan(share):
        return "not a number"
    rest = 100 * (1 - share)
    if rest <= 0:
        return "100 %"
    if rest < 1e-4:
        return ">99.9999 %"
    return f"{100 * share:.{max(2, -math.floor(math.log10(rest)))}f} %"

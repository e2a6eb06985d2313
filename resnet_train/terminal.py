"""What a terminal is shown. Names of files and classes are anybody's, so that none of it may command the terminal."""

from __future__ import annotations

import sys
from typing import TextIO


def printable(text: object) -> str:
    """`text` with control characters, and all else that is not seen, escaped: ESC as \\x1b, a line's end as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line, at once."""
    print(printable(text), file=file or sys.stdout, flush=True)

"""Quotes around the values of a command line that Hydra's grammar does not accept, or would take for numbers."""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from resnet_train.config.options import DATACLASSES
from resnet_train.config.schema import keys_taking

KEY = re.compile(r"[+~]*[A-Za-z_][\w./]*", re.ASCII)
PIECE = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]+""")  # of values with commas between them
TEXTS = keys_taking({str, list[str]}, *DATACLASSES)  # keys whose values are always text, even if they look like numbers


def quoted(text: str) -> str:
    """`text` in quotes, with escapes, so that Hydra reads it back unchanged."""
    return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text) + '"'


def as_text(item: str, sweep: bool) -> str:
    """An override, with quotes around values that Hydra's grammar does not accept: with ~, spaces, = or letters like ö.

    Also around numbers for a key that takes text, such as a folder 2026_11. In a sweep, commas separate values.
    """
    key, equals, value = item.partition("=")
    if not equals or not KEY.fullmatch(key) or key.lstrip("+~").partition(".")[0] == "hydra":
        return item
    content = value[1:-1] if value[:1] + value[-1:] == "[]" else value  # a list
    if content != value and _lists_texts(key, value):
        return item
    split = (sweep or content != value) and not set("[]{}()") & set(content)
    pieces = PIECE.findall(content) if split else [content]
    if ",".join(pieces) != content:
        pieces = [content]
    if _readable(key, value, sweep) and all(_readable(key, piece, sweep) for piece in pieces):
        return item
    pieces = [piece if _readable(key, piece, sweep) else quoted(piece) for piece in pieces]
    if content != value and len(pieces) == 1 and not split:  # a list of lists
        return f"{key}={quoted(value)}"
    joined = ",".join(pieces)
    return f"{key}=[{joined}]" if content != value else f"{key}={joined}"


def as_typed(item: str) -> str:
    """An override without the quotes that `as_text` has added to its value, and without Hydra's escapes in a sweep."""
    key, equals, value = item.partition("=")
    text = re.sub(r'\\(["\\])', r"\1", value[1:-1])
    return key + equals + (text if value == quoted(text) else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value))


def _lists_texts(key: str, value: str) -> bool:
    """Whether Hydra reads KEY=`value` as a list of texts, such as names in quotes of their own."""
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}").value()
    except (HydraException, ValueError, RecursionError):
        return False
    return isinstance(parsed, list) and all(isinstance(item, str) for item in parsed)


def _readable(key: str, value: str, sweep: bool) -> bool:
    """Whether Hydra can parse KEY=`value`, with the type that is meant."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except (HydraException, ValueError, RecursionError):
        return False
    if key.lstrip("+~") not in TEXTS:
        return True
    if override.is_sweep_override():
        return sweep
    parsed = override.value()
    return isinstance(parsed, bool) or not isinstance(parsed, (int, float))

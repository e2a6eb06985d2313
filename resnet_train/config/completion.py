"""Shell completion of values, in addition to Hydra's completion of keys and groups; no torch here."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from resnet_train.config.options import CONFIGS
from resnet_train.config.schema import types_of


def complete(name: str, line: str, short: Mapping[str, str]) -> list[str]:
    """Completions KEY=VALUE of the last word of the command line `line`, which must have a =.

    None for groups and for keys whose values are numbers or text.
    """
    typed, equals, prefix = line.split(" ")[-1].partition("=")
    key = short.get(f"{typed}=", f"{typed}=").removesuffix("=")
    hints: dict[str, Any] = {}
    for kind in CONFIGS.get(name, ()):
        hints = types_of(kind) | hints
    if not equals or key not in hints:
        return []
    return [f"{typed}={word}" for word in words_of(hints[key]) if word.startswith(prefix)]


def words_of(hint: Any) -> list[str]:
    """The words that are values of a type: those of Literal, true and false, and null."""
    if hint is bool:
        return ["true", "false"]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [str(word) for word in arguments]
    if origin is typing.Annotated:
        return words_of(arguments[0])
    words = [word for argument in arguments for word in words_of(argument)] if origin is not list else []
    return [*words, "null"] if words and type(None) in arguments else words

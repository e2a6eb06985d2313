"""From plain values to typed dataclasses; errors name the allowed values and the nearest right one.

Ranges and other properties of a key are marks of config.keys at its field.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from resnet_train.config.keys import Alias, OnlyFor, Range
from resnet_train.errors import UserError, nearest, nearest_data

RESUME = "auto, never or a checkpoint's file"  # the values of resume=

UNBOUNDED = Range()

T = TypeVar("T")


def format_value(value: Any) -> str:
    """A value as it is typed on the command line, at most 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace(", ", ",") if isinstance(value, list) else text
    return text if len(text) <= 60 else text[:57] + "..."


def coerce(key: str, value: Any, hint: Any, bounds: Range = UNBOUNDED) -> Any:
    """Convert `value` to the type `hint`; numbers must be within `bounds`, or a Range at the type. Raises UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        own = next((mark for mark in arguments if isinstance(mark, Range)), bounds)
        return coerce(key, value, arguments[0], own)
    if hint is Any:
        return value
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        near = (nearest_data if key == "data.name" else nearest)(str(value), arguments)
        raise UserError(f"{key}={format_value(value)}: allowed are {', '.join(arguments)}{near}")
    if origin in (typing.Union, types.UnionType):
        literals = [option for option in arguments if typing.get_origin(option) is Literal]
        words = [word for option in literals for word in typing.get_args(option)]
        if value in words or (value is None and type(None) in arguments):
            return value
        kind = {int: "a whole number", bool: "true, false"}.get(arguments[0])
        if words and kind and isinstance(value, str):
            raise UserError(
                f"{key}={format_value(value)}: must be {kind} or {' or '.join(words)}{nearest(value, words)}"
            )
        return coerce(key, value, arguments[0], bounds)
    if origin is list:
        if not isinstance(value, list):
            example = {int: "[256,480]", float: "[0.5,0.75]", str: "[one,two]"}.get(arguments[0])
            raise UserError(f"{key}={format_value(value)}: must be a list{f', such as {example}' if example else ''}")
        return [coerce(key, item, arguments[0], bounds) for item in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={format_value(value)}: must hold values of its own")
        return {name: coerce(f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, key + ".")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and number and (isinstance(value, int) or value.is_integer()):
        return _in_range(key, int(value), bounds)
    if hint is float and number and abs(value) <= sys.float_info.max:
        return _in_range(key, float(value), bounds)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and (isinstance(value, str) or number):
        text = str(value)
        if text.strip() and not re.search("[\0\ud800-\udfff]", text):  # no NUL, no surrogates from invalid UTF-8
            return text
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
    kind = RESUME if key == "resume" else kind
    raise UserError(f"{key}={format_value(value)}: must be {kind}")


def _in_range(key: str, value: float, bounds: Range) -> float:
    low, high = bounds.low, bounds.high
    text = f"{value:g}" if isinstance(value, float) else format_value(value)
    if low is not None and (value < low or (value == low and bounds.above)):
        raise UserError(f"{key}={text}: must be {'above' if bounds.above else 'at least'} {low}")
    if high is not None and (value > high or (value == high and bounds.below)):
        raise UserError(f"{key}={text}: must be {'below' if bounds.below else 'at most'} {high}")
    return value


def from_dict(kind: type[T], values: Any, prefix: str = "") -> T:
    """Build the dataclass `kind` from nested plain `values`. Raises UserError for unknown, missing or mistyped keys."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"{prefix[:-1]}={format_value(values)}: holds values of its own; set one, as in {prefix}KEY=VALUE"
        )
    hints, fields = _fields(typing.cast(Any, kind))
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: there is no such key{nearest(key_for(str(name), kind), fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = coerce(prefix + name, values[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: is missing")
    return kind(**arguments)


@functools.cache  # called for each shard of a pack
def _fields(kind: Any) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """The types and the fields of a dataclass by name."""
    return typing.get_type_hints(kind, include_extras=True), {field.name: field for field in dataclasses.fields(kind)}


def types_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The types of the keys of a dataclass with their marks; nested keys are dotted: data, data.root."""
    hints = {}
    for name, hint in _fields(kind)[0].items():
        hints[prefix + name] = hint
        if dataclasses.is_dataclass(_strip_marks(hint)):
            hints |= types_of(_strip_marks(hint), f"{prefix}{name}.")
    return hints


def _strip_marks(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def marked(mark: type[T], *kinds: Any) -> dict[str, T]:
    """The keys of the dataclasses `kinds` whose fields have a mark of type `mark`, with that mark."""
    hints = [item for kind in kinds for item in types_of(kind).items()]
    return {key: argument for key, hint in hints for argument in typing.get_args(hint) if isinstance(argument, mark)}


def keys_taking(types: Collection[Any], *kinds: Any) -> set[str]:
    """The keys of the dataclasses `kinds` that accept one of `types`."""
    hints = [(key, _strip_marks(hint)) for kind in kinds for key, hint in types_of(kind).items()]
    return {key for key, hint in hints if not {hint, *typing.get_args(hint)}.isdisjoint(types)}


def unread_keys(kind: Any, *readers: str) -> list[str]:
    """The keys of a dataclass that none of `readers` (families, kinds of schedule, commands) uses."""
    return [key for key, only in marked(OnlyFor, kind).items() if only.readers.isdisjoint(readers)]


def key_for(word: str, *kinds: Any) -> str:
    """The key of one of `kinds` with the alias `word`, or the word itself."""
    names = {name: key.split(".")[-1] for key, alias in marked(Alias, *kinds).items() for name in alias.names}
    return names.get(word.lower(), word)


def as_list(value: Any) -> Any:
    """The value of a key that takes one or several values, as a list."""
    return value if isinstance(value, list) else [value]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested plain values, with dotted keys."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value
    return flattened

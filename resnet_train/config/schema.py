"""From plain values to typed dataclasses: what a value may be, and the nearest right one for a wrong one."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from resnet_train.errors import UserError, nearest

# What a number may be: at least, at most; None for no bound. Open below where
# the name stands in ABOVE, open above where in BELOW.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**63 - 1),
    "scale": (0, 1),
    "depth": (None, 100_000),
    "iterations": (1, 10**9),
    "batch_size": (1, 10**6),
    "eval_batch_size": (1, 10**6),
    "checkpoint_every": (1, None),
    "keep_every": (0, None),
    "log_every": (1, None),
    "eval_every": (1, None),
    "momentum": (0, 1),
    "weight_decay": (0, None),
    "schedule.lr": (0, None),
    "schedule.factor": (0, 1),
    "schedule.drops": (0, 1),
    "schedule.patience": (0, 1),
    "schedule.threshold": (0, 100),
    "warmup.depth": (0, None),
    "warmup.lr": (0, None),
    "warmup.error": (0, 100),
    "warmup.iterations": (0, 10**9),
    "augment.pad": (0, 16),
    "augment.shorter_side": (0, 4096),
    "augment.area": (0, 1),
    "augment.colour_jitter": (0, 1),
    "augment.colour_noise": (0, 1),
    "device_batch_size": (1, None),
    "bn_images": (2, None),
    "devices": (1, 100_000),
    "max_restarts": (0, 1000),
    "timeout": (1, 10**6),
    "precise_bn": (0, 10**6),
    "images": (2, None),
    "rounds": (1, 1000),
    "seconds": (0, 3600),
    "steps": (2, 10**9),
    "mean": (0, 1),
    "std": (0, 10),
    "data.validation": (0, None),
    "data.size": (8, 1024),
    "data.workers": (0, 256),
    "shorter_side": (8, 4096),
    "quality": (1, 100),
    "shard_images": (1, 100_000),
    "workers": (0, 256),
    "lr": (0, None),
    "warmup": (0, 10**9),
    "drops": (0, 1),
    "anchors": (1, 4096),
    "min_size": (32, 4096),
    "max_size": (32, 8192),
    "proposals": (1, 10_000),
    "regions": (2, 10_000),
    "score": (0, 1),
}
ABOVE = {"scale", "lr", "schedule.lr", "warmup.lr", "schedule.factor", "schedule.patience", "seconds", "std"}
BELOW = {"momentum"}
# Keys whose values are text as it is typed, numbers too, and those that take lists of numbers.
TEXTS = {"run_dir", "resume", "recipe", "init_from", "checkpoint", "out", "runs", "packed", "check", "file", "classes"}
TEXTS |= {"data.root", "data.train", "data.test", "data.classes"}
LISTS = {"schedule.drops", "augment.shorter_side", "augment.area", "drops", "anchors", "mean", "std"}
RESUME = "auto, never or a checkpoint's file"  # what resume= may be

T = TypeVar("T")


def format_value(value: Any) -> str:
    """A value as it is typed, if not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def coerce(key: str, value: Any, hint: Any, bounds: Any = None) -> Any:
    """`value` as the type `hint`, or UserError.

    What a number may be stands in `bounds`, where the hint is Annotated[int, (least, most)], and else in RANGES.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return coerce(key, value, *arguments)
    if hint is Any:
        return value
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise UserError(
            f"{key}={format_value(value)}: allowed are {', '.join(arguments)}{nearest(str(value), arguments)}"
        )
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
        if text.strip() and not re.search("[\0\ud800-\udfff]", text):  # neither NUL nor what was no UTF-8
            return text
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
    kind = RESUME if key == "resume" else kind
    raise UserError(f"{key}={format_value(value)}: must be {kind}")


def _in_range(key: str, value: float, bounds: tuple[float | None, float | None] | None) -> float:
    low, high = bounds or RANGES.get(key, (None, None))
    text = f"{value:g}" if isinstance(value, float) else format_value(value)
    if low is not None and (value < low or (value == low and key in ABOVE)):
        raise UserError(f"{key}={text}: must be {'above' if key in ABOVE else 'at least'} {low}")
    if high is not None and (value > high or (value == high and key in BELOW)):
        raise UserError(f"{key}={text}: must be {'below' if key in BELOW else 'at most'} {high}")
    return value


def from_dict(kind: type[T], values: Any, prefix: str = "") -> T:
    """The dataclass `kind` from nested plain `values`; unknown, missing and mistyped keys are refused by name."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"{prefix[:-1]}={format_value(values)}: holds values of its own; set one, as in {prefix}KEY=VALUE"
        )
    hints, fields = _fields(typing.cast(Any, kind))
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: there is no such key{nearest(str(name), fields)}")
    found = {}
    for name, field in fields.items():
        if name in values:
            found[name] = coerce(prefix + name, values[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: is missing")
    return kind(**found)


@functools.cache  # a pack has as many shards as it likes
def _fields(kind: Any) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """The types and the fields of a dataclass by name."""
    return typing.get_type_hints(kind, include_extras=True), {field.name: field for field in dataclasses.fields(kind)}


def as_list(value: Any) -> Any:
    """Of a key that takes one or several, a list in either case."""
    return value if isinstance(value, list) else [value]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values as one level, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

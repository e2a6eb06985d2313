"""The words of a command line: flags, files by position, and the overrides of each job of a sweep."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from resnet_train.config.compose import known_keys
from resnet_train.config.options import CONFIG_DIR, DATACLASSES, groups, options
from resnet_train.config.quoting import KEY, quoted
from resnet_train.config.schema import flat, key_for, keys_taking
from resnet_train.errors import UserError, closest, nearest

PAIR = re.compile(r"[+~]*(hydra/\w+|[A-Za-z_][\w.]*)=", re.ASCII)
LISTS = keys_taking({list[int], list[float]}, *DATACLASSES)  # keys that take lists of numbers


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """Parse a command line as Hydra does: its flags, `overrides`, and in `flags` all other words.

    Flags may be anywhere between the overrides. Raises UserError.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what there is")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    line, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UserError(no_flag(name, unknown[0], words[words.index(unknown[0]) + 1 :]))
    for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
        if getattr(line, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: the configurations are this command's own; remove it")
    line.flags = list(words)
    for item in line.overrides:
        line.flags.remove(item)
    return line


def no_flag(name: str, flag: str, words: list[str]) -> str:
    """The error for an unknown `flag`, with advice on what to type; `words` came after the flag."""
    key, equals, value = flag.lstrip("-").partition("=")
    following = re.fullmatch(r"[^-=][^=]*", words[0] if words else "")
    value = value if equals else following[0] if following else "VALUE"
    key = closest(key_for(key.replace("-", "_"), *DATACLASSES), known_keys(name)) or ""
    how = f"values are written KEY=VALUE, as in {key}={value}" if key else "there is no such flag"
    return f"{flag}: {how}; --help shows what there is"


def expand_words(words: list[str], short: Mapping[str, str]) -> list[str]:
    """The words of a command line with those in `short` replaced: by another word, by nothing, or KEY= by another KEY=.

    Names of existing files are not replaced, and words without = only if they come first.
    """
    expanded, first = [], next((word for word in words if not word.startswith("-")), None)
    for word in words:
        key, equals, value = word.partition("=")
        replacement = short.get(word, short.get(key + equals, key + equals) + value if equals else word)
        if os.path.isfile(word) or not (equals or word.startswith("-") or word is first):
            replacement = word
        if replacement or word not in short:
            expanded.append(replacement)
    return expanded


def name_words(keys: tuple[str, ...], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Turn words without =, such as files and folders, into overrides of `keys`; return all overrides.

    Images are returned separately: there may be thousands, for which Hydra is too slow. Raises UserError.
    """
    if keys == ("bench",):  # the first word is what to measure
        first = [f"bench={word}" for word in overrides[:1] if "=" not in word]
        return first + overrides[len(first) :], []
    is_there = os.path.exists if keys == ("runs",) else os.path.isfile
    words: list[str] = []
    pairs: list[str] = []
    for item in overrides:
        (words if keys and (not PAIR.match(item) or is_there(item)) else pairs).append(item)
    if not words or keys == ("images",):
        return pairs, words
    if len(words) > len(keys) > 1:
        raise UserError(f"{' '.join(words[len(keys) :])}: resnet-weights takes one file at a time")
    if len(keys) > 1:
        return [*pairs, *(f"{key}={quoted(word)}" for key, word in zip(keys, words, strict=False))], []
    if any(item.startswith(f"{keys[0]}=") for item in pairs):
        raise UserError(f"{words[0]}: and {keys[0]}= are two ways to say the same; use one of them")
    value = ",".join(map(quoted, words))
    return [*pairs, f"{keys[0]}={value if len(words) == 1 else f'[{value}]'}"], []


def check_hydras(words: list[str], multirun: bool) -> None:
    """Raises UserError for overrides of Hydra that would bypass this command's own checks."""
    for item in words:
        key = item.lstrip("+~").partition("=")[0]
        if key == "hydra.searchpath":
            raise UserError(f"{item}: the configurations are this command's own; remove it")
        if key == "hydra.mode" and (multirun or item not in ("hydra.mode=RUN", "hydra.mode=MULTIRUN")):
            raise UserError(f"{item}: remove it; -m makes a sweep")


def requested_keys(overrides: list[str]) -> list[str]:
    """The keys on the command line; of a group's value {KEY: VALUE} those within it."""
    keys: list[str] = []
    for item in overrides:
        key, _, value = item.lstrip("+~").partition("=")
        members = OverridesParser.create().parse_override(item).value() if value.startswith("{") else None
        keys += [f"{key}.{member}" for member in flat(members)] if isinstance(members, dict) else [key]
    return [key for key in keys if not key.startswith("hydra")]


def with_jobs(overrides: list[str], sweep: bool) -> list[str]:
    """The overrides; in a sweep of an experiment without job=, all its jobs are added.

    Raises UserError for a job that the experiment does not have.
    """
    experiment = next((item for item in overrides if item.startswith("experiment=")), "")
    names = _values(experiment)
    if len(names) > 1:
        raise UserError(f"{experiment}: takes one experiment at a time")
    path = Path(CONFIG_DIR, "experiment", f"{''.join(names)}.yaml")
    if not names or not path.is_file():  # a wrong name is reported with those of all groups
        return overrides
    jobs = [str(job) for job in OmegaConf.load(path).jobs]
    requested = [item for item in overrides if item.startswith("job=")]
    for job in _values(requested[-1]) if requested else []:
        if job not in jobs:
            raise UserError(f"job={job}: {experiment} has {', '.join(jobs)}{nearest(job, jobs)}")
    if requested:
        return overrides
    if not sweep:
        raise UserError(f"{experiment}: has {len(jobs)} jobs; add -m for all, or name one, as in job={jobs[0]}")
    position = overrides.index(experiment) + 1
    return [*overrides[:position], "job=" + ",".join(jobs), *overrides[position:]]


def _values(item: str) -> list[str]:
    """The value of an override, or the values of a sweep's; none of one that Hydra cannot read, see `jobs_of`."""
    parser = OverridesParser.create()
    try:
        words = BasicSweeper.split_arguments([parser.parse_override(item)], None)[0]
        return [str(parser.parse_override(word).value()) for (word,) in words]
    except (HydraException, ValueError, RecursionError):
        return []


def jobs_of(name: str, overrides: list[str], sweep: bool) -> list[list[str]]:
    """The overrides of each job: those of all combinations in a sweep, else the command line's. Raises UserError."""
    parsed = []
    for item in overrides:
        try:
            override = OverridesParser.create().parse_override(item)
        except (HydraException, ValueError, RecursionError) as error:
            raise UserError(_unreadable(name, item)) from error
        key = override.key_or_group
        if not key:
            raise UserError(f"{item!r}: is not key=value")
        if override.package is not None:
            raise UserError(f"{item}: no key is taken elsewhere with @ here; write {key}=VALUE")
        if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
            raise UserError(f"{item}: is not written out here; write the values themselves, as in -m {key}=A,B")
        if override.is_sweep_override() and not sweep:
            a_list = f", or write a list, as in {key}=[…]" if key in LISTS else ""
            a_number = (
                "; a number has no comma, as 1000 or 0.01" if re.fullmatch(r"[\d,]+", item.partition("=")[2]) else ""
            )
            raise UserError(f"{item}: several values are a sweep, which resnet-train makes with -m{a_list or a_number}")
        if sweep and "${now:" in item and not key.startswith("hydra"):
            instead = "name keys in its place, as in run_dir='runs/${depth}-${seed}'"
            raise UserError(f"{item}: the time is another one in each job; {instead}")
        if key in groups(name) and isinstance(override.value(), (list, dict)):
            raise UserError(f"{item}: takes one option; for several runs add -m, for a value {key}.KEY=VALUE")
        try:
            BasicSweeper.split_arguments([override], None)
        except (HydraException, ValueError) as error:
            raise UserError(f"{item}: gives no values ({error}); write them out, as in -m {key}=A,B") from error
        parsed.append(override)
    return BasicSweeper.split_arguments(parsed, None)[0] if sweep else [overrides]


def _unreadable(name: str, item: str) -> str:
    """The error for a word that Hydra cannot parse as an override, with advice on what to type."""
    key, equals, _ = item.partition("=")
    if equals and KEY.fullmatch(key):
        return f"{item}: the value cannot be read, which is too long, or nested too deeply"
    if equals:
        return f"{item!r}: is not key=value"
    if item in known_keys(name):
        return f"{item!r}: is not key=value; add a value, as in {item}=VALUE"
    matching = [group for group in groups(name) if item in options(name, group)]
    advice = f"; did you mean {matching[0]}={item}?" if matching else ", as depth=20 is; --help shows what there is"
    return f"{item!r}: is not key=value{advice}"

"""From a command line to the values of its jobs, with Hydra, whose errors are reworded."""

from __future__ import annotations

import argparse
import functools
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_train.config import commands, detection, images, localization, train
from resnet_train.config.schema import flat, key_for, keys_taking
from resnet_train.errors import UserError, closest, nearest, nearest_data

_PACKAGE = Path(__file__).resolve().parent.parent
CONFIG_DIR = str(next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()))
# The commands whose configurations lie in a folder of their own, with its groups.
FOLDERS = dict.fromkeys(("detect", "predict", "test"), "detection")
FOLDERS |= dict.fromkeys(("localize", "localize_test"), "localization")
GROUPED = ("train", "bench", "detect", "localize")  # the commands that choose options of groups
KEY = re.compile(r"[+~]*[A-Za-z_][\w./]*", re.ASCII)
PAIR = re.compile(r"[+~]*(hydra/\w+|[A-Za-z_][\w.]*)=", re.ASCII)
PIECE = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]+""")  # of values with commas between them
CONFIGS: list[type] = [train.Config, detection.DetectConfig, detection.PredictConfig, detection.DetectTestConfig]
CONFIGS += [commands.EvalConfig, commands.ReportConfig, commands.ResponsesConfig, commands.BenchConfig]
CONFIGS += [commands.PackConfig, commands.WeightsConfig, images.ClassifyConfig, images.FeaturesConfig]
CONFIGS += [localization.LocalizeConfig, localization.LocalizeTestConfig]
# Keys whose values are always text, even if they look like numbers, and keys that take lists of numbers.
TEXTS = keys_taking({str, list[str]}, *CONFIGS)
LISTS = keys_taking({list[int], list[float]}, *CONFIGS)
# Exceptions of composition for invalid overrides; OSError: an option longer than a file name may be.
UNTAKEN = (HydraException, OmegaConfBaseException, ValueError, AssertionError, AttributeError, OSError, RecursionError)


def config_dir(name: str) -> str:
    """The folder with a command's configurations."""
    return str(Path(CONFIG_DIR, FOLDERS.get(name, "")))


@functools.cache
def groups(name: str) -> list[str]:
    """The groups that a command has."""
    folders = {path.name for path in Path(config_dir(name)).iterdir() if path.is_dir()} - {*FOLDERS.values()}
    folders -= {"experiment"} if name == "bench" else set()
    return sorted(folders) if name in GROUPED else []


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


def plain(composed: DictConfig) -> Any:
    """The resolved values of one job, as plain containers."""
    return OmegaConf.to_container(composed, resolve=True)


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
    """An override without the quotes that `as_text` has added to its value."""
    key, _, value = item.partition("=")
    text = re.sub(r'\\(["\\])', r"\1", value[1:-1])
    return f"{key}={text}" if value == quoted(text) else item


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
            raise UserError(f"{item}: several values are a sweep, which resnet-train makes with -m{a_list}")
        if key in groups(name) and isinstance(override.value(), (list, dict)):
            raise UserError(f"{item}: takes one option; for several runs add -m, for a value {key}.KEY=VALUE")
        try:
            BasicSweeper.split_arguments([override], None)
        except (HydraException, ValueError) as error:
            raise UserError(f"{item}: gives no values ({error}); write them out, as in -m {key}=A,B") from error
        parsed.append(override)
    return BasicSweeper.split_arguments(parsed, None)[0] if sweep else [overrides]


def with_jobs(overrides: list[str], sweep: bool) -> list[str]:
    """The overrides; in a sweep of an experiment without job=, all its jobs are added.

    Raises UserError for a job that the experiment does not have.
    """
    experiment = next((item for item in overrides if item.startswith("experiment=")), "")
    if "," in experiment:
        raise UserError(f"{experiment}: takes one experiment at a time")
    path = Path(CONFIG_DIR, "experiment", experiment.removeprefix("experiment=") + ".yaml")
    if not experiment or not path.is_file():  # a wrong name is reported with those of all groups
        return overrides
    jobs = [str(job) for job in OmegaConf.load(path).jobs]
    requested = [item for item in overrides if item.startswith("job=")]
    for job in requested[-1].removeprefix("job=").split(",") if requested else []:
        if job not in jobs:
            raise UserError(f"job={job}: {experiment} has {', '.join(jobs)}{nearest(job, jobs)}")
    if requested:
        return overrides
    if not sweep:
        raise UserError(f"{experiment}: has {len(jobs)} jobs; add -m for all, or name one, as in job={jobs[0]}")
    position = overrides.index(experiment) + 1
    return [*overrides[:position], "job=" + ",".join(jobs), *overrides[position:]]


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


def known_keys(name: str) -> list[str]:
    """The keys and groups of a command."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        return _words(name, _keys(name, []))


def _words(name: str, keys: Iterable[str]) -> list[str]:
    """The names allowed on a command line: groups, and `keys` except Hydra's and those that it does not use."""
    return [key for key in keys if not key.startswith("hydra.") and key not in _unused(name)] + groups(name)


def _unused(name: str) -> tuple[str, ...]:
    """The keys of a command's configuration that it does not use."""
    return commands.UNREAD_BY_BENCH if name == "bench" else ()


def options(name: str, group: str) -> list[str]:
    """The options of a group."""
    return sorted(file.stem for file in Path(config_dir(name), group).glob("*.yaml"))


def explain(text: str, name: str, overrides: list[str]) -> str:
    """The `text` of --help, with the comment of each key in its YAML file added above it."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        texts = comments(name, overrides)
    before, title, values = text.partition("== Values (key=value) ==\n")
    lines: list[str] = []
    for key, line in _with_keys(values.splitlines()):
        if key in _unused(name):
            continue
        indent = len(line) - len(line.lstrip())
        lines += textwrap.wrap(
            texts.get(key, ""), 80, initial_indent=indent * " " + "# ", subsequent_indent=indent * " " + "# "
        )
        lines.append(line)
    return before + title + "\n".join(lines).rstrip() + "\n"


def comments(name: str, overrides: list[str]) -> dict[str, str]:
    """The comment of each key in the YAML files of a command and its chosen groups. Hydra must be initialised."""
    choices = hydra.compose(name, overrides, return_hydra_config=True).hydra.runtime.choices
    texts = _comments(Path(config_dir(name), f"{name}.yaml"), "")
    for group in groups(name):
        path = Path(config_dir(name), group, f"{choices.get(group)}.yaml")
        texts |= _comments(path, group) if path.is_file() else {}
    return texts


def _comments(path: Path, group: str) -> dict[str, str]:
    """The comments of the keys in the YAML file of a `group`, above and beside them, by dotted names."""
    text = path.read_text()
    prefix = "" if text.startswith("# @package _global_") or not group else f"{group}."
    _, _, body = text.partition("\n\n") if not group else ("", "", re.sub(r"\A(#.*\n)+", "", text))
    texts: dict[str, str] = {}
    above: list[str] = []
    for key, line in _with_keys(body.partition("\nhydra:")[0].splitlines()):
        if line.lstrip().startswith("#"):
            above.append(line.lstrip(" #"))
            continue
        beside = line.partition(" # ")[2]
        if key and (above or beside):
            texts[prefix + key] = " ".join([*above, beside]).strip()
        above = []
    return texts


def _with_keys(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted name of the key at its beginning, or an empty string."""
    outer: list[tuple[int, str]] = []
    for line in lines:
        match = re.match(r"( *)(\w+):", line)
        if match:
            outer = [(indent, key) for indent, key in outer if indent < len(match[1])]
            outer.append((len(match[1]), match[2]))
        yield ".".join(key for _, key in outer) if match else "", line


def no_flag(name: str, flag: str, words: list[str]) -> str:
    """The error for an unknown `flag`, with advice on what to type; `words` came after the flag."""
    key, equals, value = flag.lstrip("-").partition("=")
    value = value if equals else next((word for word in words[:1] if "=" not in word and word[0] != "-"), "VALUE")
    key = closest(key_for(key.replace("-", "_"), *CONFIGS), known_keys(name)) or ""
    how = f"values are written KEY=VALUE, as in {key}={value}" if key else "there is no such flag"
    return f"{flag}: {how}; --help shows what there is"


def compose(name: str, overrides: list[str], package: str | None = None) -> dict[str, Any]:
    """Compose the plain, resolved values of one job. Raises UserError that names the wrong override.

    `package` is the part of the configuration to be shown, which must exist.
    """
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        chosen = _check_options(name, overrides)
        _check_there(name, overrides, chosen)
        try:
            composed = hydra.compose(name, overrides)
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except UNTAKEN as error:
            raise UserError(_diagnosis(name, overrides, chosen, error)) from error
        if package is not None:
            keys = {key for key, value in _keys(name, overrides).items() if value is not None}
            if package not in keys and not any(key.startswith(package + ".") for key in keys):
                raise UserError(f"--package {package}: is not part of the configuration")
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def _keys(name: str, overrides: list[str]) -> dict[str, Any]:
    """All values by dotted keys, including Hydra's own."""
    composed = hydra.compose(name, overrides, return_hydra_config=True)
    return flat(OmegaConf.to_container(composed, resolve=False))  # type: ignore[arg-type]


def _check_options(name: str, overrides: list[str]) -> list[str]:
    """The overrides that choose an option of a group. Raises UserError for an option that does not exist."""
    chosen = []
    for item in overrides if name in GROUPED else []:
        parsed = OverridesParser.create().parse_override(item)
        group = parsed.key_or_group
        if group in groups(name) and parsed.is_add():
            raise UserError(f"{item}: is there already; remove the +")
        if group in groups(name) and not parsed.is_delete():
            value, allowed = str(parsed.value()), options(name, group)
            if value not in allowed:
                near = (nearest_data if group == "data" else nearest)(value, allowed)
                raise UserError(f"{as_typed(item)}: allowed are {', '.join(allowed)}{near}")
            chosen.append(item)
    return chosen


def _check_there(name: str, overrides: list[str], chosen: list[str]) -> None:
    """Raises UserError for an override that adds an existing key (+) or removes one (~)."""
    for item in overrides:
        parsed = OverridesParser.create().parse_override(item)
        key = parsed.key_or_group
        if (parsed.is_add() or parsed.is_delete()) and key in _words(name, _keys(name, chosen)):
            how = (
                "is there already; remove the +" if parsed.is_add() else f"nothing can be taken away; write {key}=VALUE"
            )
            raise UserError(f"{item}: {how}")


def _diagnosis(name: str, overrides: list[str], chosen: list[str], error: Exception) -> str:
    """Why composition failed: an unknown key, a missing key, or an invalid value."""
    keys = _keys(name, chosen)
    words = _words(name, keys)
    typed: dict[str, str] = {
        OverridesParser.create().parse_override(item).key_or_group: as_typed(item) for item in overrides
    }
    for key, item in typed.items():
        if key in _unused(name):
            return f"{item}: is not used by resnet-bench; remove it"
        known = key in keys or key in words or any(known.startswith(key + ".") for known in keys)
        if not known and not re.match(r"hydra\b", key):
            near = nearest(key_for(key, *CONFIGS), words) or _members(key, words)
            return f"{item}: {_other_option(name, key, keys) or f'there is no key {key}{near}'}"
    missing = next((key for key in words if keys.get(key) == "???"), None)
    if missing and missing not in typed:
        return f"{missing}: is needed; add {missing}=…"
    for reason in (error, error.__cause__):  # Hydra says which override, OmegaConf why
        full_key = getattr(reason, "full_key", None)
        override = typed.get(str(full_key)) or full_key or next((o for o in overrides if o in str(reason)), None)
        if override and "$" in override:
            return f"{override}: ${{…}} gives nothing here; it can name another key, as ${{seed}}, or ${{oc.env:HOME}}"
        if override:
            return f"{override}: cannot be taken ({str(reason).splitlines()[0]})"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _members(key: str, words: Iterable[str]) -> str:
    """`; schedule has lr, factor` for an unknown key schedule.KEY; empty if there is no such group."""
    group = key.rpartition(".")[0]
    names = [word[len(group) + 1 :] for word in words if group and word.startswith(f"{group}.")]
    return f"; {group} has {', '.join(names)}" if names else ""


def _other_option(name: str, key: str, keys: Mapping[str, Any]) -> str | None:
    """The error for a key that the chosen option does not have but others of its group do; None if none do."""
    group, _, rest = key.partition(".")
    if group not in groups(name) or f"{group}.name" not in keys:
        return None
    files = {option: OmegaConf.load(Path(config_dir(name), group, f"{option}.yaml")) for option in options(name, group)}
    others = [f"{group}={option}" for option, values in files.items() if OmegaConf.select(values, rest) is not None]
    return f"{group}={keys[f'{group}.name']} has no {rest}; there is one with {' or '.join(others)}" if others else None


def requested_keys(overrides: list[str]) -> list[str]:
    """The keys on the command line."""
    keys = [item.lstrip("+~").split("=")[0] for item in overrides]
    return [key for key in keys if not key.startswith("hydra")]

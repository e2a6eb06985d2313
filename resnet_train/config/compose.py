"""From a command line to the values of its jobs, with Hydra; its complaints in our words."""

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
# Keys whose values are text as it is typed, numbers too, and those that take lists of numbers.
TEXTS = keys_taking({str, list[str]}, *CONFIGS)
LISTS = keys_taking({list[int], list[float]}, *CONFIGS)
# What composing raises for overrides that cannot be taken; OSError: an option as long as no file name may be.
UNTAKEN = (HydraException, OmegaConfBaseException, ValueError, AssertionError, AttributeError, OSError, RecursionError)


def config_dir(name: str) -> str:
    """The folder of a command's configurations."""
    return str(Path(CONFIG_DIR, FOLDERS.get(name, "")))


@functools.cache
def groups(name: str) -> list[str]:
    """The groups that a command has."""
    folders = (path.name for path in Path(config_dir(name)).iterdir() if path.is_dir())
    return sorted(folder for folder in folders if folder not in FOLDERS.values()) if name in GROUPED else []


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """A command line as Hydra takes it apart: its flags, `overrides`, and all else as it was typed in `flags`.

    Flags may stand anywhere between the overrides. Raises UserError.
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
    """The words of a command line without what is `short` for another word, or for nothing, or for another KEY=.

    A file stands for itself, and a word without = is short for another only where it comes first.
    """
    found, first = [], next((word for word in words if not word.startswith("-")), None)
    for word in words:
        key, equals, value = word.partition("=")
        meant = short.get(word, short.get(key + equals, key + equals) + value if equals else word)
        if os.path.isfile(word) or not (equals or word.startswith("-") or word is first):
            meant = word
        if meant or word not in short:
            found.append(meant)
    return found


def name_words(keys: tuple[str, ...], overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides, with those of the keys for which words without = stand: files and folders, with any name.

    Words that stand for images come by themselves: they may be thousands, and Hydra is slow. Raises UserError.
    """
    if keys == ("bench",):  # the first word says what to measure
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
    named = ",".join(map(quoted, words))
    return [*pairs, f"{keys[0]}={named if len(words) == 1 else f'[{named}]'}"], []


def check_hydras(words: list[str], multirun: bool) -> None:
    """Refuse what would go round this command's own checks. Raises UserError."""
    for item in words:
        key = item.lstrip("+~").partition("=")[0]
        if key == "hydra.searchpath":
            raise UserError(f"{item}: the configurations are this command's own; remove it")
        if key == "hydra.mode" and (multirun or item not in ("hydra.mode=RUN", "hydra.mode=MULTIRUN")):
            raise UserError(f"{item}: remove it; -m makes a sweep")


def plain(composed: DictConfig) -> Any:
    """The resolved values of one job, as its check takes them."""
    return OmegaConf.to_container(composed, resolve=True)


def quoted(text: str) -> str:
    """`text` as Hydra reads it back, whatever it holds."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'


def as_text(item: str, sweep: bool) -> str:
    """An override, with quotes around what Hydra's grammar has no name for: paths with ~, spaces, = or letters as ö.

    So are numbers where text is asked for, which a folder 2026_11 would be. In a sweep commas are between values.
    """
    key, equals, value = item.partition("=")
    if not equals or not KEY.fullmatch(key) or key.lstrip("+~").partition(".")[0] == "hydra":
        return item
    inside = value[1:-1] if value[:1] + value[-1:] == "[]" else value  # a list
    if inside != value and _lists_texts(key, value):
        return item
    split = (sweep or inside != value) and not set("[]{}()") & set(inside)
    pieces = PIECE.findall(inside) if split else [inside]
    if ",".join(pieces) != inside:
        pieces = [inside]
    if _readable(key, value, sweep) and all(_readable(key, piece, sweep) for piece in pieces):
        return item
    pieces = [piece if _readable(key, piece, sweep) else quoted(piece) for piece in pieces]
    if inside != value and len(pieces) == 1 and not split:  # a list of lists
        return f"{key}={quoted(value)}"
    joined = ",".join(pieces)
    return f"{key}=[{joined}]" if inside != value else f"{key}={joined}"


def as_typed(item: str) -> str:
    """An override without the quotes that `as_text` has put around its value."""
    key, _, value = item.partition("=")
    text = re.sub(r'\\(["\\])', r"\1", value[1:-1])
    return f"{key}={text}" if value == quoted(text) else item


def _lists_texts(key: str, value: str) -> bool:
    """Whether Hydra reads KEY=`value` as a list of texts, such as names in quotes of their own."""
    try:
        found = OverridesParser.create().parse_override(f"{key}={value}").value()
    except (HydraException, ValueError, RecursionError):
        return False
    return isinstance(found, list) and all(isinstance(item, str) for item in found)


def _readable(key: str, value: str, sweep: bool) -> bool:
    """Whether Hydra reads KEY=`value`, and as what was meant."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except (HydraException, ValueError, RecursionError):
        return False
    if key.lstrip("+~") not in TEXTS:
        return True
    if override.is_sweep_override():
        return sweep
    found = override.value()
    return isinstance(found, bool) or not isinstance(found, (int, float))


def jobs_of(name: str, overrides: list[str], sweep: bool) -> list[list[str]]:
    """The overrides of each job: the sweep written out, or the command line as it is."""
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
    """The overrides, and in a sweep of an experiment that names no job, all its jobs.

    Raises UserError for a job that the experiment does not have.
    """
    named = next((item for item in overrides if item.startswith("experiment=")), "")
    if "," in named:
        raise UserError(f"{named}: takes one experiment at a time")
    path = Path(CONFIG_DIR, "experiment", named.removeprefix("experiment=") + ".yaml")
    if not named or not path.is_file():  # a wrong name is told of with those of all groups
        return overrides
    jobs = [str(job) for job in OmegaConf.load(path).jobs]
    asked = [item for item in overrides if item.startswith("job=")]
    for job in asked[-1].removeprefix("job=").split(",") if asked else []:
        if job not in jobs:
            raise UserError(f"job={job}: {named} has {', '.join(jobs)}{nearest(job, jobs)}")
    if asked:
        return overrides
    if not sweep:
        raise UserError(f"{named}: has {len(jobs)} jobs; add -m for all, or name one, as in job={jobs[0]}")
    place = overrides.index(named) + 1
    return [*overrides[:place], "job=" + ",".join(jobs), *overrides[place:]]


def _unreadable(name: str, item: str) -> str:
    """What is to be typed in place of a word that Hydra does not take for an override."""
    key, equals, _ = item.partition("=")
    if equals and KEY.fullmatch(key):
        return f"{item}: the value cannot be read, which is too long, or nested too deeply"
    if equals:
        return f"{item!r}: is not key=value"
    if item in known_keys(name):
        return f"{item!r}: is not key=value; add a value, as in {item}=VALUE"
    of = [group for group in groups(name) if item in options(name, group)]
    advice = f"; did you mean {of[0]}={item}?" if of else ", as depth=20 is; --help shows what there is"
    return f"{item!r}: is not key=value{advice}"


def known_keys(name: str) -> list[str]:
    """The keys and groups of a command."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        return _words(name, _keys(name, []))


def _words(name: str, keys: Iterable[str]) -> list[str]:
    """What a command line may name: all of `keys` but Hydra's and what a benchmark has in their place, and groups."""
    taken = commands.UNREAD_BY_BENCH if name == "bench" else []
    return [key for key in keys if not key.startswith("hydra.") and key not in taken] + groups(name)


def options(name: str, group: str) -> list[str]:
    """The options of a group."""
    return sorted(file.stem for file in Path(config_dir(name), group).glob("*.yaml"))


def explain(text: str, name: str, overrides: list[str]) -> str:
    """The `text` of --help, with the comment that each key has in its YAML file above it."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        said = comments(name, overrides)
    before, title, values = text.partition("== Values (key=value) ==\n")
    lines: list[str] = []
    for key, line in _keyed(values.splitlines()):
        indent = len(line) - len(line.lstrip())
        lines += textwrap.wrap(
            said.get(key, ""), 80, initial_indent=indent * " " + "# ", subsequent_indent=indent * " " + "# "
        )
        lines.append(line)
    return before + title + "\n".join(lines).rstrip() + "\n"


def comments(name: str, overrides: list[str]) -> dict[str, str]:
    """What the YAML files of a command, with the groups that are chosen, say of each key. Hydra is initialised."""
    chosen = hydra.compose(name, overrides, return_hydra_config=True).hydra.runtime.choices
    found = _comments(Path(config_dir(name), f"{name}.yaml"), "")
    for group in groups(name):
        path = Path(config_dir(name), group, f"{chosen.get(group)}.yaml")
        found |= _comments(path, group) if path.is_file() else {}
    return found


def _comments(path: Path, group: str) -> dict[str, str]:
    """What the YAML file of a `group` says of each of its keys, by their dotted names: above them and beside."""
    text = path.read_text()
    prefix = "" if text.startswith("# @package _global_") or not group else f"{group}."
    _, _, body = text.partition("\n\n") if not group else ("", "", re.sub(r"\A(#.*\n)+", "", text))
    found: dict[str, str] = {}
    above: list[str] = []
    for key, line in _keyed(body.partition("\nhydra:")[0].splitlines()):
        if line.lstrip().startswith("#"):
            above.append(line.lstrip(" #"))
            continue
        beside = line.partition(" # ")[2]
        if key and (above or beside):
            found[prefix + key] = " ".join([*above, beside]).strip()
        above = []
    return found


def _keyed(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted name of the key that it begins with, or an empty one."""
    outer: list[tuple[int, str]] = []
    for line in lines:
        found = re.match(r"( *)(\w+):", line)
        if found:
            outer = [(indent, key) for indent, key in outer if indent < len(found[1])]
            outer.append((len(found[1]), found[2]))
        yield ".".join(key for _, key in outer) if found else "", line


def no_flag(name: str, flag: str, words: list[str]) -> str:
    """What is to be typed in place of a `flag` that there is not, with the `words` that came after it."""
    key, equals, value = flag.lstrip("-").partition("=")
    value = value if equals else next((word for word in words[:1] if "=" not in word and word[0] != "-"), "VALUE")
    key = closest(key_for(key.replace("-", "_"), *CONFIGS), known_keys(name)) or ""
    how = f"values are written KEY=VALUE, as in {key}={value}" if key else "there is no such flag"
    return f"{flag}: {how}; --help shows what there is"


def compose(name: str, overrides: list[str], package: str | None = None) -> dict[str, Any]:
    """Plain, resolved values of one job. Raises UserError naming the override that is at fault.

    `package` is a part of the configuration to be shown, which must exist.
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
            found = {key for key, value in _keys(name, overrides).items() if value is not None}
            if package not in found and not any(key.startswith(package + ".") for key in found):
                raise UserError(f"--package {package}: is no part of the configuration")
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def _keys(name: str, overrides: list[str]) -> dict[str, Any]:
    """All values, Hydra's own as well, by their dotted keys."""
    composed = hydra.compose(name, overrides, return_hydra_config=True)
    return flat(OmegaConf.to_container(composed, resolve=False))  # type: ignore[arg-type]


def _check_options(name: str, overrides: list[str]) -> list[str]:
    """The overrides that choose an option of a group, once each is seen to exist. Raises UserError."""
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
    """Refuse to add what is there, and to take away what must be. Raises UserError."""
    for item in overrides:
        parsed = OverridesParser.create().parse_override(item)
        key = parsed.key_or_group
        if (parsed.is_add() or parsed.is_delete()) and key in _words(name, _keys(name, chosen)):
            how = (
                "is there already; remove the +" if parsed.is_add() else f"nothing can be taken away; write {key}=VALUE"
            )
            raise UserError(f"{item}: {how}")


def _diagnosis(name: str, overrides: list[str], chosen: list[str], error: Exception) -> str:
    """Why composition failed, in our words: an unknown key, one that is missing, or a value that is none."""
    keys = _keys(name, chosen)
    words = _words(name, keys)
    named: dict[str, str] = {
        OverridesParser.create().parse_override(item).key_or_group: as_typed(item) for item in overrides
    }
    for key, item in named.items():
        if name == "bench" and key in commands.UNREAD_BY_BENCH:
            return f"{item}: is not used by resnet-bench; remove it"
        known = key in keys or key in words or any(known.startswith(key + ".") for known in keys)
        if not known and not re.match(r"hydra\b", key):
            near = nearest(key_for(key, *CONFIGS), words) or _members(key, words)
            return f"{item}: {_other_option(name, key, keys) or f'there is no key {key}{near}'}"
    missing = next((key for key in words if keys.get(key) == "???"), None)
    if missing and missing not in named:
        return f"{missing}: is needed; add {missing}=…"
    for reason in (error, error.__cause__):  # Hydra says which override, OmegaConf why
        place = getattr(reason, "full_key", None)
        which = named.get(str(place)) or place or next((item for item in overrides if item in str(reason)), None)
        if which and "$" in which:
            return f"{which}: ${{…}} gives nothing here; it can name another key, as ${{seed}}, or ${{oc.env:HOME}}"
        if which:
            return f"{which}: cannot be taken ({str(reason).splitlines()[0]})"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _members(key: str, words: Iterable[str]) -> str:
    """`; schedule has lr, factor` for a key schedule.KEY that there is not; nothing where there is no such group."""
    group = key.rpartition(".")[0]
    names = [word[len(group) + 1 :] for word in words if group and word.startswith(f"{group}.")]
    return f"; {group} has {', '.join(names)}" if names else ""


def _other_option(name: str, key: str, keys: Mapping[str, Any]) -> str | None:
    """What is said of a key that other options of its group have, as drops of schedule=step, and the chosen has not."""
    group, _, rest = key.partition(".")
    if group not in groups(name) or f"{group}.name" not in keys:
        return None
    files = {option: OmegaConf.load(Path(config_dir(name), group, f"{option}.yaml")) for option in options(name, group)}
    having = [f"{group}={option}" for option, values in files.items() if OmegaConf.select(values, rest) is not None]
    return f"{group}={keys[f'{group}.name']} has no {rest}; there is one with {' or '.join(having)}" if having else None


def keys_asked(overrides: list[str]) -> list[str]:
    """The keys that the command line names."""
    keys = [item.lstrip("+~").split("=")[0] for item in overrides]
    return [key for key in keys if not key.startswith("hydra")]

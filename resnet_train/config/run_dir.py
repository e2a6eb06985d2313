"""Where a run lies, and whether it can be begun or gone on with there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from resnet_train.config.keys import Free, StoredAs, Unnamed
from resnet_train.config.paths import check_file, writable
from resnet_train.config.schema import RESUME, flat, format_value, marked
from resnet_train.config.train import Config
from resnet_train.errors import UserError, nearest
from resnet_train.files import expand, nearest_existing, read_object

LONGEST_NAME = 100  # bytes of a run's folder


def run_directory(config: Config, asked: Iterable[str], scale: float = 1) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA/NET/ and the values of the other keys that were `asked` for.

    An experiment's runs lie where the same runs lie without it, so that experiments share them.
    """
    if config.run_dir is not None:
        return expand(config.run_dir)
    told = {"data", "depth", "arch", "shortcut", "seed"} | unnamed(Config)
    if config.schedule.name == "plateau":  # which is decided at these iterations
        told.discard("log_every")
    values = flat(config.plain()) | {"schedule": config.schedule.name} | ({"scale": scale} if scale != 1 else {})
    return (
        Path("runs")
        / (plain_word(config.data_label) or "images")
        / config.net
        / run_name(values, set(asked) - told, config.seed)
    )


def unnamed(kind: Any) -> set[str]:
    """The keys of a configuration that have no say in what is learned."""
    return marked(Free, kind).keys() | marked(Unnamed, kind).keys()


def run_name(values: Mapping[str, Any], asked: Iterable[str], seed: int) -> str:
    """The name of a run's folder: the flat `values` of the keys that were `asked` for, then the seed."""
    rest: dict[str, Any] = {}
    for word in asked:
        named = [word] if word in values else [key for key in values if key.startswith(word + ".")]
        rest |= {key: _short(values[key]) for key in named}
    words = [plain_word(f"{key}={json.dumps(rest[key], ensure_ascii=False)}") for key in sorted(rest)]
    name = "+".join([*words, f"seed-{seed}"])
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    return os.fsencode(name)[: LONGEST_NAME - 13].decode(errors="ignore") + "-" + _hash(name)[:12]


def _short(value: Any) -> Any:
    """A value as the name of a folder has it: of an absolute path the file's name, and what tells its folder apart."""
    return f"{Path(value).stem}-{_hash(value)[:6]}" if isinstance(value, str) and value.startswith("/") else value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain_word(text: str) -> str:
    """`text` with only letters, digits, `.`, `_` and `-`, which need no quotes on a later command line.

    Letters are those of any language, with their marks, as in größe or हिन्दी.
    """
    letters = unicodedata.normalize("NFC", text)
    masked = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else "\0" for c in letters)
    return re.sub("\0+", "-", masked).strip("-")


def check_same_run(old: Mapping[str, Any], config: RunConfig, where: str, otherwise: str = "another run_dir=") -> None:
    """Refuse to resume the run in `where`, of configuration `old`, under one that changes its mathematics.

    `otherwise` is what can be done to have the new value.
    """
    was, now, free = flat(old), flat(config.plain()), marked(Free, type(config))
    for key in sorted(was.keys() | now.keys()):
        if key not in free and was.get(key) != now.get(key):
            raise UserError(
                f"{key}={format_value(now.get(key))}: the run in {where} has {key}={format_value(was.get(key))};"
                f" use that, or {otherwise}"
            )


def check_same_data(old: Mapping[str, Any], was: str, data: Mapping[str, Any], now: str, where: str) -> None:
    """Refuse other data, by their digest `now`, than those of the run in `where`, by theirs: `was`.

    `old` and `data` are what the two configurations say of the data.
    """
    if was != now:
        raise UserError(
            f"{data_words(data)}: holds other data (digest {now[:12]}) than the run in {where} was trained on"
            f" ({data_words(old)}, digest {was[:12]}); use those, or another run_dir="
        )


def data_words(data: Mapping[str, Any]) -> str:
    """The data that a configuration names, as they are typed."""
    return f"data.root={data['root']}" if data.get("root") is not None else f"data={data.get('name')}"


def run_state(directory: Path) -> Literal["new", "unfinished", "finished"]:
    """What a run directory holds."""
    if (directory / "summary.json").is_file():
        return "finished"
    return "unfinished" if (directory / "config.json").is_file() else "new"


class RunConfig(Protocol):
    """What training and detection say alike of a run."""

    @property
    def run_dir(self) -> str | None:
        """Where it was asked to lie."""

    @property
    def resume(self) -> str:
        """Whether to resume."""

    @property
    def init_from(self) -> str | None:
        """The weights that it begins with."""

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values."""


def as_stored(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint holds of a configuration: the same in any directory, however often the run was cut."""
    return config.plain() | {key: stored.value for key, stored in marked(StoredAs, type(config)).items()}


def check_run_dir(directory: Path, config: RunConfig, *, may_be_finished: bool = False) -> None:
    """Refuse a directory that cannot take this run: finished, not a run's, of another run, not writable."""
    state = run_state(directory)
    try:
        if state == "finished" and not may_be_finished:
            raise UserError(
                f"run_dir={directory}: holds a finished run{_on_other_data(directory, config)}; read its summary.json,"
                f" or use another {'seed= or ' if config.run_dir is None else ''}run_dir="
            )
        if state == "finished" or (state == "unfinished" and config.resume != "never"):
            check_same_run(read_object(directory / "config.json"), config, str(directory))
        if state == "new" and directory.exists() and any(path.suffix != ".part" for path in directory.iterdir()):
            raise UserError(f"run_dir={directory}: exists and holds no run; use another run_dir=")
        parent = nearest_existing(directory)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"run_dir={directory}: cannot be used: {error}") from error
    if not writable(directory / "config.json"):
        raise UserError(f"run_dir={directory}: {parent} is not a folder that you may write to; use another run_dir=")
    if config.init_from is not None and (config.resume == "never" or (config.resume == "auto" and state == "new")):
        check_file("init_from", config.init_from)  # a resumed run has its weights
    if config.resume not in ("auto", "never") and not expand(config.resume).is_file():
        hint = nearest(config.resume, ["auto", "never"])
        raise UserError(f"resume={config.resume}: must be {RESUME}{hint}")


def _on_other_data(directory: Path, config: RunConfig) -> str:
    """Where the data of a finished run lay, if not where `config` has them: they may be others."""
    try:
        old, new = read_object(directory / "config.json")["data"], config.plain()["data"]
        return "" if data_words(old) == data_words(new) else f" on {data_words(old)}, not on {data_words(new)}"
    except (UserError, LookupError, TypeError, AttributeError):
        return ""

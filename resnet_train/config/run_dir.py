"""The directory of a run, and whether the run can be started or resumed there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from resnet_train.config.keys import Free, StoredAs, Unnamed
from resnet_train.config.paths import check_file, writable
from resnet_train.config.schema import RESUME, flat, format_value, marked
from resnet_train.config.train import Config
from resnet_train.errors import UserError, nearest
from resnet_train.files import expand, nearest_existing, read_object

LONGEST_NAME = 100  # bytes of a run's folder


def run_directory(config: Config, requested: Iterable[str], scale: float = 1) -> Path:
    """The directory of a run: `run_dir`, or runs/DATA/NET/ and the values of the other `requested` keys.

    An experiment's runs are in the same directories as the same runs without it, so that experiments share them.
    """
    if config.run_dir is not None:
        return expand(config.run_dir)
    excluded = {"data", "depth", "arch", "shortcut", "seed"} | unnamed(Config)
    if config.schedule.name == "plateau":  # drops happen at these iterations only
        excluded.discard("log_every")
    values = flat(config.plain()) | {"schedule": config.schedule.name} | ({"scale": scale} if scale != 1 else {})
    return (
        Path("runs")
        / (plain_word(config.data_label) or "images")
        / config.net
        / run_name(values, set(requested) - excluded, config.seed)
    )


def unnamed(kind: Any) -> set[str]:
    """The keys of a configuration that are not part of the name of a run's folder."""
    return marked(Free, kind).keys() | marked(Unnamed, kind).keys()


def run_name(values: Mapping[str, Any], requested: Iterable[str], seed: int) -> str:
    """The name of a run's folder: the flat `values` of the `requested` keys, then the seed."""
    rest: dict[str, Any] = {}
    for word in requested:
        keys = [word] if word in values else [key for key in values if key.startswith(word + ".")]
        rest |= {key: _short(values[key]) for key in keys}
    words = [plain_word(f"{key}={json.dumps(rest[key], ensure_ascii=False)}") for key in sorted(rest)]
    name = "+".join([*words, f"seed-{seed}"])
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    tail = f"-{_hash('+'.join(words))[:12]}+seed-{seed}"
    return os.fsencode(name)[: LONGEST_NAME - len(tail)].decode(errors="ignore") + tail


def name_of_members(paths: Sequence[Path]) -> str:
    """The first word of a result's name: of a checkpoint its own, of an ensemble one for these members."""
    return paths[0].stem if len(paths) == 1 else f"ensemble-of-{len(paths)}-{mark(*sorted(map(str, paths)))}"


def mark(*paths: str) -> str:
    """A few digits that tell apart paths of one name."""
    return _hash("\n".join(str(expand(path).resolve()) for path in paths))[:6]


def _short(value: Any) -> Any:
    """A value for the name of a folder; an absolute path is shortened to the file's name and a hash."""
    return f"{Path(value).stem}-{_hash(value)[:6]}" if isinstance(value, str) and value.startswith("/") else value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain_word(text: str) -> str:
    """`text` with only letters, digits, `.`, `_` and `-`, which need no quotes on a command line.

    Letters are those of any language, with their marks, as in größe or हिन्दी.
    """
    letters = unicodedata.normalize("NFC", text)
    masked = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else "\0" for c in letters)
    return re.sub("\0+", "-", masked).strip("-")


def check_same_run(old: Mapping[str, Any], config: RunConfig, where: str, otherwise: str = "another run_dir=") -> None:
    """Raises UserError if `config` would change the mathematics of the run in `where`, whose configuration is `old`.

    `otherwise` is the advice on how to use the new value.
    """
    before, after, free = flat(old), flat(config.plain()), marked(Free, type(config))
    for key in sorted(before.keys() | after.keys()):
        if key not in free and before.get(key) != after.get(key):
            raise UserError(
                f"{key}={format_value(after.get(key))}: the run in {where} has {key}={format_value(before.get(key))};"
                f" use that, or {otherwise}"
            )


def check_same_data(
    old: Mapping[str, Any], old_digest: str, new: Mapping[str, Any], new_digest: str, where: str
) -> None:
    """Raises UserError if the digest of the data is not that of the run in `where`.

    `old` and `new` are the data of the two configurations.
    """
    if old_digest != new_digest:
        raise UserError(
            f"{data_words(new)}: holds other data (digest {new_digest[:12]}) than the run in {where} was trained on"
            f" ({data_words(old)}, digest {old_digest[:12]}); use those, or another run_dir="
        )


def data_words(data: Mapping[str, Any]) -> str:
    """The data of a configuration, as on the command line."""
    return f"data.root={data['root']}" if data.get("root") is not None else f"data={data.get('name')}"


def run_state(directory: Path) -> Literal["new", "unfinished", "finished"]:
    """The state of the run in a directory."""
    summary = directory / "summary.json"
    if summary.is_file() and summary.stat().st_size:  # a power cut may leave an empty one
        return "finished"
    return "unfinished" if (directory / "config.json").is_file() else "new"


class RunConfig(Protocol):
    """The part of a configuration that all tasks have."""

    @property
    def run_dir(self) -> str | None:
        """The directory given by the user, if any."""

    @property
    def resume(self) -> str:
        """Whether to resume."""

    @property
    def init_from(self) -> str | None:
        """The file with the initial weights, if any."""

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values."""


def as_stored(config: RunConfig) -> dict[str, Any]:
    """A configuration as stored in checkpoints: independent of the directory and of interruptions."""
    return config.plain() | {key: stored.value for key, stored in marked(StoredAs, type(config)).items()}


def check_run_dir(directory: Path, config: RunConfig, *, may_be_finished: bool = False) -> None:
    """Raises UserError for a directory that is finished, not a run's, of another run, or not writable."""
    state = run_state(directory)
    try:
        if state == "finished" and not may_be_finished:
            raise UserError(
                f"run_dir={directory}: holds a finished run{_on_other_data(directory, config)}; read its summary.json,"
                f" or use another {'seed= or ' if config.run_dir is None else ''}run_dir="
            )
        if state == "finished" or (state == "unfinished" and config.resume != "never"):
            check_same_run(_read_config(directory, config), config, str(directory))
        if state == "new" and directory.exists() and any(path.suffix != ".part" for path in directory.iterdir()):
            raise UserError(f"run_dir={directory}: exists and holds no run; {_way_out(directory, config)}")
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


def _read_config(directory: Path, config: RunConfig) -> dict[str, Any]:
    try:
        return read_object(directory / "config.json")
    except UserError as error:
        raise UserError(f"{error}; {_way_out(directory, config)}") from error


def _way_out(directory: Path, config: RunConfig) -> str:
    """What to try in place of `directory`, whose config.json is missing or damaged."""
    last = directory / "checkpoints" / "last.pt"
    resumable = isinstance(config, Config) and last.is_file()  # other tasks resume from their own directory alone
    return "use another run_dir=" + (f", with resume={last} to resume from the checkpoint there" if resumable else "")


def _on_other_data(directory: Path, config: RunConfig) -> str:
    """A note if a finished run has its data in another place than `config`: they may differ."""
    try:
        old, new = read_object(directory / "config.json")["data"], config.plain()["data"]
        return "" if data_words(old) == data_words(new) else f" on {data_words(old)}, not on {data_words(new)}"
    except (UserError, LookupError, TypeError, AttributeError):
        return ""

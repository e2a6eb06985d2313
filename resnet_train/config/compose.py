"""From overrides to the values of a job, with Hydra, whose errors are reworded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_train.config import commands
from resnet_train.config.options import DATACLASSES, GROUPED, config_dir, groups, options
from resnet_train.config.quoting import as_typed
from resnet_train.config.schema import flat, key_for
from resnet_train.errors import UserError, nearest, nearest_data

# Exceptions of composition for invalid overrides; OSError: an option longer than a file name may be.
UNTAKEN = (HydraException, OmegaConfBaseException, ValueError, AssertionError, AttributeError, OSError, RecursionError)


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


def plain(composed: DictConfig) -> Any:
    """The resolved values of one job, as plain containers."""
    return OmegaConf.to_container(composed, resolve=True)


def known_keys(name: str) -> list[str]:
    """The keys and groups of a command."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        return _words(name, _keys(name, []))


def _words(name: str, keys: Iterable[str]) -> list[str]:
    """The names allowed on a command line: groups, and `keys` except Hydra's and those that it does not use."""
    return [key for key in keys if not key.startswith("hydra.") and key not in unused_keys(name)] + groups(name)


def unused_keys(name: str) -> tuple[str, ...]:
    """The keys of a command's configuration that it does not use."""
    return commands.UNREAD_BY_BENCH if name == "bench" else ()


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
        if key in unused_keys(name):
            return f"{item}: is not used by resnet-bench; remove it"
        known = key in keys or key in words or any(known.startswith(key + ".") for known in keys)
        if not known and not re.match(r"hydra\b", key):
            near = nearest(key_for(key, *DATACLASSES), words) or _members(key, words)
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

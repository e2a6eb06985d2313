"""From a command line to the values of its jobs, with Hydra; its complaints in our words."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_train.config.commands import FIXED_BY_BENCH
from resnet_train.config.keys import flat
from resnet_train.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = str(next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()))
DETECTION = ("detect", "predict")  # the commands whose configurations lie in a folder of their own, with its groups
GROUPED = ("train", "bench", "detect")  # the commands that choose options of groups
# What composing raises for overrides that cannot be taken; OSError: an option as long as no file name may be.
UNTAKEN = (HydraException, OmegaConfBaseException, ValueError, AssertionError, AttributeError, OSError, RecursionError)


def config_dir(name: str) -> str:
    """The folder of a command's configurations."""
    return str(Path(CONFIG_DIR, "detection")) if name in DETECTION else CONFIG_DIR


@functools.cache
def groups(name: str) -> list[str]:
    """The groups that a command has."""
    folders = (path.name for path in Path(config_dir(name)).iterdir() if path.is_dir())
    return sorted(folder for folder in folders if folder != "detection") if name in GROUPED else []


def check_hydras(words: list[str], multirun: bool) -> None:
    """Refuse what would go round this command's own checks. Raises UserError."""
    for item in words:
        key = item.lstrip("+~").partition("=")[0]
        if key == "hydra.searchpath":
            raise UserError(f"{item}: the configurations are this command's own; drop it")
        if key == "hydra.mode" and (multirun or item not in ("hydra.mode=RUN", "hydra.mode=MULTIRUN")):
            raise UserError(f"{item}: drop it; -m makes a sweep")


def plain(composed: DictConfig) -> Any:
    """The resolved values of one job, as its check takes them."""
    return OmegaConf.to_container(composed, resolve=True)


def jobs_of(name: str, overrides: list[str], sweep: bool) -> list[list[str]]:
    """The overrides of each job: the sweep written out, or the command line as it is."""
    parsed = []
    for item in overrides:
        try:
            override = OverridesParser.create().parse_override(item)
        except (HydraException, ValueError, RecursionError) as error:
            raise UserError(_misspelt(item, error)) from error
        if not override.key_or_group:
            raise UserError(f"{item!r}: is not key=value")
        if override.package is not None:
            raise UserError(f"{item}: no key is taken elsewhere with @ here; write {override.key_or_group}=VALUE")
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{item}: several values are a sweep; add -m, or quote a list as key=[a,b]")
        if override.key_or_group in groups(name) and isinstance(override.value(), (list, dict)):
            raise UserError(
                f"{item}: takes one option; for several runs add -m, for a value {override.key_or_group}.KEY=VALUE"
            )
        parsed.append(override)
    try:
        return BasicSweeper.split_arguments(parsed, None)[0] if sweep else [overrides]
    except (HydraException, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: {error}; write the values out, as in depth=20,56") from error


def with_jobs(overrides: list[str], sweep: bool) -> list[str]:
    """The overrides, and in a sweep of an experiment that names no job, all its jobs, here and in sys.argv.

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
    words = "job=" + ",".join(jobs)
    sys.argv.insert(sys.argv.index(named) + 1, words)
    return [*overrides, words]


def _misspelt(item: str, error: Exception) -> str:
    """Why Hydra does not understand an override."""
    key, equals, value = item.partition("=")
    try:
        OverridesParser.create().parse_override(f"{key}=1")
    except HydraException:
        equals = ""
    if not equals:
        return f"{item!r}: is not key=value"
    if not isinstance(error, HydraException) or len(value) > 200:
        return f"{item}: the value is too long, or nested too deeply"
    return f"{item}: the value needs quotes, as in '{key}=\"{value}\"'"


def compose(name: str, overrides: list[str], package: str | None = None) -> dict[str, Any]:
    """Plain, resolved values of one job. Raises UserError naming the override that is at fault.

    `package` is a part of the configuration to be shown, which must exist.
    """
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        chosen = _check_options(name, overrides)
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
            raise UserError(f"{item}: is there already; drop the +")
        if group in groups(name) and not parsed.is_delete():
            value = str(parsed.value())
            allowed = sorted(file.stem for file in Path(config_dir(name), group).glob("*.yaml"))
            if value not in allowed:
                raise UserError(f"{item}: allowed are {', '.join(allowed)}{nearest(value, allowed)}")
            chosen.append(item)
    return chosen


def _diagnosis(name: str, overrides: list[str], chosen: list[str], error: Exception) -> str:
    """Why composition failed, in our words: an unknown key, one that is missing, or the override and Hydra's reason."""
    keys = _keys(name, chosen)
    words = [key for key in keys if not key.startswith("hydra.")] + groups(name)
    for item in overrides:
        key = OverridesParser.create().parse_override(item).key_or_group
        if name == "bench" and key in FIXED_BY_BENCH:
            return f"{item}: means nothing to resnet-bench; drop it"
        if (
            not re.match(r"hydra\b", key)
            and key not in words
            and not any(known == key or known.startswith(key + ".") for known in keys)
        ):
            return f"{item}: there is no key {key}{nearest(key, words)}"
    missing = next((key for key in words if keys.get(key) == "???"), None)
    if missing and not any(item.startswith(missing + "=") for item in overrides):
        return f"{missing}: is needed; add {missing}=…"
    for reason in (error, error.__cause__):  # Hydra says which override, OmegaConf why
        if place := getattr(reason, "full_key", None):
            return f"{place}: {str(reason).splitlines()[0]}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def keys_asked(overrides: list[str]) -> list[str]:
    """The keys that the command line names."""
    keys = [item.lstrip("+~").split("=")[0] for item in overrides]
    return [key for key in keys if not key.startswith("hydra")]

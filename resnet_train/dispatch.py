"""From a command line to what it runs.

`main` has the command line taken apart and every job composed by Hydra and checked, which gives the arguments of what
the command's `run` names. Then Hydra shows help, configuration or completion, or has each job run, by `_start`, or in a
sweep by `_start_in_sweep`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from resnet_train import __version__
from resnet_train.config.completion import complete
from resnet_train.config.compose import (
    as_text,
    check_hydras,
    compose,
    config_dir,
    expand_words,
    explain,
    jobs_of,
    name_words,
    parse,
    plain,
    requested_keys,
    with_jobs,
)
from resnet_train.console import (
    call,
    check_restarts,
    exit_quietly,
    fail,
    finish,
    launcher_world_size,
    print_error,
    say_start,
)
from resnet_train.engine.limits import check_open_files
from resnet_train.errors import UserError, from_machine_error, from_os_error, nearest
from resnet_train.sweep import check_all_finished, check_place, run_apart, run_here
from resnet_train.terminal import say

Values = dict[str, Any]  # of one job, composed
Check = Callable[[Values, list[str]], tuple[Any, ...]]  # takes them and the keys that the command line names


@dataclasses.dataclass(frozen=True)
class Command:
    """One command."""

    name: str  # of its configuration, configs/NAME.yaml
    typed: str  # how it is called
    check: Check
    run: str  # the import path of what runs a job, called with what `check` gives; imported only then
    data: str = ""  # of a command that trains, and so can be swept: what opens the data of a configuration
    processes: bool = False  # whether a job may be several processes: devices=N, or torchrun's
    no_sweep: str = ""  # else what is said of -m
    no_launcher: str = ""  # else what is said of torchrun
    words: tuple[str, ...] = ()  # the keys that words without = stand for, in order; a single one takes all of them
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what may be typed for a word, or for KEY=
    torch: bool = True  # whether it takes torch, and so a second or more before there is anything to be seen


def main(command: Command, *more: Command, words: list[str] | None = None) -> None:
    """Do what a command line asks for: of `command`, or of one of `more` that are typed with a word more."""
    words = sys.argv[1:] if words is None else words
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing them
    first, others = words[0] if words else "", {other.typed.split()[1]: other for other in more}
    typed = os.environ.get("COMP_LINE", "").split(" ") if first == "-sc" else []
    if len(typed) > 2:  # a shell asks what may follow: words without = are another command's or files, not Hydra's
        command = others.get(typed[1], command)
        os.environ["COMP_LINE"] = " ".join([typed[0], *(word for word in typed[1:-1] if "=" in word), typed[-1]])
    if first in others:
        command, words = others[first], words[1:]
    try:
        if near := "" if first in others or "=" in first else nearest(first, others):
            raise UserError(f"{first!r}: is not key=value{near}")
        _follow(command, words)
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own: jobs keep theirs
        fail(UserError(str(error)))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        exit_quietly()
    except OSError as error:
        fail(UserError(f"{error.filename}: {error.strerror}") if error.filename else from_os_error(error))
    except Exception as error:
        hydras = [word for word in words if re.match(r"[+~]*hydra\b|-sc|--sh", word)]
        if not hydras:
            if refused := from_machine_error(error):
                fail(refused)
            raise
        fail(UserError(f"{' '.join(hydras)}: Hydra cannot take that ({type(error).__name__}: {error})"))


def _follow(command: Command, words: list[str]) -> None:
    """Check every job that a command line asks for, then let Hydra run them (or show help, config, completion)."""
    if "--version" in words:
        say(f"resnet-train {__version__}")
        return
    line = parse(command.name, expand_words(words, command.short))
    if line.shell_completion and any(item.startswith("query=") for item in line.overrides):
        values = complete(command.name, os.environ.get("COMP_LINE", ""), command.short)
        for value in values:
            say(value)
        if values:
            return
    overrides, images = name_words(command.words, line.overrides)
    hydras = [item for item in overrides if re.match(r"[+~]*hydra\b", item)]
    check_hydras(hydras, line.multirun)
    sweep = line.multirun or "hydra.mode=MULTIRUN" in hydras
    jobs: list[tuple[Any, ...]] = []
    if not line.shell_completion:
        overrides = [as_text(item, sweep) for item in overrides]
        overrides = with_jobs(overrides, sweep) if command.name == "train" else overrides
        if not (line.help or line.hydra_help or line.info):
            _check_start(command, sweep)
            jobs = _prepare_all(command, overrides, images, sweep, line)

    def job(composed: DictConfig) -> None:
        if sweep:
            _start_in_sweep(command, composed)
        else:
            _start(command, jobs[0])

    sys.argv = [command.typed.split()[0], *line.flags, *overrides]
    run = hydra.main(version_base="1.3", config_path=config_dir(command.name), config_name=command.name)(job)
    if line.help:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            run()
        sys.stdout.write(explain(shown.getvalue(), command.name, overrides))
        return
    run()
    if sweep and not line.cfg:
        check_all_finished([directory for _, directory in jobs])


def _check_start(command: Command, sweep: bool) -> None:
    """Refuse -m and launchers where they make no sense. Raises UserError."""
    if sweep and command.no_sweep:
        raise UserError(command.no_sweep)
    if launcher_world_size() and command.no_launcher:
        raise UserError(command.no_launcher)
    if sweep and launcher_world_size():
        raise UserError(
            f"-m: torchrun would start the sweep in each of its processes; use {command.typed} -m"
            f" devices={os.environ.get('LOCAL_WORLD_SIZE', '8')} … without torchrun, or torchrun for one run"
        )
    check_restarts()


def _prepare_all(
    command: Command, overrides: list[str], images: list[str], sweep: bool, line: Any
) -> list[tuple[Any, ...]]:
    """Of every job what it is run with. With --cfg only the configuration of training is checked. Raises UserError."""
    prepared: list[tuple[Any, ...]] = []
    jobs = jobs_of(command.name, overrides, sweep)
    if not jobs:
        empty = [item for item in overrides if not jobs_of(command.name, [item], sweep=True)]
        what = "is no value at all, and the sweep without a job; write the values out, as in seed=0,1,2"
        raise UserError(f"{' '.join(empty)}: {what}")
    for overrides in jobs:
        values = compose(command.name, overrides, line.package)
        if "images" in command.words and "images" in values:
            raise UserError("images: there is no such key; images are words without a =")
        if line.cfg and not command.data:
            continue
        found = prepare(
            command, values | ({"images": images} if "images" in command.words else {}), overrides, sweep, line.cfg
        )
        if command.data and found[1] in [directory for _, directory in prepared]:
            named = any(item.startswith("run_dir=") for item in overrides)
            what = "a value named twice, or the key that the jobs themselves set"
            what = "run_dir=" if named else f"{what}, or one that no folder is named after, such as compile"
            raise UserError(f"run_dir: two jobs of the sweep would share {found[1]}; leave out {what}")
        prepared.append(found)
    return prepared


def prepare(command: Command, values: Values, overrides: list[str], sweep: bool, show: Any = None) -> tuple[Any, ...]:
    """What one job is run with, checked; its directory as well, unless it is only to be shown. Raises UserError."""
    arguments = command.check(values, requested_keys(overrides))
    if command.data and not show:
        config, directory = arguments
        if os.environ.get("RANK", "0") == "0":
            check_place(directory, config, command.data, sweep)
        if getattr(config.data, "family", None) != "cifar":  # whose images lie in memory
            check_open_files(config.data.workers)
    return arguments


def _start(command: Command, arguments: tuple[Any, ...]) -> NoReturn:
    """Do one job, and exit."""
    job = functools.partial(call, command.run, *arguments)
    if command.data:
        run_here(job, *arguments)
    if command.processes:
        finish(job, arguments[0], name=command.typed, file=sys.stderr)
    if command.torch:
        say_start(command.typed, file=sys.stderr)
    sys.exit(job())


def _start_in_sweep(command: Command, composed: DictConfig) -> None:
    """Do one job of a sweep, wherever Hydra's launcher has brought it."""
    try:
        arguments = prepare(command, plain(composed), list(HydraConfig.get().overrides.task), sweep=True)
    except UserError as error:  # not so when the command began
        print_error(error)
        return
    run_apart(functools.partial(call, command.run, *arguments), *arguments)

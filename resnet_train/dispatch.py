"""Run what a command line asks for.

`main` parses the command line, and composes and checks every job, which gives the arguments of the function that the
command's `run` names. Then Hydra shows help, configuration or completion, or runs each job by `_start`, or in a sweep
by `_start_in_sweep`.
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
from resnet_train.config.compose import compose, plain
from resnet_train.config.help import explain
from resnet_train.config.options import config_dir
from resnet_train.config.quoting import as_text
from resnet_train.config.words import check_hydras, expand_words, jobs_of, name_words, parse, requested_keys, with_jobs
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
from resnet_train.sweep import check_directory, conclude, run_and_exit, run_in_process
from resnet_train.terminal import say

Values = dict[str, Any]  # of one job, composed
Check = Callable[[Values, list[str]], tuple[Any, ...]]  # of the values and the keys on the command line


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: how a job is checked and what runs it."""

    name: str  # of its configuration, configs/NAME.yaml
    typed: str  # what the user types
    check: Check
    run: str  # the import path of the function that runs a job, called with what `check` returns
    data: str = ""  # for a command that trains, the import path of the function that opens the data
    processes: bool = False  # whether a job may be several processes: devices=N, or torchrun's
    no_sweep: str = ""  # the error for -m, if refused
    no_launcher: str = ""  # the error for torchrun, if refused
    words: tuple[str, ...] = ()  # the keys of words without =, in order; a single key takes them all
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)  # abbreviations of a word, or of KEY=
    torch: bool = True  # whether it imports torch, which takes a second or more


def main(command: Command, *more: Command, words: list[str] | None = None) -> None:
    """Run a command line: `command`, or one of `more`, whose names have a second word."""
    words = sys.argv[1:] if words is None else words
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    first, others = words[0] if words else "", {other.typed.split()[1]: other for other in more}
    typed = os.environ.get("COMP_LINE", "").split(" ") if first == "-sc" else []
    if len(typed) > 2:  # completion: Hydra does not know words without =, such as files
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
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # of Hydra; errors of jobs end in `call`
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
            if failure := from_machine_error(error):
                fail(failure)
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
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as captured:
            run()
        sys.stdout.write(explain(captured.getvalue(), command.name, overrides))
        return
    run()
    if sweep and not line.cfg:
        conclude([directory for _, directory in jobs])


def _check_start(command: Command, sweep: bool) -> None:
    """Refuse -m and launchers for commands that cannot use them. Raises UserError."""
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
    """The arguments of every job. With --cfg only commands that train are checked. Raises UserError."""
    prepared: list[tuple[Any, ...]] = []
    jobs = jobs_of(command.name, overrides, sweep)
    if not jobs:
        empty = [item for item in overrides if not jobs_of(command.name, [item], sweep=True)]
        what = "gives no values, so that the sweep has no job; list the values, as in seed=0,1,2"
        raise UserError(f"{' '.join(empty)}: {what}")
    for overrides in jobs:
        values = compose(command.name, overrides, line.package)
        if "images" in command.words and "images" in values:
            raise UserError("images: there is no such key; images are words without a =")
        if line.cfg and not command.data:
            continue
        arguments = prepare(
            command, values | ({"images": images} if "images" in command.words else {}), overrides, sweep, line.cfg
        )
        if command.data and arguments[1] in [directory for _, directory in prepared]:
            named = any(item.startswith("run_dir=") for item in overrides)
            what = "a value named twice, or the key that the jobs themselves set"
            what = "run_dir=" if named else f"{what}, or one that no folder is named after, such as compile"
            raise UserError(f"run_dir: two jobs of the sweep would share {arguments[1]}; leave out {what}")
        prepared.append(arguments)
    return prepared


def prepare(command: Command, values: Values, overrides: list[str], sweep: bool, show: Any = None) -> tuple[Any, ...]:
    """Check a job and, unless it is only shown, its directory; return its arguments. Raises UserError."""
    arguments = command.check(values, requested_keys(overrides))
    if command.data and not show:
        config, directory = arguments
        if os.environ.get("RANK", "0") == "0":
            check_directory(directory, config, command.data, sweep)
        if getattr(config.data, "family", None) != "cifar":  # whose images are in memory
            check_open_files(config.data.workers)
    return arguments


def _start(command: Command, arguments: tuple[Any, ...]) -> NoReturn:
    """Run a job and exit."""
    job = functools.partial(call, command.run, *arguments)
    if command.data:
        run_and_exit(job, *arguments)
    if command.processes:
        finish(job, arguments[0], name=command.typed, file=sys.stderr)
    if command.torch:
        say_start(command.typed, file=sys.stderr)
    sys.exit(job())


def _start_in_sweep(command: Command, composed: DictConfig) -> None:
    """Run a job of a sweep, on the machine that Hydra's launcher chose."""
    try:
        arguments = prepare(command, plain(composed), list(HydraConfig.get().overrides.task), sweep=True)
    except UserError as error:  # arose after the sweep's start
        print_error(error)
        return
    run_in_process(functools.partial(call, command.run, *arguments), *arguments)

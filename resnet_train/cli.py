"""The commands. Configurations are composed and checked here, before torch is imported; errors become one line."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_train import config as configs
from resnet_train.errors import SIGNALS, RunError, UserError, of_a_peer, of_the_system
from resnet_train.files import expand

_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = str(next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()))
DETECTION = ("detect", "predict")  # the commands whose configurations lie in a folder of their own, with its groups
GROUPED = ("train", "bench", "detect")  # the commands that choose options of groups
LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what each of them sets in the environment
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


def train() -> None:
    """The command `resnet-train`."""
    _command("train", _prepare_train, _train_job)


def evaluate() -> None:
    """The command `resnet-eval`."""
    _data_is_a_value()
    _command("eval", _prepare_eval, _eval_job)


def bench() -> None:
    """The command `resnet-bench`."""
    if re.fullmatch(r"[^=-][^=]*", "".join(sys.argv[1:2])):  # the first word: what to measure
        sys.argv[1] = "bench=" + sys.argv[1]
    _command("bench", _prepare_bench, _bench_job)


def report() -> None:
    """The command `resnet-report`."""
    # What is no key=value is a run; the first word may also say what to report on.
    words = ["open=true" if word == "--open" else word for word in sys.argv[1:]]
    folders = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).is_dir())]
    kept = [word for word in words if word not in folders]
    if folders[:1] == ["complexity"]:
        kept.append("report=complexity")
        folders = folders[1:]
    if folders:
        kept.append(f"runs=[{','.join(map(_quoted, folders))}]")
    # Hydra takes overrides together, not around a flag.
    sys.argv[1:] = sorted(kept, key=lambda word: not word.startswith("-") and "=" in word)
    _command("report", _prepare_report, _report_job)


def responses() -> None:
    """The command `resnet-responses`."""
    _data_is_a_value()
    _command("responses", _prepare_responses, _responses_job)


def _data_is_a_value() -> None:
    """Here data is no group (a data set's recipe has no say in a test), but `data=` means what it means in training."""
    sys.argv = ["data.name=" + a.removeprefix("data=") if a.startswith("data=") else a for a in sys.argv]


def _quoted(text: str) -> str:
    """`text` as Hydra reads it back, whatever it holds."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'


def pack() -> None:
    """The command `resnet-pack`."""
    # Here data is no group either, and what can be packed is what data=imagenet reads.
    sys.argv = [word for word in sys.argv if word != "data=imagenet"]
    _command("pack", _prepare_pack, _pack_job)


def weights() -> None:
    """The command `resnet-weights`."""
    words = _take_words()
    _data_is_a_value()
    found: list[Any] = []

    def prepare(values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True) -> tuple[None, None]:
        found[:] = _prepare_weights(values, overrides, words, sweep) if look else []
        return None, None

    _command("weights", prepare, lambda _: sys.exit(_code(functools.partial(_weights_here, *found))))


def classify() -> None:
    """The command `resnet-classify`."""
    images = _take_words()

    def prepare(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[Any, None]:
        if sweep or _launched():
            raise UserError("resnet-classify is one process with one checkpoint; take it without -m and torchrun")
        return configs.check_classify(values, images) if look else None, None

    def job(composed: DictConfig) -> NoReturn:
        values: Any = OmegaConf.to_container(composed, resolve=True)
        sys.exit(_code(functools.partial(_classify_here, configs.check_classify(values, images), images)))

    _command("classify", prepare, job)


def detect() -> None:
    """The command `resnet-detect`."""
    if sys.argv[1:2] != ["predict"]:
        _command("detect", _prepare_detect, _detect_job)
        return
    del sys.argv[1]
    images = _take_words()

    def prepare(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[Any, None]:
        from resnet_train.detection.config import check_predict

        if sweep or _launched():
            raise UserError("resnet-detect predict is one process with one checkpoint; take it without -m and torchrun")
        return check_predict(values, images) if look else None, None

    def job(composed: DictConfig) -> NoReturn:
        values: Any = OmegaConf.to_container(composed, resolve=True)
        sys.exit(_code(functools.partial(_predict_here, prepare(values, [], sweep=False)[0], images)))

    _command("predict", prepare, job)


def _take_words() -> list[str]:
    """Take from the command line what is no flag and no KEY=VALUE: files by any name, which Hydra is not to parse."""
    parser = get_args_parser()
    parser.error = _usage  # type: ignore[method-assign]
    try:
        overrides = parser.parse_args().overrides
    except UserError as error:
        _fail(error)
    words = [word for word in overrides if not re.match(r"[+~]*(hydra/\w+|[A-Za-z_][\w.]*)=", word)]
    for word in words:
        sys.argv.remove(word)
    return words


def _command(name: str, prepare: Callable[..., Any], job: Callable[[DictConfig], Any]) -> None:
    """Check every job that the command line asks for, then let Hydra run them (or show help, config, completion)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing them
    hydras: list[str] = []  # the words that are for Hydra
    try:
        parser = get_args_parser()
        parser.error = _usage  # type: ignore[method-assign]
        arguments = parser.parse_args()
        for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: the configurations are this command's own; drop it")
        hydras = [item for item in arguments.overrides if re.match(r"[+~]*hydra\b", item)]
        hydras += ["--shell-completion"] if arguments.shell_completion else []
        _check_hydras(hydras, arguments.multirun)
        sweep = arguments.multirun or "hydra.mode=MULTIRUN" in hydras
        if name == "train" and not arguments.shell_completion:
            arguments.overrides = _with_jobs(arguments.overrides, sweep)
        if sweep and _launched():
            raise UserError(
                f"-m: torchrun would start the sweep in each of its processes; take resnet-{name} -m"
                f" devices={os.environ.get('LOCAL_WORLD_SIZE', '8')} … without torchrun, or torchrun for one run"
            )
        if _launched() > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            _check_restarts()
        places: list[Path] = []
        jobs = [] if arguments.shell_completion else _jobs(name, arguments.overrides, sweep)
        if not (arguments.help or arguments.hydra_help or arguments.info):
            for overrides in jobs:
                values = _compose(name, overrides, arguments.package)
                places.append(prepare(values, overrides, sweep, look=not arguments.cfg)[1])
                if places[-1] in places[:-1]:
                    raise UserError(
                        f"run_dir: two jobs of the sweep would share {places[-1]}; leave out run_dir=, or the key that"
                        " the jobs themselves set"
                    )
        hydra.main(version_base="1.3", config_path=config_dir(name), config_name=name)(job)()
        if sweep and not arguments.cfg:
            _check_all_finished(places)
    except UserError as error:
        _fail(error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own: jobs keep theirs
        _fail(UserError(str(error)))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as in `resnet-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(UserError(f"{error.filename}: {error.strerror}") if error.filename else of_the_system(error))
    except Exception as error:
        if not hydras:
            raise
        _fail(UserError(f"{' '.join(hydras)}: Hydra cannot take that ({type(error).__name__}: {error})"))


def _check_hydras(words: list[str], multirun: bool) -> None:
    """Refuse what would go round this command's own checks. Raises UserError."""
    for item in words:
        key = item.lstrip("+~").partition("=")[0]
        if key == "hydra.searchpath":
            raise UserError(f"{item}: the configurations are this command's own; drop it")
        if key == "hydra.mode" and (multirun or item not in ("hydra.mode=RUN", "hydra.mode=MULTIRUN")):
            raise UserError(f"{item}: drop it; -m makes a sweep")


def _check_restarts() -> None:
    """Refuse a torchrun whose restarts would not come off: with its store, the addresses of the dead outlive them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts= needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and"
            " --rdzv-backend=c10d; else the processes started again may look for those that died"
        )


def _check_all_finished(places: list[Path]) -> None:
    """Tell at a sweep's end which of its runs in `places` failed, here or wherever the launcher ran them."""
    failed = [str(place) for place in places if configs.run_state(place) != "finished"]
    if failed:
        raise RunError(f"{len(failed)} of {len(places)} jobs of the sweep did not finish: {', '.join(failed)}")


def _usage(message: str) -> NoReturn:
    raise UserError(f"{message}; --help shows what there is")


def _fail(error: UserError) -> NoReturn:
    """One line on stderr, from one process of each machine, and the error's exit code."""
    if _rank() != "0" and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # a launcher that saw this one's end first would end the one that tells before it has
    else:
        _tell(error)
    sys.exit(error.code)


def _tell(error: UserError) -> None:
    """One line on stderr; an error that all processes meet is the first one's to tell."""
    rank = _rank()
    if rank == "0" or not error.shared:
        who = "" if rank == "0" else f"rank {rank}: "
        print(f"error: {who}{_line(str(error))}", file=sys.stderr, flush=True)


def _line(text: str) -> str:
    """`text` as one line that a terminal can show; of what is very long, its beginning and its end."""
    words = [word if len(word) <= 240 else f"{word[:120]}…{word[-40:]}" for word in text.split()]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(words))
    return text if len(text) <= 900 else f"{text[:500]} … {text[-300:]}"


def _rank() -> str:
    """The number of this process among those that a launcher has started, as the launcher spells it."""
    return os.environ["RANK"] if all(name in os.environ for name in LAUNCHERS) else "0"


def _launched() -> int:
    """The number of processes that torchrun, Slurm or our own launcher has started; 0 outside of them."""
    if not all(name in os.environ for name in LAUNCHERS):
        return 0
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]}: must be a whole number; unset it, or leave it to torchrun")
    return int(os.environ["WORLD_SIZE"])


def _jobs(name: str, overrides: list[str], multirun: bool) -> list[list[str]]:
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
        if override.is_sweep_override() and not multirun:
            raise UserError(f"{item}: several values are a sweep; add -m, or quote a list as key=[a,b]")
        if override.key_or_group in groups(name) and isinstance(override.value(), (list, dict)):
            raise UserError(
                f"{item}: takes one option; for several runs add -m, for a value {override.key_or_group}.KEY=VALUE"
            )
        parsed.append(override)
    try:
        return BasicSweeper.split_arguments(parsed, None)[0] if multirun else [overrides]
    except (HydraException, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: {error}; write the values out, as in depth=20,56") from error


def _with_jobs(overrides: list[str], sweep: bool) -> list[str]:
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
            raise UserError(f"job={job}: {named} has {', '.join(jobs)}{configs.nearest(job, jobs)}")
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


def _compose(name: str, overrides: list[str], package: str | None = None) -> dict[str, Any]:
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
    return configs.flat(OmegaConf.to_container(composed, resolve=False))  # type: ignore[arg-type]


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
                raise UserError(f"{item}: allowed are {', '.join(allowed)}{configs.nearest(value, allowed)}")
            chosen.append(item)
    return chosen


def _diagnosis(name: str, overrides: list[str], chosen: list[str], error: Exception) -> str:
    """Why composition failed, in our words: an unknown key, one that is missing, or the override and Hydra's reason."""
    keys = _keys(name, chosen)
    words = [key for key in keys if not key.startswith("hydra.")] + groups(name)
    for item in overrides:
        key = OverridesParser.create().parse_override(item).key_or_group
        if name == "bench" and key in configs.FIXED_BY_BENCH:
            return f"{item}: means nothing to resnet-bench; drop it"
        if (
            not re.match(r"hydra\b", key)
            and key not in words
            and not any(known == key or known.startswith(key + ".") for known in keys)
        ):
            return f"{item}: there is no key {key}{configs.nearest(key, words)}"
    missing = next((key for key in words if keys.get(key) == "???"), None)
    if missing and not any(item.startswith(missing + "=") for item in overrides):
        return f"{missing}: is needed; add {missing}=…"
    for reason in (error, error.__cause__):  # Hydra says which override, OmegaConf why
        if place := getattr(reason, "full_key", None):
            return f"{place}: {str(reason).splitlines()[0]}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _take_launched(values: dict[str, Any], asked: list[str]) -> None:
    """Take the number of processes from a launcher, if there is one, which alone may say it."""
    if _launched():
        for key in ("devices", "max_restarts"):
            if key in asked:
                raise UserError(f"{key}={values.get(key)}: that is the launcher's to say, such as torchrun; drop it")
        values["devices"] = _launched()


def _prepare_train(
    values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True
) -> tuple[configs.Config, Path]:
    """The checked configuration of one job and its directory, which is looked at; a sweep may find it finished."""
    asked = _asked(overrides)
    for key in ("experiment", "job", "jobs"):  # they have said which net and seed
        values.pop(key, None)
    _take_launched(values, asked)
    if "scale" not in values:
        raise UserError("scale: is missing")
    config = configs.check(values, asked)
    directory = configs.run_directory(config, asked, values["scale"])
    if look and os.environ.get("RANK", "0") == "0":
        configs.check_run_dir(directory, config, may_be_finished=sweep)
    return config, directory


def _prepare_detect(values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True) -> tuple[Any, Path]:
    """The checked configuration of one run of a detector and its directory, which is looked at."""
    from resnet_train.detection.config import check_detect, run_directory

    asked = _asked(overrides)
    _take_launched(values, asked)
    config = check_detect(values, asked)
    directory = run_directory(config, asked)
    if look and os.environ.get("RANK", "0") == "0":
        configs.check_run_dir(directory, config, may_be_finished=sweep)
    return config, directory


def _prepare_eval(
    values: dict[str, Any], _: list[str], sweep: bool, look: bool = True
) -> tuple[configs.EvalConfig, Path | None]:
    if sweep:
        raise UserError("-m: resnet-eval takes one checkpoint at a time")
    return configs.check_eval(values), None


def _prepare_report(
    values: dict[str, Any], _: list[str], sweep: bool, look: bool = True
) -> tuple[configs.ReportConfig, None]:
    if sweep:
        raise UserError("-m: resnet-report takes all runs at once")
    return configs.check_report(values), None


def _prepare_responses(
    values: dict[str, Any], _: list[str], sweep: bool, look: bool = True
) -> tuple[configs.ResponsesConfig, None]:
    if sweep:
        raise UserError("-m: resnet-responses takes all checkpoints at once, as checkpoint=[one.pt,two.pt]")
    if _launched() > 1:
        raise UserError("resnet-responses is one process; take it without torchrun")
    return configs.check_responses(values), None


def _prepare_pack(
    values: dict[str, Any], _: list[str], sweep: bool, look: bool = True
) -> tuple[configs.PackConfig, None]:
    if sweep:
        raise UserError("-m: resnet-pack packs one tree at a time")
    if _launched():
        raise UserError("resnet-pack starts its own processes (workers=); take it without torchrun")
    return configs.check_pack(values), None


def _prepare_bench(
    values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True
) -> tuple[tuple[configs.BenchConfig, configs.Config], None]:
    if sweep:
        raise UserError("-m: resnet-bench measures one thing at a time")
    if _launched():
        raise UserError("resnet-bench measures one process; take it without torchrun")
    return configs.check_bench(values, _asked(overrides)), None


def _prepare_weights(
    values: dict[str, Any], overrides: list[str], words: list[str], sweep: bool
) -> tuple[configs.WeightsConfig, dict[str, dict[str, Any]]]:
    """The checked configuration, and of an import what a training run would have, for each family that it may be."""
    if sweep or _launched():
        raise UserError("resnet-weights is one process with one file; take it without -m and torchrun")
    if len(words) > 2:
        raise UserError(f"{' '.join(words[2:])}: resnet-weights takes one file at a time")
    asked = configs.check_weights(values | dict(zip(("word", "file"), words, strict=False)), _asked(overrides))
    if asked.word == "export":
        return asked, {}
    names = {"imagenet": "imagenet", "cifar": "cifar10"}
    if asked.data.name != "auto":
        names = dict.fromkeys(names, asked.data.name)
    return asked, {family: _compose("train", [f"data={name}"]) for family, name in names.items()}


def _asked(overrides: list[str]) -> list[str]:
    """The keys that the command line names."""
    keys = [item.lstrip("+~").split("=")[0] for item in overrides]
    return [key for key in keys if not key.startswith("hydra")]


def _train_job(composed: DictConfig) -> None:
    """One run of `resnet-train`."""
    _run_job(composed, _prepare_train, _train_here)


def _detect_job(composed: DictConfig) -> None:
    """One run of `resnet-detect`."""
    _run_job(composed, _prepare_detect, _detect_here)


def _run_job(composed: DictConfig, prepare: Callable[..., Any], here: Callable[[Any, Path], int]) -> None:
    """One run; in a sweep in a process of its own, so that nothing leaks from one job to the next."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        config, directory = prepare(values, list(HydraConfig.get().overrides.task), sweep)
    except UserError as error:  # not so when the command began
        if not sweep:
            _fail(error)
        _tell(error)
        return
    if not sweep:
        _work(here, config, directory)
    if configs.run_state(directory) == "finished":
        print(f"{directory}: finished, skipped", flush=True)
        return
    _start_tracker()
    process = multiprocessing.get_context("spawn").Process(target=_work_of_sweep, args=(here, config, directory))
    stopped: list[int] = []

    def forward(number: int, _: Any) -> None:
        stopped.append(number)
        if process.pid and number != signal.SIGINT:  # a terminal sends Ctrl-C to the worker as well
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    process.start()
    for number in tuple(stopped):  # those that came while it was being started
        forward(number, None)
    process.join()
    for number, handler in before.items():
        signal.signal(number, handler)
        if number in stopped and callable(handler):  # now that the checkpoint is written: submitit's puts the job back
            handler(number, None)  # in the queue, Python's own ends the sweep
    assert process.exitcode is not None
    code = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode  # as a shell counts
    if stopped or code - 128 in SIGNALS:  # a sweep that is cut does not go on to its next job
        sys.exit(code or 128 + stopped[0])


def _start_tracker() -> None:
    """Start Python's helper of spawned processes, deaf to what Slurm sends to all processes of a job.

    It ignores SIGINT and SIGTERM by itself; of the others it would die, and fill stderr.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGUSR2))


def _work_of_sweep(here: Callable[[Any, Path], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit; where the sweep itself is killed, with a checkpoint, as on SIGTERM."""
    threading.Thread(target=_follow_sweep, daemon=True).start()
    _work(here, config, directory)


def _follow_sweep() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGTERM)


def _work(here: Callable[[Any, Path], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit."""
    _run(functools.partial(here, config, directory), config, config.max_restarts)


def _train_here(config: configs.Config, directory: Path) -> int:
    """Train in this process, alone or as one of several; the exit code."""
    from resnet_train.run import train as run

    return _code(lambda: run(config, directory))


def _detect_here(config: Any, directory: Path) -> int:
    """Train a detector in this process, alone or as one of several; the exit code."""
    from resnet_train.detection.train import detect as run

    return _code(lambda: run(config, directory))


def _predict_here(asked: Any, images: list[str]) -> None:
    from resnet_train.detection.predict import predict as run

    run(asked, images)


def _eval_job(composed: DictConfig) -> None:
    """One evaluation."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    asked = configs.check_eval(values)
    _run(functools.partial(_eval_here, asked), asked)


def _eval_here(asked: configs.EvalConfig) -> int:
    """Evaluate in this process, alone or as one of several; the exit code."""
    from resnet_train.evaluate import evaluate_checkpoint

    return _code(lambda: evaluate_checkpoint(asked))


def _report_job(composed: DictConfig) -> None:
    """One report, in this process, without torch."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    asked = configs.check_report(values)
    from resnet_train.report.command import report as write

    try:
        write(asked)
    except UserError as error:
        _fail(error)


def _responses_job(composed: DictConfig) -> None:
    """The responses of all checkpoints."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    sys.exit(_code(functools.partial(_responses_here, configs.check_responses(values))))


def _responses_here(asked: configs.ResponsesConfig) -> None:
    from resnet_train.responses import responses as measure

    measure(asked)


def _bench_job(composed: DictConfig) -> None:
    """One sub-benchmark."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    asked, config = _prepare_bench(values, list(HydraConfig.get().overrides.task), sweep=False)[0]
    sys.exit(_code(functools.partial(_bench_here, asked, config)))


def _bench_here(asked: configs.BenchConfig, config: configs.Config) -> None:
    from resnet_train.bench import bench as measure

    measure(asked, config)


def _pack_job(composed: DictConfig) -> None:
    """One packing, or the check of one."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    sys.exit(_code(functools.partial(_pack_here, configs.check_pack(values))))


def _pack_here(asked: configs.PackConfig) -> None:
    from resnet_train.data.pack import check_packed
    from resnet_train.data.pack import pack as write

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if asked.check is not None:
        return check_packed(asked.check, asked.workers)
    assert asked.data.root is not None  # config.check_pack has seen to it
    assert asked.out is not None
    return write(
        root=asked.data.root,
        out=expand(asked.out),
        shorter_side=asked.shorter_side,
        quality=asked.quality,
        images=asked.shard_images,
        workers=asked.workers,
        broken=asked.data.broken,
    )


def _weights_here(asked: configs.WeightsConfig, bases: dict[str, dict[str, Any]]) -> None:
    from resnet_train import weights

    if asked.word == "export":
        weights.export(asked)
    else:
        weights.import_weights(asked, bases)


def _classify_here(asked: configs.ClassifyConfig, images: list[str]) -> None:
    from resnet_train.classify import classify as run

    run(asked, images)


def _run(job: Callable[[], int], config: Any, max_restarts: int = 0) -> NoReturn:
    """Exit with what `job` gives: here, as one of a launcher's processes, or in new processes for several devices."""
    if _launched():
        code = job()
        # torchrun takes another exit code for a failure: it would start all again, or end the whole job with 1.
        sys.exit(0 if code > 128 and "TORCHELASTIC_RUN_ID" in os.environ else code)
    if config.devices == 1 and not max_restarts:
        sys.exit(job())
    _start_tracker()
    from resnet_train.launch import launch, pick_processes

    sys.exit(_code(lambda: launch(job, pick_processes(config.devices, config.device), max_restarts)))


def _code(job: Callable[[], int | None]) -> int:
    """The job's own exit code, 0 for none; one line for what the user or the machine lacks. Bugs keep their trace.

    An error that this process alone meets ends it here, without a word to those that wait for it but its end.
    """
    import torch

    try:
        return job() or 0
    except UserError as error:
        told = error
    except torch.OutOfMemoryError as error:
        told = RunError(
            f"out of memory; take a smaller batch_size= (or device_batch_size=) ({str(error).splitlines()[0]})"
        )
    except BrokenPipeError:  # as in `resnet-detect predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        told = of_the_system(error)
    except KeyboardInterrupt:  # the second Ctrl-C
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if _launched() and torch.distributed.is_initialized() and isinstance(error, RuntimeError):
            _lost(error)
        traceback.print_exc()
        sys.exit(1)
    _tell(told)
    if told.shared:
        return told.code
    sys.exit(told.code)


def _lost(error: RuntimeError) -> None:
    """Leave it to the launcher to end this process, if `error` came of the end of another, which it is to name."""
    line = of_a_peer(error)
    if line:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)
        _tell(RunError(f"lost the other processes ({line[:200]}); the same command goes on from the last checkpoint"))
        sys.exit(1)

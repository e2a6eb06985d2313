"""The commands: each job is checked before torch is imported, and then done."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from resnet_train import __version__
from resnet_train.compose import (
    as_text,
    check_hydras,
    compose,
    config_dir,
    jobs_of,
    keys_asked,
    no_flag,
    plain,
    quoted,
    with_jobs,
)
from resnet_train.config.commands import (
    BenchConfig,
    ClassifyConfig,
    EvalConfig,
    PackConfig,
    ReportConfig,
    ResponsesConfig,
    WeightsConfig,
    check_bench,
    check_classify,
    check_eval,
    check_pack,
    check_report,
    check_responses,
    check_weights,
)
from resnet_train.config.runs import check_run_dir, check_same_data, run_directory, run_state
from resnet_train.config.training import Config, check_train
from resnet_train.errors import SIGNALS, RunError, UserError, of_the_system
from resnet_train.exits import exit_code, fail, finish, launched, leave, start_tracker, tell
from resnet_train.files import expand, read_object
from resnet_train.terminal import say

DIGESTS: dict[str, str] = {}  # of the data of this command's jobs, as far as they were needed


def train() -> None:
    """The command `resnet-train`."""
    _command("train", _prepare_train, _train_job)


def evaluate() -> None:
    """The command `resnet-eval`."""
    _words_are_checkpoints("eval")
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
    folders = [word for word in words if not word.startswith("-") and ("=" not in word or os.path.isdir(word))]
    kept = [word for word in words if word not in folders]
    if folders[:1] == ["complexity"]:
        kept.append("report=complexity")
        folders = folders[1:]
    if folders:
        kept.append(f"runs=[{','.join(map(quoted, folders))}]")
    sys.argv[1:] = kept
    _command("report", _prepare_report, _report_job)


def responses() -> None:
    """The command `resnet-responses`."""
    _words_are_checkpoints("responses")
    _data_is_a_value()
    _command("responses", _prepare_responses, _responses_job)


def _words_are_checkpoints(name: str) -> None:
    """Take `last.pt` for `checkpoint=last.pt`."""
    words = _take_words(name)
    if words and any(word.startswith("checkpoint=") for word in sys.argv):
        fail(UserError(f"{words[0]}: and checkpoint= are two ways to say the same; take one of them"))
    if words:
        named = ",".join(map(quoted, words))
        sys.argv.append(f"checkpoint={named if len(words) == 1 else f'[{named}]'}")


def _data_is_a_value() -> None:
    """Here data is no group (a data set's recipe has no say in a test), but `data=` means what it means in training."""
    sys.argv = ["data.name=" + a.removeprefix("data=") if a.startswith("data=") else a for a in sys.argv]


def pack() -> None:
    """The command `resnet-pack`."""
    # Here data is no group either, and what can be packed is what data=imagenet reads.
    sys.argv = [word for word in sys.argv if word != "data=imagenet"]
    _command("pack", _prepare_pack, _pack_job)


def weights() -> None:
    """The command `resnet-weights`."""
    words = _take_words("weights")
    _data_is_a_value()
    found: list[Any] = []

    def prepare(values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True) -> tuple[None, None]:
        found[:] = _prepare_weights(values, overrides, words, sweep) if look else []
        return None, None

    _command("weights", prepare, lambda _: sys.exit(exit_code(functools.partial(_weights_here, *found))))


def classify() -> None:
    """The command `resnet-classify`."""
    _of_images("classify", "resnet-classify", check_classify, _classify_here)


def detect() -> None:
    """The command `resnet-detect`."""
    if sys.argv[1:2] == ["predict"]:
        del sys.argv[1]
        _of_images("predict", "resnet-detect predict", _check_predict, _predict_here)
    else:
        _command("detect", _prepare_detect, _detect_job)


def _check_predict(values: dict[str, Any], images: list[str]) -> Any:
    from resnet_train.detection.config import check_predict

    return check_predict(values, images)


def _of_images(name: str, words: str, check: Callable[..., Any], here: Callable[[Any, list[str]], None]) -> None:
    """A command that is given images and a checkpoint."""
    images = _take_words(name)

    def prepare(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[Any, None]:
        if sweep or launched():
            raise UserError(f"{words} is one process with one checkpoint; take it without -m and torchrun")
        return check(values, images) if look else None, None

    def job(composed: DictConfig) -> NoReturn:
        asked = prepare(plain(composed), [], sweep=False)[0]
        sys.exit(exit_code(functools.partial(here, asked, images)))

    _command(name, prepare, job)


def _take_words(name: str) -> list[str]:
    """Take from the command line what is no flag and no KEY=VALUE: files by any name, which Hydra is not to parse."""
    try:
        overrides = _arguments(name).overrides
    except UserError as error:
        fail(error)
    pairs = re.compile(r"[+~]*(hydra/\w+|[A-Za-z_][\w.]*)=", re.ASCII)
    words = [word for word in overrides if not pairs.match(word) or os.path.isfile(word)]
    for word in words:
        sys.argv.remove(word)
    return words


def _arguments(name: str) -> argparse.Namespace:
    """The command line, as Hydra takes it apart, but with flags anywhere between the overrides. Raises UserError."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what there is")

    if "--version" in sys.argv[1:]:
        say(f"resnet-train {__version__}")
        sys.exit()
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        after = sys.argv[sys.argv.index(unknown[0]) + 1 :]
        raise UserError(no_flag(name, unknown[0], after))
    return arguments


def _command(name: str, prepare: Callable[..., Any], job: Callable[[DictConfig], Any]) -> None:
    """Check every job that the command line asks for, then let Hydra run them (or show help, config, completion)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing them
    hydras: list[str] = []  # the words that are for Hydra
    try:
        arguments = _arguments(name)
        for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: the configurations are this command's own; drop it")
        hydras = [item for item in arguments.overrides if re.match(r"[+~]*hydra\b", item)]
        hydras += ["--shell-completion"] if arguments.shell_completion else []
        check_hydras(hydras, arguments.multirun)
        sweep = arguments.multirun or "hydra.mode=MULTIRUN" in hydras
        if not arguments.shell_completion:
            _retype(arguments, sweep)
        if name == "train" and not arguments.shell_completion:
            arguments.overrides = with_jobs(arguments.overrides, sweep)
        if sweep and launched():
            raise UserError(
                f"-m: torchrun would start the sweep in each of its processes; take resnet-{name} -m"
                f" devices={os.environ.get('LOCAL_WORLD_SIZE', '8')} … without torchrun, or torchrun for one run"
            )
        _check_restarts()
        places: list[Path] = []
        jobs = [] if arguments.shell_completion else jobs_of(name, arguments.overrides, sweep)
        if not (arguments.help or arguments.hydra_help or arguments.info):
            if not jobs and not arguments.shell_completion:
                raise UserError(_no_job(name, arguments.overrides))
            for overrides in jobs:
                values = compose(name, overrides, arguments.package)
                places.append(prepare(values, overrides, sweep, look=not arguments.cfg)[1])
                if places[-1] in places[:-1]:
                    named = any(item.startswith("run_dir=") for item in overrides)
                    what = "run_dir=" if named else "a value named twice, or the key that the jobs themselves set"
                    raise UserError(f"run_dir: two jobs of the sweep would share {places[-1]}; leave out {what}")
        hydra.main(version_base="1.3", config_path=config_dir(name), config_name=name)(job)()
        if sweep and not arguments.cfg:
            _check_all_finished(places)
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own: jobs keep theirs
        fail(UserError(str(error)))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        leave()
    except OSError as error:
        fail(UserError(f"{error.filename}: {error.strerror}") if error.filename else of_the_system(error))
    except Exception as error:
        if not hydras:
            raise
        fail(UserError(f"{' '.join(hydras)}: Hydra cannot take that ({type(error).__name__}: {error})"))


def _no_job(name: str, overrides: list[str]) -> str:
    """Why a sweep has no job: an override without values."""
    empty = [item for item in overrides if not jobs_of(name, [item], sweep=True)]
    return f"{' '.join(empty)}: is no value at all, and the sweep without a job; write the values out, as in seed=0,1,2"


def _check_finished(config: Any, directory: Path, digest: Callable[[Any], str]) -> None:
    """Refuse a finished run that was trained on other data than this job's, which is to be skipped for it."""
    if run_state(directory) != "finished":
        return
    was = read_object(directory / "summary.json").get("digest")
    if not isinstance(was, str):  # of an earlier version
        return
    data = config.plain()["data"]
    key = json.dumps(data)
    if key not in DIGESTS:
        say(f"{directory}: finished; comparing its data with this sweep's")
        DIGESTS[key] = _elsewhere(digest, config)
    check_same_data(read_object(directory / "config.json")["data"], was, data, DIGESTS[key], str(directory))


def _elsewhere(digest: Callable[[Any], str], config: Any) -> str:
    """The digest of the data of `config`, which takes torch, from a process of its own. Raises UserError."""
    start_tracker()
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send_digest, args=(send, digest, config))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        process.join()
        raise RunError(f"the data cannot be read (exit code {process.exitcode})") from None
    process.join()
    if isinstance(found, UserError):
        raise found
    return str(found)


def _send_digest(send: Any, digest: Callable[[Any], str], config: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        send.send(digest(config))
    except UserError as error:
        send.send(error)


def _digest_of_images(config: Config) -> str:
    from resnet_train.build import open_sets

    return open_sets(config).digest


def _digest_of_examples(config: Any) -> str:
    from resnet_train.detection.run import read_examples

    return read_examples(config).digest


def _retype(arguments: argparse.Namespace, sweep: bool) -> None:
    """Put the overrides as Hydra reads them, in `arguments` and in sys.argv: values with quotes, flags before them."""
    flags = list(sys.argv[1:])
    for item in arguments.overrides:
        flags.remove(item)
    arguments.overrides = [as_text(item, sweep) for item in arguments.overrides]
    sys.argv[1:] = [*flags, *arguments.overrides]


def _check_restarts() -> None:
    """Refuse a torchrun whose restarts would not come off: with its store, the addresses of the dead outlive them."""
    restarts = launched() > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts= needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and"
            " --rdzv-backend=c10d; else the processes started again may look for those that died"
        )


def _check_all_finished(places: list[Path]) -> None:
    """Tell at a sweep's end which of its runs in `places` failed, here or wherever the launcher ran them."""
    failed = [str(place) for place in places if run_state(place) != "finished"]
    if failed:
        raise RunError(f"{len(failed)} of {len(places)} jobs of the sweep did not finish: {', '.join(failed)}")


def _take_launched(values: dict[str, Any], asked: list[str]) -> None:
    """Take the number of processes from a launcher, if there is one, which alone may say it."""
    if launched():
        for key in ("devices", "max_restarts"):
            if key in asked:
                raise UserError(f"{key}={values.get(key)}: that is the launcher's to say, such as torchrun; drop it")
        values["devices"] = launched()


def _prepare_train(values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True) -> tuple[Config, Path]:
    """The checked configuration of one job and its directory, which is looked at; a sweep may find it finished."""
    asked = keys_asked(overrides)
    for key in ("experiment", "job", "jobs"):  # they have said which net and seed
        values.pop(key, None)
    _take_launched(values, asked)
    if "scale" not in values:
        raise UserError("scale: is missing")
    config = check_train(values, asked)
    directory = run_directory(config, asked, values["scale"])
    if look and os.environ.get("RANK", "0") == "0":
        check_run_dir(directory, config, may_be_finished=sweep)
        _check_finished(config, directory, _digest_of_images)
    return config, directory


def _prepare_detect(values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True) -> tuple[Any, Path]:
    """The checked configuration of one run of a detector and its directory, which is looked at."""
    from resnet_train.detection import config as detection

    asked = keys_asked(overrides)
    _take_launched(values, asked)
    config = detection.check_detect(values, asked)
    directory = detection.run_directory(config, asked)
    if look and os.environ.get("RANK", "0") == "0":
        check_run_dir(directory, config, may_be_finished=sweep)
        _check_finished(config, directory, _digest_of_examples)
    return config, directory


def _prepare_eval(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[EvalConfig, None]:
    if sweep:
        raise UserError("-m: resnet-eval takes one checkpoint at a time")
    return check_eval(values), None


def _prepare_report(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[ReportConfig, None]:
    if sweep:
        raise UserError("-m: resnet-report takes all runs at once")
    return check_report(values), None


def _prepare_responses(
    values: dict[str, Any], _: list[str], sweep: bool, look: bool = True
) -> tuple[ResponsesConfig, None]:
    if sweep:
        raise UserError("-m: resnet-responses takes all checkpoints at once, as checkpoint=[one.pt,two.pt]")
    if launched() > 1:
        raise UserError("resnet-responses is one process; take it without torchrun")
    return check_responses(values), None


def _prepare_pack(values: dict[str, Any], _: list[str], sweep: bool, look: bool = True) -> tuple[PackConfig, None]:
    if sweep:
        raise UserError("-m: resnet-pack packs one tree at a time")
    if launched():
        raise UserError("resnet-pack starts its own processes (workers=); take it without torchrun")
    return check_pack(values), None


def _prepare_bench(
    values: dict[str, Any], overrides: list[str], sweep: bool, look: bool = True
) -> tuple[tuple[BenchConfig, Config], None]:
    if sweep:
        raise UserError("-m: resnet-bench measures one thing at a time")
    if launched():
        raise UserError("resnet-bench measures one process; take it without torchrun")
    return check_bench(values, keys_asked(overrides)), None


def _prepare_weights(
    values: dict[str, Any], overrides: list[str], words: list[str], sweep: bool
) -> tuple[WeightsConfig, dict[str, dict[str, Any]]]:
    """The checked configuration, and of an import what a training run would have, for each family that it may be."""
    if sweep or launched():
        raise UserError("resnet-weights is one process with one file; take it without -m and torchrun")
    if len(words) > 2:
        raise UserError(f"{' '.join(words[2:])}: resnet-weights takes one file at a time")
    asked = check_weights(values | dict(zip(("word", "file"), words, strict=False)), keys_asked(overrides))
    if asked.word == "export":
        return asked, {}
    names = {"imagenet": "imagenet", "cifar": "cifar10"}
    if asked.data.name != "auto":
        names = dict.fromkeys(names, asked.data.name)
    return asked, {family: compose("train", [f"data={name}"]) for family, name in names.items()}


def _train_job(composed: DictConfig) -> None:
    """One run of `resnet-train`."""
    _run_job(composed, _prepare_train, _train_here)


def _detect_job(composed: DictConfig) -> None:
    """One run of `resnet-detect`."""
    _run_job(composed, _prepare_detect, _detect_here)


def _run_job(composed: DictConfig, prepare: Callable[..., Any], here: Callable[[Any, Path], int]) -> None:
    """One run; in a sweep in a process of its own, so that nothing leaks from one job to the next."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        config, directory = prepare(plain(composed), list(HydraConfig.get().overrides.task), sweep)
    except UserError as error:  # not so when the command began
        if not sweep:
            fail(error)
        tell(error)
        return
    if not sweep:
        _work(here, config, directory)
    if run_state(directory) == "finished":
        say(f"{directory}: finished, skipped")
        return
    start_tracker()
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


def _work_of_sweep(here: Callable[[Any, Path], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit; where the sweep itself is killed, with a checkpoint, as on SIGTERM."""
    threading.Thread(target=_follow_sweep, daemon=True).start()
    _work(here, config, directory)


def _follow_sweep() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGTERM)


def _work(here: Callable[[Any, Path], int], config: Any, directory: Path) -> NoReturn:
    """Train, and exit."""
    try:
        finish(functools.partial(here, config, directory), config, config.max_restarts, name=str(directory))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop, and one more Ctrl-C would leave a trace


def _train_here(config: Config, directory: Path) -> int:
    """Train in this process, alone or as one of several; the exit code."""
    from resnet_train.classification.run import train as run

    return exit_code(lambda: run(config, directory))


def _detect_here(config: Any, directory: Path) -> int:
    """Train a detector in this process, alone or as one of several; the exit code."""
    from resnet_train.detection.run import detect as run

    return exit_code(lambda: run(config, directory))


def _predict_here(asked: Any, images: list[str]) -> None:
    from resnet_train.detection.predict import predict as run

    run(asked, images)


def _eval_job(composed: DictConfig) -> None:
    """One evaluation."""
    asked = check_eval(plain(composed))
    finish(functools.partial(_eval_here, asked), asked)


def _eval_here(asked: EvalConfig) -> int:
    """Evaluate in this process, alone or as one of several; the exit code."""
    from resnet_train.evaluate import evaluate_checkpoint

    return exit_code(lambda: evaluate_checkpoint(asked))


def _report_job(composed: DictConfig) -> None:
    """One report, in this process, without torch."""
    asked = check_report(plain(composed))
    from resnet_train.report.command import report as write

    try:
        write(asked)
    except UserError as error:
        fail(error)


def _responses_job(composed: DictConfig) -> None:
    """The responses of all checkpoints."""
    sys.exit(exit_code(functools.partial(_responses_here, check_responses(plain(composed)))))


def _responses_here(asked: ResponsesConfig) -> None:
    from resnet_train.responses import responses as measure

    measure(asked)


def _bench_job(composed: DictConfig) -> None:
    """One sub-benchmark."""
    asked, config = _prepare_bench(plain(composed), list(HydraConfig.get().overrides.task), sweep=False)[0]
    sys.exit(exit_code(functools.partial(_bench_here, asked, config)))


def _bench_here(asked: BenchConfig, config: Config) -> None:
    from resnet_train.bench import bench as measure

    measure(asked, config)


def _pack_job(composed: DictConfig) -> None:
    """One packing, or the check of one."""
    sys.exit(exit_code(functools.partial(_pack_here, check_pack(plain(composed)))))


def _pack_here(asked: PackConfig) -> None:
    from resnet_train.data.pack import check_packed
    from resnet_train.data.pack import pack as write

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if asked.check is not None:
        return check_packed(asked.check, asked.workers)
    assert asked.data.root is not None  # check_pack has seen to it
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


def _weights_here(asked: WeightsConfig, bases: dict[str, dict[str, Any]]) -> None:
    from resnet_train import weights

    if asked.word == "export":
        weights.export(asked)
    else:
        weights.import_weights(asked, bases)


def _classify_here(asked: ClassifyConfig, images: list[str]) -> None:
    from resnet_train.classify import classify as run

    run(asked, images)

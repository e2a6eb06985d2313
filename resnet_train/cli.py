"""The commands: rows of one table, each with the functions that check and run a job, and the meaning of its words.

`dispatch.main` runs a command line by its row.
"""

from __future__ import annotations

import functools
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_train.config import detection, localization
from resnet_train.config.commands import (
    PackConfig,
    WeightsConfig,
    check_bench,
    check_eval,
    check_pack,
    check_report,
    check_responses,
    check_weights,
)
from resnet_train.config.compose import compose
from resnet_train.config.images import check_classify, check_features
from resnet_train.config.run_dir import run_directory
from resnet_train.config.train import check_train
from resnet_train.console import launcher_world_size, load
from resnet_train.dispatch import Check, Command, Values, main
from resnet_train.errors import UserError
from resnet_train.files import expand

# --- Checks of a job, which return the arguments of the function that runs it. Raise UserError -----------------------


def _check_train(values: Values, requested: list[str]) -> tuple[Any, Path]:
    for key in ("experiment", "job", "jobs"):  # they have chosen the net and the seed
        values.pop(key, None)
    _take_launched(values, requested)
    if "scale" not in values:
        raise UserError("scale: is missing")
    config = check_train(values, requested)
    return config, run_directory(config, requested, values["scale"])


def _check_detect(values: Values, requested: list[str]) -> tuple[Any, Path]:
    _take_launched(values, requested)
    config = detection.check_detect(values, requested)
    _need_coco()
    return config, detection.run_directory(config, requested)


def _check_detect_test(values: Values, _: list[str]) -> tuple[Any]:
    config = detection.check_test(values)
    _need_coco()
    return (config,)


def _need_coco() -> None:
    """Refuse to train or test a detector without COCO's evaluation, which the end of training needs too."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError("resnet-detect needs faster-coco-eval: pip install 'resnet-train[detection]'")


def _check_localize(values: Values, requested: list[str]) -> tuple[Any, Path]:
    _take_launched(values, requested)
    config = localization.check_localize(values, requested)
    return config, localization.run_directory(config, requested)


def _take_launched(values: Values, requested: list[str]) -> None:
    """Take the number of processes from the launcher, if there is one; the command line may not set it then."""
    if launcher_world_size():
        for key in ("devices", "max_restarts"):
            if key in requested:
                raise UserError(f"{key}={values.get(key)}: is set by the launcher, such as torchrun; remove it")
        values["devices"] = launcher_world_size()


def _check_weights(values: Values, requested: list[str]) -> tuple[WeightsConfig, dict[str, Values]]:
    """The configuration and, for an import, that of a training run for each family of nets that the file may hold."""
    config = check_weights(values, requested)
    names = {"imagenet": "imagenet", "cifar": "cifar10"}
    if config.data.name != "auto":
        names = dict.fromkeys(names, config.data.name)
    return config, {family: compose("train", [f"data={name}"]) for family, name in names.items()}


def _values_alone(check: Callable[[Values], Any]) -> Check:
    return lambda values, _: (check(values),)


def _with_images(check: Callable[[Values, list[str]], Any]) -> Check:
    def checked(values: Values, _: list[str]) -> tuple[Any, list[str]]:
        images = values.pop("images")
        return check(values, images), images

    return checked


def _check_features(values: Values, requested: list[str]) -> tuple[Any, ...]:
    images = values.pop("images")
    return *check_features(values, images, requested), images


# --- Two commands with two modes each --------------------------------------------------------------------------------


def pack_or_check(config: PackConfig) -> None:
    """Run `resnet-pack`: pack images, or with check= check packed files."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if config.check is not None:
        return load("resnet_train.data.pack_check:check_packed")(config.check, config.workers)
    return load("resnet_train.data.pack:pack")(
        root=config.data.root,
        out=expand(config.out or ""),  # check_pack requires it
        shorter_side=config.shorter_side,
        quality=config.quality,
        images=config.shard_images,
        workers=config.workers,
        broken=config.data.broken,
    )


def import_or_export(config: WeightsConfig, bases: dict[str, Values]) -> None:
    """Run `resnet-weights`: import or export, by its first word."""
    if config.word == "export":
        return load("resnet_train.weights.command:export")(config)
    return load("resnet_train.weights.command:import_weights")(config, bases)


# --- The table -------------------------------------------------------------------------------------------------------


# Evaluation uses no recipe, so that data is a plain key there and not a group; data=NAME is accepted as in training.
DATA = {"data=": "data.name="}
CHECKPOINTS: dict[str, Any] = {"words": ("checkpoint",), "short": DATA}
ONE_CHECKPOINT = "{} is one process with one checkpoint; use it without -m and torchrun"
WEIGHTS = "resnet-weights is one process with one file; use it without -m and torchrun"

COMMANDS = {
    "train": Command(
        "train",
        "resnet-train",
        _check_train,
        "resnet_train.classification.run:train",
        "resnet_train.classification.load:open_dataset",
        True,
    ),
    "eval": Command(
        "eval",
        "resnet-eval",
        _values_alone(check_eval),
        "resnet_train.classification.command:evaluate_checkpoint",
        processes=True,
        no_sweep="-m: resnet-eval takes one checkpoint at a time",
        **CHECKPOINTS,
    ),
    "classify": Command(
        "classify",
        "resnet-classify",
        _with_images(check_classify),
        "resnet_train.classification.predict:classify",
        no_sweep=ONE_CHECKPOINT.format("resnet-classify"),
        no_launcher=ONE_CHECKPOINT.format("resnet-classify"),
        words=("images",),
    ),
    "features": Command(
        "features",
        "resnet-features",
        _check_features,
        "resnet_train.classification.features:features",
        no_sweep=ONE_CHECKPOINT.format("resnet-features"),
        no_launcher=ONE_CHECKPOINT.format("resnet-features"),
        words=("images",),
        short=DATA,
    ),
    "report": Command(
        "report",
        "resnet-report",
        _values_alone(check_report),
        "resnet_train.report.report:report",
        no_sweep="-m: resnet-report takes all runs at once",
        words=("runs",),
        short={"--open": "open=true", "complexity": "report=complexity"},
        torch=False,
    ),
    "responses": Command(
        "responses",
        "resnet-responses",
        _values_alone(check_responses),
        "resnet_train.classification.responses:responses",
        no_sweep="-m: resnet-responses takes all checkpoints at once, as checkpoint=[one.pt,two.pt]",
        no_launcher="resnet-responses is one process; use it without torchrun",
        **CHECKPOINTS,
    ),
    "weights": Command(
        "weights",
        "resnet-weights",
        _check_weights,
        "resnet_train.cli:import_or_export",
        no_sweep=WEIGHTS,
        no_launcher=WEIGHTS,
        words=("word", "file"),
        short=DATA,
    ),
    "pack": Command(
        "pack",
        "resnet-pack",
        _values_alone(check_pack),
        "resnet_train.cli:pack_or_check",
        no_sweep="-m: resnet-pack packs one tree at a time",
        no_launcher="resnet-pack starts its own processes (workers=); use it without torchrun",
        short={"data=imagenet": ""},  # the only data that can be packed
    ),
    "detect": Command(
        "detect",
        "resnet-detect",
        _check_detect,
        "resnet_train.detection.run:detect",
        "resnet_train.detection.run:read_examples",
        processes=True,
    ),
    "predict": Command(
        "predict",
        "resnet-detect predict",
        _with_images(detection.check_predict),
        "resnet_train.detection.predict:predict",
        no_sweep=ONE_CHECKPOINT.format("resnet-detect predict"),
        no_launcher=ONE_CHECKPOINT.format("resnet-detect predict"),
        words=("images",),
    ),
    "test": Command(
        "test",
        "resnet-detect test",
        _check_detect_test,
        "resnet_train.detection.command:evaluate_checkpoints",
        processes=True,
        no_sweep="-m: resnet-detect test makes one test at a time",
        words=("checkpoint",),
    ),
    "localize": Command(
        "localize",
        "resnet-localize",
        _check_localize,
        "resnet_train.localization.run:localize",
        "resnet_train.localization.run:open_data",
        processes=True,
    ),
    "localize_test": Command(
        "localize_test",
        "resnet-localize test",
        _values_alone(localization.check_localize_test),
        "resnet_train.localization.command:evaluate_checkpoint",
        processes=True,
        no_sweep="-m: resnet-localize test makes one test at a time",
        words=("checkpoint",),
    ),
    "bench": Command(
        "bench",
        "resnet-bench",
        check_bench,
        "resnet_train.bench.suite:bench",
        no_sweep="-m: resnet-bench measures one thing at a time",
        no_launcher="resnet-bench measures one process; use it without torchrun",
        words=("bench",),
    ),
}


# The scripts of pyproject.toml.
train = functools.partial(main, COMMANDS["train"])
evaluate = functools.partial(main, COMMANDS["eval"])
classify = functools.partial(main, COMMANDS["classify"])
features = functools.partial(main, COMMANDS["features"])
report = functools.partial(main, COMMANDS["report"])
responses = functools.partial(main, COMMANDS["responses"])
weights = functools.partial(main, COMMANDS["weights"])
pack = functools.partial(main, COMMANDS["pack"])
detect = functools.partial(main, COMMANDS["detect"], COMMANDS["predict"], COMMANDS["test"])
localize = functools.partial(main, COMMANDS["localize"], COMMANDS["localize_test"])
bench = functools.partial(main, COMMANDS["bench"])

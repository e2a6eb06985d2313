"""Read runs and group those that can be compared. Nothing is written into a run's folder."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.config.schema import flat
from resnet_train.engine.metrics import count_replaced, describe_replaced
from resnet_train.errors import UserError
from resnet_train.files import read_if_object, read_object
from resnet_train.report.curves import Point
from resnet_train.report.folders import find_runs, name_label, name_weights, read_results, tell_apart
from resnet_train.report.values import (
    config_value,
    devices,
    metrics_in,
    reading,
    resolve_auto,
    used_precision,
    whole,
    word,
)

END = 20  # the training error at the end is that of the last twentieth of a run
SCHEDULE_KEYS = {  # by the name of the schedule, those of its own
    "step": {"schedule.factor", "schedule.drops"},
    "plateau": {"schedule.factor", "schedule.patience", "schedule.threshold", "schedule.watch"},
    "cosine": set[str](),
}
NET = re.compile(r"plain-\d{1,6}|resnet-\d{1,6}-[ABC]")  # a net's name


FolderMetrics = dict[Path, tuple[str, list[dict[str, Any]]]]  # of each folder: display_path, metrics


@dataclass(frozen=True)
class Run:
    """One training run of resnet-train, as read from its folder."""

    folder: Path
    display_path: str  # the name of the folder in the report
    net: str  # resnet-110-A
    arch: str
    depth: int
    family: str
    seed: int
    data: str  # the data's label, as in every line of the metrics
    protocol: str  # of the test
    iterations: int  # planned
    curves: dict[str, list[Point]]  # by split
    setting: dict[str, Any]  # what must be equal among the runs of one row or figure
    command: str
    device: str
    parameters: int | None
    replaced: int = 0  # how often others stood in for broken training images
    unreadable: int = 0  # images left out because they cannot be decoded
    root: str = ""  # of the data, on the machine that ran it
    job: str = ""  # of a sweep: what is its own among the jobs, as words of a command line
    results: list[dict[str, Any]] = field(default_factory=list)  # written by resnet-eval
    pages: list[Path] = field(default_factory=list)  # of mistakes, written by resnet-eval with details=true

    @property
    def published(self) -> bool:
        """Whether the paper has this data set; runs on other data have their own lengths and tables."""
        return paper.DATA.get(self.data) == self.family

    @property
    def reached(self) -> int:
        """The last iteration in the metrics."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last iteration has been tested."""
        return bool(self.curves["test"]) and self.curves["test"][-1][0] == self.iterations

    @property
    def test_error(self) -> float:
        """The test error of the last iteration, or of the last one so far; NaN before the first test."""
        return self.curves["test"][-1][1] if self.curves["test"] else math.nan

    @property
    def chosen(self) -> Point | None:
        """The first point with the lowest validation error; None without a validation part."""
        return min(self.curves["val"], key=lambda point: (point[1], point[0]), default=None)

    @property
    def chosen_error(self) -> float | None:
        """The test error where the validation error was lowest; None without a validation part."""
        at = self.chosen and self.chosen[0]
        return next((error for iteration, error, _ in self.curves["test"] if iteration == at), None)

    @property
    def train_error(self) -> float:
        """The mean training error of the last twentieth of the run, each batch counted once; NaN without a point."""
        return mean_error(self.curves["train"], self.iterations - self.iterations / END, self.iterations)

    @property
    def late_gain(self) -> float:
        """How far the training error fell from the last but one twentieth of the run to the last."""
        part = self.iterations / END
        return mean_error(self.curves["train"], self.iterations - 2 * part, self.iterations - part) - self.train_error


def mean_error(points: list[Point], after: float, until: float) -> float:
    """The mean of a training curve over the iterations after `after`, up to `until`; NaN without a point there.

    Each point is the mean of the iterations since the point before it; where points are lost, of as many as usual.
    """
    lengths = [later - before for before, later in itertools.pairwise([0, *(point[0] for point in points)])]
    usual = statistics.median_high(lengths or [0])
    parts = [
        (error, min(length, usual))
        for (iteration, error, _), length in zip(points, lengths, strict=True)
        if after < iteration <= until
    ]
    weight = sum(length for _, length in parts)
    return sum(error * length for error, length in parts) / weight if weight else math.nan


def find(folders: Iterable[Path]) -> tuple[list[Run], FolderMetrics, list[str]]:
    """Read all runs in `folders`, which are runs or contain them.

    Returns the runs of classification, the folders of other tasks' runs, and notes on what was left out. Raises
    UserError for a folder without runs, or if no run has metrics.
    """
    notes = []
    runs: list[Run] = []
    others: FolderMetrics = {}
    for folder, display_path in find_runs(folders).items():
        metrics = metrics_in(folder)
        if not metrics:
            notes.append(f"{display_path}: has no metrics yet, left out")
        elif read_if_object(folder / "config.json").keys() & {"backbone", "stage"}:
            others[folder] = display_path, metrics
        else:
            runs.append(read(folder, display_path, metrics))
    if not runs and not others:
        raise UserError("; ".join(notes) or "the folders hold layer responses and no runs; add folders of runs")
    resolve_auto([run.setting for run in runs])
    _name_images(runs)
    weights = name_weights(run.setting["init_from"] for run in runs if run.setting["init_from"])
    for run in runs:
        run.setting["init_from"] = weights.get(run.setting["init_from"])
    return _drop_duplicates(runs, notes), others, notes


def _name_images(runs: list[Run]) -> None:
    """Replace the digests of image sets in the settings by names, the last two folders of their path or more."""
    digests: dict[tuple[str, str], dict[str, Path]] = {}  # a folder has another digest for each family
    for run in runs:
        if "images" in run.setting:
            digests.setdefault((run.data, run.family), {}).setdefault(run.setting["images"], Path(run.root))
    names_of = {}
    for key, roots in digests.items():
        of_root = tell_apart(dict.fromkeys(roots.values(), 2))
        names_of[key] = {digest: of_root[root] for digest, root in roots.items()}
    for run in runs:
        names = names_of.get((run.data, run.family), {})
        if (digest := run.setting.pop("images", None)) and len(names) > 1:
            name, before = names[digest], list(names)[: list(names).index(digest)]
            again = sum(names[other] == name for other in before)  # changed, or on another machine
            run.setting["images"] = name + (f" (state {again + 1})" if again else "")


def _drop_duplicates(runs: list[Run], notes: list[str]) -> list[Run]:
    """Keep of runs with the same net, seed and setting the one that got furthest: they are not two seeds."""
    furthest: dict[str, Run] = {}
    for run in runs:
        key = json.dumps([run.net, run.seed, run.setting])
        if key in furthest:
            first, second = sorted((furthest[key], run), key=lambda r: -r.reached)
            why = f"is the same run as {first.display_path} ({run.net}, seed {run.seed}), left out"
            notes.append(f"{second.display_path}: {why}")
            run = first
        furthest[key] = run
    return sorted(furthest.values(), key=lambda run: (run.data, run.arch != "plain", run.depth, run.net, run.seed))


def read(folder: Path, display_path: str, metrics: list[dict[str, Any]]) -> Run:
    """The run in `folder` with these `metrics`. Raises UserError for files that are not those of a run."""
    with reading(folder, "a run of resnet-train"):
        return _run(folder, display_path, read_object(folder / "config.json"), metrics)


def _run(folder: Path, display_path: str, config: dict[str, Any], metrics: list[dict[str, Any]]) -> Run:
    points: dict[str, dict[int, Point]] = {"train": {}, "val": {}, "test": {}}
    for line in metrics:
        if "error" in line:
            points[line["split"]][line["iteration"]] = (line["iteration"], line["error"], line.get("error5"))
    arch, depth, family = config["arch"], whole(config["depth"]), config["data"]["family"]
    protocol = {"cifar": "single view", "imagenet": "center crop"}[family]
    tests = [line for line in metrics if line["split"] == "test" and "protocol" in line]
    protocol = word(tests[-1]["protocol"]) if tests else protocol
    net = f"plain-{depth}" if arch == "plain" else f"{arch}-{depth}-{config['shortcut']}"
    if not NET.fullmatch(net):
        raise ValueError(f"{net!r:.100} is no net")
    recorded = read_if_object(folder / "environment.json") | read_if_object(folder / "summary.json")
    data = name_label(word(metrics[0]["data"]), tests[-1].get("seen") if tests else None)
    parameters = recorded.get("parameters")
    setting = {"data": data, "protocol": protocol, **_recipe(config, family), **_measured(recorded)}
    if "digest" in recorded and data not in paper.DATA:  # other data may share a label
        setting["images"] = word(recorded["digest"])
    return Run(
        folder=folder,
        display_path=display_path,
        net=net,
        arch=arch,
        depth=depth,
        family=family,
        seed=whole(config["seed"]),
        data=data,
        protocol=protocol,
        iterations=whole(config["iterations"], 1),
        curves={split: [by_iteration[at] for at in sorted(by_iteration)] for split, by_iteration in points.items()},
        setting=setting,
        command=word(recorded.get("command", "")),
        device=devices(recorded),
        parameters=None if parameters is None else whole(parameters),
        replaced=whole(count_replaced(metrics)),
        unreadable=whole(sum(recorded.get("unreadable", {}).values())),
        results=read_results(folder, net, whole(config["seed"]), recorded.get("digest")),
        root=word(config["data"]["root"] or ""),
        job=_name_job(word(recorded.get("command", "")), config),
        pages=[path for path in sorted((folder / "checkpoints").glob("*-mistakes.html")) if path.is_file()],
    )


def _name_job(command: str, config: dict[str, Any]) -> str:
    """The keys with several values in the command of a sweep, and those that experiments set, with the values here."""
    words = command.split()
    if "-m" not in words and "--multirun" not in words:
        return ""
    pairs = [word.strip("'\"").lstrip("+").partition("=")[::2] for word in words if "=" in word]
    swept = [key for key, value in pairs if re.search(r",|\b(choice|range)\(", re.sub(r"\[.*?\]", "", value))]
    values = flat(config)
    named = dict.fromkeys([*("arch", "depth", "shortcut", "seed"), *swept])
    here = {key: values.get(key, values.get(f"{key}.name")) for key in named}
    return " ".join(f"{key}={format_setting(config_value(value))}" for key, value in here.items() if value is not None)


def _recipe(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The values of a configuration that enter the mathematics."""
    recipe = {}
    for key in paper.RECIPES[family]:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        recipe[key] = config_value(value)
    batch = whole(config["batch_size"], 1)
    per_device = batch // (config["devices"] or 1)
    device_batch = min(config["device_batch_size"] or per_device, per_device)
    bn_images = config_value(config["bn_images"])
    recipe["precision"] = word(recipe["precision"])
    recipe["init_from"] = None if recipe["init_from"] is None else word(recipe["init_from"])
    recipe["bn_images"] = {"device": device_batch, "all": batch}.get(bn_images, bn_images)
    return recipe


def _measured(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a run was with, where its configuration does not say: auto's precision, batch norm changed at a resume."""
    measures = [one.get("measure") or {} for one in [*recorded.get("before", []), recorded]]
    numbers = [
        number for number, _ in itertools.groupby(whole(one["bn_images"]) for one in measures if "bn_images" in one)
    ]
    return used_precision(recorded) | ({"bn_images": ", then ".join(map(str, numbers))} if len(numbers) > 1 else {})


def groups(runs: list[Run]) -> list[list[Run]]:
    """Group the runs that may share a row and a figure: the same data, split, protocol and recipe."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(json.dumps(run.setting, sort_keys=True), []).append(run)
    return sorted(by_setting.values(), key=lambda group: (-len(group), group[0].data))


def differences(one: list[Run], other: list[Run]) -> list[tuple[str, str, str]]:
    """The settings in which two groups differ: key, its value in one, in the other; of other data that alone.

    The recipes of the two families have keys of their own, which cannot be compared.
    """
    own, others = ({"family": group[0].family, "images": "not recorded"} | group[0].setting for group in (one, other))
    keys = [key for key in own if key in others and own[key] != others[key]]
    keys = ["data"] if "data" in keys else keys
    return [(key, format_setting(own[key]), format_setting(others[key])) for key in keys]


def deviations(run: Run) -> list[tuple[str, str, str]]:
    """Deviations from the paper's recipe: key, value, the paper's value.

    Lengths count only on the paper's data, and of a schedule the keys that it reads.
    """
    unread = set(itertools.chain(*SCHEDULE_KEYS.values())) - SCHEDULE_KEYS.get(str(run.setting["schedule.name"]), set())
    unread |= set() if run.published else {"iterations", "data.size"}
    keys = [key for key in paper.RECIPES[run.family] if key not in unread]
    recipe = {key: paper.RECIPES[run.family][key] for key in keys}
    differing = [key for key in keys if run.setting[key] != recipe[key]]
    return [(key, format_setting(run.setting[key]), format_setting(recipe[key])) for key in differing]


def format_setting(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return json.dumps(value).replace('"', "").replace(" ", "") if isinstance(value, list) else str(value)


def by_net(group: list[Run]) -> dict[str, list[Run]]:
    """The runs of each net, in the group's order: plain nets first, shallow nets first."""
    by_name: dict[str, list[Run]] = {}
    for run in group:
        by_name.setdefault(run.net, []).append(run)
    return by_name


def describe_run(what: str, device: str, replaced: int, folder: str) -> str:
    """A run in one line: what it is, on which device, how often broken images were replaced in it, and its folder."""
    where = f", on {device}" if device else ""
    return "; ".join(filter(None, [what + where, describe_replaced(replaced), folder]))

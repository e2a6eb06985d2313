"""Reading runs, and which of them may stand together. Nothing is written into a run's folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.errors import UserError
from resnet_train.files import read_if_object, read_object
from resnet_train.report.curves import Point
from resnet_train.report.values import (
    escape_and_clip,
    metrics_in,
    number,
    plain,
    reading,
    whole,
    word,
)

END = 20  # the training error at the end is that of the last twentieth of a run
NET = re.compile(r"plain-\d{1,6}|resnet-\d{1,6}-[ABC]")  # what a net is called


Begun = dict[Path, tuple[str, list[dict[str, Any]]]]  # by folders: the name that a report gives each, its metrics


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it."""

    folder: Path
    place: str  # the folder as a report names it: from the folder on that was asked for
    net: str  # resnet-110-A
    arch: str
    depth: int
    family: str
    seed: int
    data: str  # the data's label, as in every line of the metrics
    protocol: str  # of the test
    iterations: int  # that the run is to have
    curves: dict[str, list[Point]]  # by split
    setting: dict[str, Any]  # all that must be the same in one row or figure
    command: str
    device: str
    precision: str | None  # that auto was, once the run is finished
    parameters: int | None
    root: str = ""  # of the data, on the machine of the run
    results: list[dict[str, Any]] = field(default_factory=list)  # what resnet-eval has left in the folder
    pages: list[Path] = field(default_factory=list)  # of mistakes, which it leaves with details=true

    @property
    def published(self) -> bool:
        """Whether the paper has this data set; a run on any other is of its own length and has tables of its own."""
        return paper.DATA.get(self.data) == self.family

    @property
    def reached(self) -> int:
        """The last iteration that a metrics line tells of."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)

    @property
    def finished(self) -> bool:
        """Whether the test of the last iteration is there."""
        return bool(self.curves["test"]) and self.curves["test"][-1][0] == self.iterations

    @property
    def test_error(self) -> float:
        """The test error of the last iteration, or of the last one so far; NaN before the first test."""
        return self.curves["test"][-1][1] if self.curves["test"] else math.nan

    @property
    def chosen_error(self) -> float | None:
        """The test error where the validation error was lowest; None without a validation part."""
        if not self.curves["val"]:
            return None
        at = min(self.curves["val"], key=lambda point: (point[1], point[0]))[0]
        return next((error for iteration, error, _ in self.curves["test"] if iteration == at), None)

    @property
    def train_error(self) -> float:
        """The training error of the last twentieth of the run: of all its batches, each counted once; NaN if none."""
        return mean_error(self.curves["train"], self.iterations - self.iterations / END, self.iterations)

    @property
    def late_gain(self) -> float:
        """By how much the training error still fell from the last but one twentieth to the last."""
        part = self.iterations / END
        return mean_error(self.curves["train"], self.iterations - 2 * part, self.iterations - part) - self.train_error


def mean_error(points: list[Point], after: float, until: float) -> float:
    """The mean of a training curve, each of whose points is of the iterations since the one before; NaN if none."""
    total = weight = 0.0
    before = 0
    for iteration, error, _ in points:
        if after < iteration <= until:
            total += error * (iteration - before)
            weight += iteration - before
        before = iteration
    return total / weight if weight else math.nan


def find(folders: Iterable[Path]) -> tuple[list[Run], Begun, list[str]]:
    """All runs in `folders`, which are runs or contain them, those of other tasks, and notes on what was left out.

    Raises UserError for a folder without runs, or with none that can be read.
    """
    found: dict[Path, tuple[Path, str]] = {}
    notes = []
    for folder in folders:
        try:
            configs = sorted(path for path in folder.rglob("config.json") if path.is_file())
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        if not configs and not any(folder.rglob("responses.csv")):
            raise UserError(f"{folder}: holds no run (a folder with config.json and metrics.jsonl)")
        for path in configs:
            found.setdefault(path.parent.resolve(), (path.parent, place_of(path.parent, folder)))
    runs: list[Run] = []
    others: Begun = {}
    for folder, place in found.values():
        metrics = metrics_in(folder)
        if not metrics:
            notes.append(f"{place}: has no metrics yet, left out")
        elif read_if_object(folder / "config.json").keys() & {"backbone", "stage"}:
            others[folder] = place, metrics
        else:
            runs.append(read(folder, place, metrics))
    if not runs and not others:
        raise UserError("; ".join(notes) or "there are layer responses and no runs; name the runs too")
    _name_images(runs)
    return _once(runs, notes), others, notes


def _name_images(runs: list[Run]) -> None:
    """Have settings tell sets of images apart by names, and not by digests: of one label by folder and parent."""
    digests: dict[str, dict[str, str]] = {}
    for run in runs:
        if "images" in run.setting:
            digests.setdefault(run.data, {}).setdefault(run.setting["images"], "/".join(Path(run.root).parts[-2:]))
    for run in runs:
        names = digests.get(run.data, {})
        if (digest := run.setting.pop("images", None)) and len(names) > 1:
            name, before = names[digest], list(names)[: list(names).index(digest)]
            again = sum(names[other] == name for other in before)  # the folder has changed, or is another machine's
            run.setting["images"] = name + (f" (state {again + 1})" if again else "")


def place_of(path: Path, folder: Path) -> str:
    """A path inside `folder`, without what lies above it on this machine."""
    return escape_and_clip(str(path.relative_to(folder.parent) if folder.is_absolute() else path))


def _once(runs: list[Run], notes: list[str]) -> list[Run]:
    """Of runs with the same net, seed and setting, the one that came furthest: they are no two seeds."""
    kept: dict[str, Run] = {}
    for run in runs:
        key = json.dumps([run.net, run.seed, run.setting])
        if key in kept:
            first, second = sorted((kept[key], run), key=lambda r: -r.reached)
            notes.append(f"{second.place}: is the same run as {first.place} ({run.net}, seed {run.seed}), left out")
            run = first
        kept[key] = run
    return sorted(kept.values(), key=lambda run: (run.data, run.arch != "plain", run.depth, run.net, run.seed))


def read(folder: Path, place: str, metrics: list[dict[str, Any]]) -> Run:
    """The run in `folder`, which has these `metrics`. Raises UserError for files that are not what a run leaves."""
    with reading(folder, "resnet-train"):
        return _run(folder, place, read_object(folder / "config.json"), metrics)


def _run(folder: Path, place: str, config: dict[str, Any], metrics: list[dict[str, Any]]) -> Run:
    points: dict[str, dict[int, Point]] = {"train": {}, "val": {}, "test": {}}
    for line in metrics:
        points[line["split"]][line["iteration"]] = (line["iteration"], line["error"], line.get("error5"))
    arch, depth, family = config["arch"], whole(config["depth"]), config["data"]["family"]
    protocol = {"cifar": "single view", "imagenet": "center crop"}[family]
    tests = [line["protocol"] for line in metrics if line["split"] == "test" and "protocol" in line]
    protocol = word(tests[-1]) if tests else protocol
    net = f"plain-{depth}" if arch == "plain" else f"{arch}-{depth}-{config['shortcut']}"
    if not NET.fullmatch(net):
        raise ValueError(f"{net!r:.100} is no net")
    told = read_if_object(folder / "environment.json") | read_if_object(folder / "summary.json")
    data, precision, parameters = word(metrics[0]["data"]), told.get("precision"), told.get("parameters")
    setting = {"data": data, "protocol": protocol, **_recipe(config, family)}
    if "digest" in told and data not in paper.DATA:  # other images in a folder of the same name; the paper's have one
        setting["images"] = word(told["digest"])
    return Run(
        folder=folder,
        place=place,
        net=net,
        arch=arch,
        depth=depth,
        family=family,
        seed=whole(config["seed"]),
        data=data,
        protocol=protocol,
        iterations=whole(config["iterations"], 1),
        curves={split: [found[at] for at in sorted(found)] for split, found in points.items()},
        setting=setting,
        command=word(told.get("command", "")),
        device=word(told.get("device", "")),
        precision=None if precision is None else word(precision),
        parameters=None if parameters is None else whole(parameters),
        results=_results(folder),
        root=word(config["data"]["root"] or ""),
        pages=[path for path in sorted(folder.rglob("*-mistakes.html")) if path.is_file()],
    )


def _recipe(config: dict[str, Any], family: str) -> dict[str, Any]:
    """Of a configuration, what enters the mathematics."""
    found = {}
    for key in paper.RECIPES[family]:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        found[key] = plain(value)
    batch = whole(config["batch_size"], 1)
    each = batch // (config["devices"] or 1)
    at_once = min(config["device_batch_size"] or each, each)
    groups = plain(config["bn_images"])
    found["bn_images"] = {"device": at_once, "all": batch}.get(groups, groups)
    return found


def _results(folder: Path) -> list[dict[str, Any]]:
    """What resnet-eval has written beside the checkpoints: tests, of one net or of an ensemble."""
    found = [read_if_object(path) for path in sorted(folder.rglob("*-test.json"))]
    found = [result for result in found if {"net", "data", "split", "protocol", "error"} <= result.keys()]
    for result in found:
        result |= {key: word(result[key]) for key in ("net", "data", "split", "protocol")}
        result |= {key: number(result[key], 0, 100) for key in ("error", "error5") if key in result}
        if "members" in result:
            result["members"] = [{"net": word(member["net"])} for member in result["members"]]
    return found


def groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that may stand in one row and figure: the same data, split, protocol and recipe."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.setting, sort_keys=True), []).append(run)
    return sorted(found.values(), key=lambda group: (-len(group), group[0].data))


def differences(one: list[Run], other: list[Run]) -> list[tuple[str, str, str]]:
    """Why two groups are not one: key, its value in one, in the other."""
    here, there = one[0].setting, other[0].setting
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    return [(key, shown(here.get(key)), shown(there.get(key))) for key in keys]


def deviations(run: Run) -> list[tuple[str, str, str]]:
    """In what a run is not the paper's recipe: key, its value, the paper's. Off its data sets, a length is no part."""
    actual = run.setting | ({"precision": run.precision} if run.precision else {})
    keys = [key for key in paper.RECIPES[run.family] if run.published or key not in ("iterations", "data.size")]
    recipe = {key: paper.RECIPES[run.family][key] for key in keys}
    return [(key, shown(actual[key]), shown(value)) for key, value in recipe.items() if actual[key] != value]


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value).replace('"', "").replace(" ", "") if isinstance(value, list) else str(value)


def by_net(group: list[Run]) -> dict[str, list[Run]]:
    """The runs of each net, plain ones first, shallow ones first."""
    found: dict[str, list[Run]] = {}
    for run in group:
        found.setdefault(run.net, []).append(run)
    return found


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """The mean, and the sample's standard deviation (n - 1) of two values and more."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

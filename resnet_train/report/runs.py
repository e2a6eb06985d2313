"""Reading runs, and which of them may stand together. Nothing is written into a run's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.curves import read_metrics
from resnet_train.errors import UserError

Point = tuple[int, float, float | None]  # iteration, top-1 and top-5 error in %
EARLIER = {"normalise": "channels"}  # what was done before there was this key
END = 20  # the training error at the end is that of the last twentieth of a run


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it."""

    folder: Path
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
    started: str
    device: str
    precision: str | None  # that auto was, once the run is finished
    parameters: int | None
    results: list[dict[str, Any]] = field(default_factory=list)  # what resnet-eval has left in the folder

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


def find(folders: Iterable[Path]) -> tuple[list[Run], list[Path], list[str]]:
    """All runs in `folders`, which are runs or contain them, the folders of detectors, and notes on what was left out.

    Raises UserError for a folder without runs, or with none that can be read.
    """
    found: dict[Path, Path] = {}
    notes = []
    for folder in folders:
        try:
            configs = sorted(path for path in folder.rglob("config.json") if path.is_file())
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        if not configs and not any(folder.rglob("responses.csv")):
            raise UserError(f"{folder}: holds no run (a folder with config.json and metrics.jsonl)")
        found |= {path.parent.resolve(): path.parent for path in configs if path.parent.resolve() not in found}
    runs, detectors = [], []
    for folder in found.values():
        metrics = folder / "metrics.jsonl"
        if metrics.is_file() and "\n" in _text(metrics):
            if "backbone" in _object(folder / "config.json"):
                detectors.append(folder)
            else:
                runs.append(read(folder))
        else:
            notes.append(f"{folder}: has no metrics yet, left out")
    if not runs and not detectors:
        raise UserError("; ".join(notes) or "there are layer responses and no runs; name the runs too")
    return _once(runs, notes), detectors, notes


def _once(runs: list[Run], notes: list[str]) -> list[Run]:
    """Of runs with the same net, seed and setting, the one that came furthest: they are no two seeds."""
    kept: dict[str, Run] = {}
    for run in runs:
        key = json.dumps([run.net, run.seed, run.setting])
        if key in kept:
            first, second = sorted((kept[key], run), key=lambda r: -r.reached)
            notes.append(f"{second.folder}: is the same run as {first.folder} ({run.net}, seed {run.seed}), left out")
            run = first
        kept[key] = run
    return sorted(kept.values(), key=lambda run: (run.data, run.arch != "plain", run.depth, run.net, run.seed))


def read(folder: Path) -> Run:
    """The run in `folder`. Raises UserError for files that are not what a run leaves, naming the line."""
    try:
        config = json.loads(_text(folder / "config.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: is no JSON ({error})") from error
    try:
        metrics = read_metrics(folder / "metrics.jsonl")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: is no text") from error
    except ValueError as error:
        lines = _text(folder / "metrics.jsonl").split("\n")
        number = next(n for n, line in enumerate(lines, 1) if not _is_json(line))
        raise UserError(f"{folder / 'metrics.jsonl'}: line {number} is no JSON") from error
    try:
        return _run(folder, config, metrics)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: holds other things than a run of resnet-train leaves ({reason})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _run(folder: Path, config: dict[str, Any], metrics: list[dict[str, Any]]) -> Run:
    curves: dict[str, list[Point]] = {"train": [], "val": [], "test": []}
    protocol = ""
    for line in metrics:
        curves[line["split"]].append((int(line["iteration"]), float(line["error"]), line.get("error5")))
        if line["split"] == "test":
            protocol = line["protocol"]
    told = _object(folder / "environment.json") | _object(folder / "summary.json")
    arch, depth, family = config["arch"], int(config["depth"]), config["data"]["family"]
    data = metrics[0]["data"]
    protocol = protocol or ("center crop" if family == "imagenet" else "single view")
    return Run(
        folder=folder,
        net=f"plain-{depth}" if arch == "plain" else f"{arch}-{depth}-{config['shortcut']}",
        arch=arch,
        depth=depth,
        family=family,
        seed=int(config["seed"]),
        data=data,
        protocol=protocol,
        iterations=int(config["iterations"]),
        curves=curves,
        setting={"data": data, "protocol": protocol, **_recipe(config, family)},
        command=told.get("command", ""),
        started=told.get("started", ""),
        device=told.get("device", ""),
        precision=told.get("precision"),
        parameters=told.get("parameters"),
        results=_results(folder),
    )


def _recipe(config: dict[str, Any], family: str) -> dict[str, Any]:
    """Of a configuration, what enters the mathematics; a key that there was not yet has the paper's value."""
    found = {}
    for key, default in paper.RECIPES[family].items():
        value: Any = config
        for word in key.split("."):
            value = value.get(word, EARLIER.get(key, default)) if isinstance(value, dict) else default
        found[key] = value
    each = config["batch_size"] // (config.get("devices") or 1)
    at_once = min(config.get("device_batch_size") or each, each)
    groups = config.get("bn_images", "device")
    found["bn_images"] = {"device": at_once, "all": config["batch_size"]}.get(groups, groups)
    return found


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or one that is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _results(folder: Path) -> list[dict[str, Any]]:
    """What resnet-eval has written beside the checkpoints: tests, of one net or of an ensemble."""
    found = [_object(path) for path in sorted(folder.rglob("*-test.json"))]
    return [result for result in found if {"net", "data", "split", "protocol", "error"} <= result.keys()]


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
    """In what a run is not the paper's recipe: key, its value, the paper's."""
    recipe = paper.RECIPES[run.family]
    actual = run.setting | ({"precision": run.precision} if run.precision else {})
    found = [(key, shown(actual[key]), shown(value)) for key, value in recipe.items() if actual[key] != value]
    whole = {"cifar": "cifar10", "imagenet": "imagenet"}[run.family]
    return ([("data", run.data, whole)] if run.data != whole else []) + found


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

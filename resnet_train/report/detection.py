"""Tables 7 and 8: the detectors of resnet-detect beside the paper's, and their mAP over iterations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.curves import read_metrics
from resnet_train.errors import UserError
from resnet_train.report.figures import save
from resnet_train.report.page import Section
from resnet_train.report.tables import Cell, Table, spread

# Of a configuration, what must be the same in one table.
SETTING = (
    *("iterations", "batch_size", "regions", "lr", "warmup", "drops", "momentum", "weight_decay"),
    *("min_size", "max_size", "anchors", "proposals", "freeze", "precision"),
)
# The columns of each table: the key of the test, what it is called, and its place among the paper's two figures.
COLUMNS: dict[str, list[tuple[str, str, int | None]]] = {
    "voc": [("map07", "mAP, VOC 2007's rule", 0), ("map10", "mAP, VOC 2010's rule", 1)],
    "coco": [("map50", "mAP@.5", 0), ("map", "mAP@[.5,.95]", 1)],
}
PAPERS = {"voc": ("paper, VOC 2007 test", "paper, VOC 2012 test"), "coco": ("paper, COCO val, @.5", "@[.5,.95]")}


@dataclass(frozen=True)
class Detector:
    """One run of resnet-detect, as its folder tells it."""

    folder: Path
    kind: str  # voc or coco
    data: str
    net: str
    source: str | None  # the file of the weights that it began with
    seed: int
    iterations: int
    setting: dict[str, Any]
    test: list[dict[str, Any]]  # the lines of the metrics
    command: str
    device: str

    @property
    def finished(self) -> bool:
        """Whether the test of the last iteration is there."""
        return bool(self.test) and self.test[-1]["iteration"] == self.iterations

    @property
    def name(self) -> str:
        """The net and what it began with: of a file its name, and of a checkpoint that of its run."""
        if self.source is None:
            return f"{self.net}, random weights"
        path = Path(self.source)
        place = path.parents[1].name + "/" if path.parent.name == "checkpoints" else ""
        return f"{self.net}, from {place}{path.name}"


def find(folders: Iterable[Path]) -> list[Detector]:
    """The detectors in `folders`, each of which is a run. Raises UserError for files that are no such run's."""
    found = []
    for folder in folders:
        try:
            found.append(_read(folder))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder}: holds other things than a run of resnet-detect leaves ({reason})") from error
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
    return sorted(found, key=lambda run: (run.data, run.net, run.name, run.seed))


def _read(folder: Path) -> Detector:
    config = json.loads((folder / "config.json").read_text())
    environment = _object(folder / "environment.json")
    metrics, data = read_metrics(folder / "metrics.jsonl"), config["data"]
    net = "vgg-16" if config["backbone"] == "vgg16" else f"resnet-{config['depth']}"
    return Detector(
        folder=folder,
        kind=data["name"],
        data=metrics[0]["data"],
        net=net + ("-pyramid" if config["pyramid"] else ""),
        source=config["init_from"],
        seed=config["seed"],
        iterations=config["iterations"],
        setting={key: data[key] for key in ("train", "test", "classes")} | {key: config[key] for key in SETTING},
        test=[line for line in metrics if line["split"] == "test"],
        command=environment.get("command", ""),
        device=environment.get("device", ""),
    )


def _object(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def sections(runs: list[Detector], out: Path) -> list[Section]:
    """A section for the detectors of each data set and setting; draws their curves into `out`."""
    groups: dict[str, list[Detector]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.data, run.setting]), []).append(run)
    return [
        _section(group, "" if number == 1 else f"-{number}", out) for number, group in enumerate(groups.values(), 1)
    ]


def _section(group: list[Detector], where: str, out: Path) -> Section:
    first = group[0]
    runs = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    lists = f"trained on {', '.join(first.setting['train'])}, tested on {first.setting['test']}"
    section = Section(f"Detection on {first.data}: {runs} of {first.iterations:,} iterations, {lists}")
    whole = paper.DETECTION_ITERATIONS[first.kind]
    if first.iterations < whole:
        section.warnings.append(f"SHORTENED: {first.iterations:,} of the paper's {whole:,} iterations")
    section.tables = [table(group, where)]
    if any(run.test for run in group):
        file = f"detection{where}"
        save(_figure(group), out / file)
        section.figures = [
            (file, f"mAP on the test images of {first.data} over iterations, {COLUMNS[first.kind][0][1]}.")
        ]
    section.commands = [(f"{run.name}, seed {run.seed}, on {run.device}; {run.folder}", run.command) for run in group]
    return section


def table(group: list[Detector], where: str = "") -> Table:
    """Table 7 (VOC) or 8 (COCO): mAP in %, means over the seeds of finished runs, beside the paper's."""
    kind, first = group[0].kind, group[0]
    number = {"voc": 7, "coco": 8}[kind]
    columns = COLUMNS[kind]
    header = ["detector", *(f"ours, {name}" for _, name, _ in columns), *PAPERS[kind]]
    made = Table(f"table-{number}{where}", f"Table {number}: mAP in %, {first.data}", header)
    named: dict[tuple[str, str | None], dict[int, Detector]] = {}
    for run in sorted(group, key=lambda run: len(run.test)):  # of one seed that which came furthest
        seeds = named.setdefault((run.name, run.source), {})
        if run.seed in seeds:
            made.notes.append(f"{seeds[run.seed].folder}: is the same run as {run.folder}; left out")
        seeds[run.seed] = run
    for (name, _), seeds in sorted(named.items(), key=str):
        runs = list(seeds.values())
        done = [run for run in runs if run.finished]
        row: list[Cell] = [name, *(spread([run.test[-1][key] for run in done]) for key, _, _ in columns)]
        published = paper.DETECTION[kind].get(runs[0].net)
        row += published or (None, None)
        made.rows.append(row)
        made.notes += [f"{name}, seed {run.seed}: unfinished; in no mean" for run in runs if not run.finished]
    made.notes.append(f"Not comparable with the paper's: {'; '.join(_reasons(group))}.")
    better, worse = (paper.DETECTION[kind][net] for net in ("resnet-101", "vgg-16"))
    gains = " and ".join(f"{high - low:.1f}" for high, low in zip(better, worse, strict=True))
    made.notes.append(f"In the paper ResNet-101 is {gains} points above VGG-16.")
    return made


def _reasons(group: list[Detector]) -> list[str]:
    """Why these figures cannot be held against the paper's."""
    first, whole = group[0], paper.DETECTION_ITERATIONS[group[0].kind]
    usual = {"voc": (["2007_trainval", "2012_trainval"], "2007_test"), "coco": (["train2014"], "val2014")}[first.kind]
    found = []
    if (first.setting["train"], first.setting["test"]) != usual or first.data not in ("VOCdevkit", "coco", "COCO"):
        found.append(f"{first.data} ({first.setting['test']}) is not the paper's data")
    if first.iterations != whole:
        found.append(f"{first.iterations:,} iterations, not {whole:,}")
    if any(run.source is None for run in group):
        found.append("random weights in place of ImageNet's")
    return [*found, "all parts trained together, not in four steps"]


def _figure(group: list[Detector]) -> Any:
    from matplotlib.figure import Figure

    key, rule, _ = COLUMNS[group[0].kind][0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(run.name for run in group))
    for run in group:
        points = [(line["iteration"], line[key]) for line in run.test]
        if points:
            colour = f"C{names.index(run.name)}"
            first = next(other for other in group if other.name == run.name) is run
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=run.name if first else None)
    axes.set(xlabel="iteration", ylabel=f"{rule} (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure

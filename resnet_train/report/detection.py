"""Tables 7 and 8: the detectors of resnet-detect beside the paper's, and their mAP over iterations; their tests."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.files import read_if_object, read_object
from resnet_train.report import improvements
from resnet_train.report.curves import OTHERS, plain_matplotlib
from resnet_train.report.figures import Picture
from resnet_train.report.page import Section
from resnet_train.report.runs import Begun
from resnet_train.report.tables import Cell, Table, spread, without_places
from resnet_train.report.values import number, plain, reading, test_images, whole, word

# Of a configuration, what must be the same in one table.
SETTING = (
    *("iterations", "batch_size", "regions", "lr", "warmup", "drops", "momentum", "weight_decay"),
    *("min_size", "max_size", "anchors", "proposals", "freeze", "precision"),
)
# The columns of each table: the key of the test, what it is called, and its place among the paper's two figures.
COLUMNS: dict[str, list[tuple[str, str, int | None]]] = {
    "voc": [("map07", "mAP, VOC 2007's rule", 0), ("map10", "mAP, VOC 2010's rule", 1)],
    "coco": [("map50", "mAP@.5", 0), ("map", "mAP@[.5,.95]", 1)],
    "det": [("map10", "mAP, VOC 2010's rule", None), ("map", "mAP@[.5,.95]", None)],
}
MASKS: list[tuple[str, str, int | None]] = [
    ("mask_map50", "of masks, @.5", None),
    ("mask_map", "of masks, @[.5,.95]", None),
]
PAPERS = {"voc": ("paper, VOC 2007 test", "paper, VOC 2012 test"), "coco": ("paper, COCO val, @.5", "@[.5,.95]")}


@dataclass(frozen=True)
class Detector:
    """One run of resnet-detect, as its folder tells it."""

    folder: Path
    place: str  # as a report names the folder
    kind: str  # voc, coco or det
    data: str
    net: str
    source: str | None  # the file of the weights that it began with
    seed: int
    iterations: int
    setting: dict[str, Any]
    test: list[dict[str, Any]]  # the lines of the metrics
    images: int  # of the last test; 0 before the first
    classes: int | None  # of a finished run
    tests: list[improvements.Test]  # the results of resnet-detect test beside its checkpoints
    command: str
    device: str

    @property
    def published(self) -> bool:
        """Whether tables 7 and 8 are of these test images, by how many they and their classes are."""
        return self.kind in PAPERS and paper.is_detection_test(self.kind, self.images, self.classes)

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


def find(folders: Begun) -> list[Detector]:
    """The detectors among the runs in `folders`.

    Raises UserError for files that are no such run's.
    """
    found = []
    for folder, (place, metrics) in folders.items():
        if "backbone" in read_if_object(folder / "config.json"):
            with reading(folder, "resnet-detect"):
                found.append(_read(folder, place, metrics))
    return sorted(found, key=lambda run: (run.data, run.net, run.name, run.seed))


def _read(folder: Path, place: str, metrics: list[dict[str, Any]]) -> Detector:
    config = read_object(folder / "config.json")
    environment, summary = (read_if_object(folder / f"{name}.json") for name in ("environment", "summary"))
    data = config["data"]
    kind, parts = data["name"], [word(name) for name in data["train"]]
    net = "vgg-16" if config["backbone"] == "vgg16" else f"resnet-{whole(config['depth'])}"
    lines = [line for line in metrics if line["split"] == "test"]
    masks = bool(config["masks"])
    net += "-pyramid" * bool(config["pyramid"]) + "-context" * bool(config["context"]) + "-masks" * masks
    keys = [key for key, _, _ in COLUMNS[kind] + MASKS * masks]
    test = [
        {"iteration": whole(line["iteration"])} | {key: number(line[key], 0, 100) for key in keys} for line in lines
    ]
    # The last test of the training, as resnet-detect test would tell it.
    own = lines[-1] | {"net": net, "iterations": config["iterations"], "list": data["test"]} if lines else {}
    own |= {"per_class": summary["last"]["per_class"] if summary else {}, "device": environment.get("device", "")}
    return Detector(
        folder=folder,
        place=place,
        kind=kind,
        data=word(metrics[0]["data"]),
        net=net,
        source=None if config["init_from"] is None else word(config["init_from"]),
        seed=whole(config["seed"]),
        iterations=whole(config["iterations"], 1),
        setting={"train": parts, "test": word(data["test"]), "classes": plain(data["classes"])}
        | {key: plain(config[key]) for key in SETTING},
        test=test,
        images=whole(lines[-1]["images"]) if lines else 0,
        classes=len(summary["last"]["per_class"]) if summary else None,
        tests=improvements.find(folder, place, own),
        command=word(environment.get("command", "")),
        device=word(environment.get("device", "")),
    )


def sections(runs: list[Detector]) -> list[Section]:
    """A section for the detectors of each data set and setting."""
    groups: dict[str, list[Detector]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.data, run.setting]), []).append(run)
    return [_section(group, "" if number == 1 else f"-{number}") for number, group in enumerate(groups.values(), 1)]


def _section(group: list[Detector], where: str) -> Section:
    first = group[0]
    runs = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    lists = f"trained on {', '.join(first.setting['train'])}, tested on {first.setting['test']}"
    lists += f" ({test_images(images)})" if (images := max(run.images for run in group)) else ""
    section = Section(f"Detection on {first.data}: {runs} of {first.iterations:,} iterations, {lists}")
    published = any(run.published for run in group)
    if published and first.iterations < (papers := paper.DETECTION_ITERATIONS[first.kind]):
        section.warnings.append(f"SHORTENED: {first.iterations:,} of the paper's {papers:,} iterations")
    section.tables = [table(group, where)]
    if tests := [test for run in group for test in run.tests]:
        section.tables += improvements.tables(tests, where)
    if any(run.test for run in group):
        caption = f"{COLUMNS[first.kind][0][1]}, on the test images of {first.data}, over iterations."
        section.figures = [Picture(f"detection{where}", caption, functools.partial(_figure, group))]
    section.commands = [
        (f"{run.name}, seed {run.seed}, on {run.device}; {run.place}", without_places(run.command)) for run in group
    ]
    return section


def table(group: list[Detector], where: str = "") -> Table:
    """Mean average precision in %, means over the seeds of finished runs; table 7 or 8 where the paper has the data."""
    kind, first = group[0].kind, group[0]
    with_masks = any(MASKS[0][0] in line for run in group for line in run.test)
    columns, published = COLUMNS[kind] + MASKS * with_masks, any(run.published for run in group)
    header = ["detector", *(f"{'ours, ' * published}{name}" for _, name, _ in columns)]
    name, title = "detectors", "Detectors: mAP"
    if published:
        header += PAPERS[kind]
        printed = {"voc": 7, "coco": 8}[kind]
        name, title = f"table-{printed}", f"Table {printed}: mAP"
    made = Table(f"{name}{where}", f"{title} in %, {first.data}", header)
    named: dict[tuple[str, str | None], dict[int, Detector]] = {}
    for run in sorted(group, key=lambda run: len(run.test)):  # of one seed that which came furthest
        seeds = named.setdefault((run.name, run.source), {})
        if run.seed in seeds:
            made.notes.append(f"{seeds[run.seed].place}: is the same run as {run.place}; left out")
        seeds[run.seed] = run
    for (name, _), seeds in sorted(named.items(), key=str):
        runs = list(seeds.values())
        done = [run for run in runs if run.finished]
        found = [[run.test[-1][key] for run in done if key in run.test[-1]] for key, _, _ in columns]
        row: list[Cell] = [name, *map(spread, found)]
        row += (paper.DETECTION[kind].get(runs[0].net) or (None, None)) if published else ()
        made.rows.append(row)
        made.notes += [f"{name}, seed {run.seed}: unfinished; in no mean" for run in runs if not run.finished]
    if published:
        made.notes.append(f"Not comparable with the paper's: {'; '.join(_reasons(group))}.")
        better, worse = (paper.DETECTION[kind][net] for net in ("resnet-101", "vgg-16"))
        gains = " and ".join(f"{high - low:.1f}" for high, low in zip(better, worse, strict=True))
        made.notes.append(f"In the paper ResNet-101 is {gains} points above VGG-16.")
    return made


def _reasons(group: list[Detector]) -> list[str]:
    """Why these figures cannot be held against the paper's."""
    first, papers = group[0], paper.DETECTION_ITERATIONS[group[0].kind]
    usual = {"voc": (["2007_trainval", "2012_trainval"], "2007_test"), "coco": (["train2014"], "val2014")}[first.kind]
    found = []
    if (first.setting["train"], first.setting["test"]) != usual:
        found.append(f"other lists of images than {', '.join(usual[0])} and {usual[1]}")
    if first.iterations != papers:
        found.append(f"{first.iterations:,} iterations, not {papers:,}")
    if any(run.source is None for run in group):
        found.append("random weights in place of ImageNet's")
    return [*found, "all parts trained together, not in four steps"]


def _figure(group: list[Detector]) -> Any:
    key, rule, _ = COLUMNS[group[0].kind][0]
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        names = list(dict.fromkeys(run.name for run in group))
        for run in group:
            points = [(line["iteration"], line[key]) for line in run.test]
            if points:
                first = next(other for other in group if other.name == run.name) is run
                colour = OTHERS[names.index(run.name) % len(OTHERS)]
                label = run.name if len(run.name) < 60 else f"{run.name[:59]}…"
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label if first else None)
        axes.set(xlabel="iterations", ylabel=f"{rule} (%)", ylim=(0, 100))
        axes.legend()
    return figure

"""Tables 7 and 8: detectors beside the paper's, their mAP over iterations, and their tests."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.engine.metrics import count_replaced
from resnet_train.files import read_if_object, read_object
from resnet_train.report import improvements
from resnet_train.report.figures import Picture, draw_tests
from resnet_train.report.folders import name_weights
from resnet_train.report.page import Section
from resnet_train.report.runs import FolderMetrics, describe_run
from resnet_train.report.tables import MEANING, Cell, Table, spread, strip_folders
from resnet_train.report.values import (
    config_value,
    devices,
    number,
    reading,
    resolve_auto,
    test_images,
    used_precision,
    whole,
    word,
)

# The keys of a configuration that must be equal among the runs of one table.
SETTING = (
    *("iterations", "batch_size", "regions", "lr", "warmup", "drops", "momentum", "weight_decay"),
    *("min_size", "max_size", "anchors", "proposals", "freeze"),
)
# The columns of each table: the key in the metrics, the heading, and the index among the paper's two figures.
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
    """One run of resnet-detect, as read from its folder."""

    folder: Path
    display_path: str  # of the folder, see Run
    kind: str  # voc, coco or det
    data: str
    net: str
    source: str | None  # the file of the initial weights
    weights: str  # the name of that file in the report; empty: random
    seed: int
    iterations: int
    setting: dict[str, Any]
    test: list[dict[str, Any]]  # its lines in the metrics
    images: int  # of the last test; 0 before the first
    classes: int | None  # of a finished run
    tests: list[improvements.Test]  # results of resnet-detect test beside the checkpoints
    command: str
    device: str
    replaced: int = 0  # see Run

    @property
    def published(self) -> bool:
        """Whether the test is that of tables 7 and 8, by the numbers of its images and classes."""
        return self.kind in PAPERS and paper.is_detection_test(self.kind, self.images, self.classes)

    @property
    def finished(self) -> bool:
        """Whether the last iteration has been tested."""
        return bool(self.test) and self.test[-1]["iteration"] == self.iterations

    @property
    def name(self) -> str:
        """The net and its initial weights."""
        return f"{self.net}, from {self.weights}" if self.weights else f"{self.net}, random weights"


def find(folders: FolderMetrics) -> list[Detector]:
    """The runs of resnet-detect among `folders`. Raises UserError for files that are not those of such a run."""
    detectors = []
    for folder, (display_path, metrics) in folders.items():
        if "backbone" in read_if_object(folder / "config.json"):
            with reading(folder, "a run of resnet-detect"):
                detectors.append(_read(folder, display_path, metrics))
    resolve_auto([run.setting for run in detectors])
    names = name_weights(run.source for run in detectors if run.source is not None)
    detectors = [dataclasses.replace(run, weights=names[run.source] if run.source else "") for run in detectors]
    return sorted(detectors, key=lambda run: (run.data, run.net, run.name, run.seed))


def _read(folder: Path, display_path: str, metrics: list[dict[str, Any]]) -> Detector:
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
    # The last test of the training, in the form of a result of resnet-detect test.
    last_test = lines[-1] | {"net": net, "iterations": config["iterations"], "list": data["test"]} if lines else {}
    last_test |= {"per_class": summary["last"]["per_class"] if summary else {}, "device": environment.get("device", "")}
    return Detector(
        folder=folder,
        display_path=display_path,
        kind=kind,
        data=word(metrics[0]["data"]),
        net=net,
        source=None if config["init_from"] is None else word(config["init_from"]),
        weights="",
        seed=whole(config["seed"]),
        iterations=whole(config["iterations"], 1),
        setting={"train": parts, "test": word(data["test"]), "classes": config_value(data["classes"])}
        | {key: config_value(config[key]) for key in SETTING}
        | {"precision": word(config["precision"])}
        | used_precision(environment | summary)
        | {"images": word(environment.get("digest", ""))},  # other data may share a label
        test=test,
        images=whole(lines[-1]["images"]) if lines else 0,
        classes=len(summary["last"]["per_class"]) if summary else None,
        tests=improvements.find(folder, display_path, last_test),
        command=word(environment.get("command", "")),
        device=devices(environment),
        replaced=whole(count_replaced(metrics)),
    )


def sections(runs: list[Detector]) -> list[Section]:
    """A section for the detectors of each data set and setting."""
    digests: dict[str, set[str]] = {}
    for run in runs:
        digests.setdefault(run.data, set()).add(run.setting["images"])
    groups: dict[str, list[Detector]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.data, run.setting]), []).append(run)
    return [
        _section(group, "" if number == 1 else f"-{number}", several=len(digests[group[0].data]) > 1)
        for number, group in enumerate(groups.values(), 1)
    ]


def _section(group: list[Detector], where: str, several: bool) -> Section:
    """A section; where `several` data sets share its label, the title has the first digits of its digest."""
    first = group[0]
    runs = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    lists = f"trained on {', '.join(first.setting['train'])}, tested on {first.setting['test']}"
    lists += f" ({test_images(images)})" if (images := max(run.images for run in group)) else ""
    data = first.data + (f" (digest {first.setting['images'][:8] or 'not recorded'})" if several else "")
    section = Section(f"Detection on {data}: {runs} of {first.iterations:,} iterations, {lists}")
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
        (
            describe_run(f"{run.name}, seed {run.seed}", run.device, run.replaced, run.display_path),
            strip_folders(run.command),
        )
        for run in group
    ]
    return section


def table(group: list[Detector], where: str = "") -> Table:
    """mAP in %, means over the seeds of finished runs; as table 7 or 8 if the paper has the data."""
    kind, first = group[0].kind, group[0]
    with_masks = any(MASKS[0][0] in line for run in group for line in run.test)
    columns, published = COLUMNS[kind] + MASKS * with_masks, any(run.published for run in group)
    header = ["detector", *(f"{'ours, ' * published}{name}" for _, name, _ in columns)]
    name, title = "detectors", "Detectors: mAP"
    if published:
        header += PAPERS[kind]
        number = {"voc": 7, "coco": 8}[kind]
        name, title = f"table-{number}", f"Table {number}: mAP"
    result = Table(f"{name}{where}", f"{title} in %, {first.data}", header)
    by_weights: dict[tuple[str, str | None], dict[int, Detector]] = {}
    for run in sorted(group, key=_reached):  # of equal seeds the one that got furthest comes last
        seeds = by_weights.setdefault((run.name, run.source), {})
        if run.seed in seeds:
            result.notes.append(f"{seeds[run.seed].display_path}: is the same run as {run.display_path}; left out")
        seeds[run.seed] = run
    for (name, _), seeds in sorted(by_weights.items(), key=str):
        runs = list(seeds.values())
        done = [run for run in runs if run.finished]
        values = [[run.test[-1][key] for run in done if key in run.test[-1]] for key, _, _ in columns]
        row: list[Cell] = [name, *map(spread, values)]
        row += (paper.DETECTION[kind].get(runs[0].net) or (None, None)) if published else ()
        result.rows.append(row)
        result.notes += [_unfinished(run) for run in runs if not run.finished]
    result.notes.append(f"{improvements.explain(key for key, _, _ in columns)} {MEANING}")
    if published:
        result.notes.append(f"Not comparable with the paper's: {'; '.join(_reasons(group))}.")
        better, worse = (paper.DETECTION[kind][net] for net in ("resnet-101", "vgg-16"))
        gains = " and ".join(f"{high - low:.1f}" for high, low in zip(better, worse, strict=True))
        result.notes.append(f"In the paper ResNet-101 is {gains} points above VGG-16.")
    return result


def _reached(run: Detector) -> int:
    """The iteration of the last test."""
    return run.test[-1]["iteration"] if run.test else 0


def _unfinished(run: Detector) -> str:
    key, rule, _ = COLUMNS[run.kind][0]
    tested = (
        f"{rule} {run.test[-1][key]:.2f} % at iteration {run.test[-1]['iteration']:,}" if run.test else "no test yet"
    )
    return f"{run.name}, seed {run.seed}: unfinished, in no mean ({tested}, of {run.iterations:,} iterations)"


def _reasons(group: list[Detector]) -> list[str]:
    """Why these figures are not comparable with the paper's."""
    first, papers = group[0], paper.DETECTION_ITERATIONS[group[0].kind]
    lists = {"voc": (["2007_trainval", "2012_trainval"], "2007_test"), "coco": (["train2014"], "val2014")}[first.kind]
    reasons = []
    if (first.setting["train"], first.setting["test"]) != lists:
        reasons.append(f"other lists of images than {', '.join(lists[0])} and {lists[1]}")
    if first.iterations != papers:
        reasons.append(f"{first.iterations:,} iterations, not {papers:,}")
    if any(run.source is None for run in group):
        reasons.append("random weights in place of ImageNet's")
    return [*reasons, "all parts trained together, not in four steps"]


def _figure(group: list[Detector]) -> Any:
    key, rule, _ = COLUMNS[group[0].kind][0]
    tests = [(run.name, [(line["iteration"], line[key]) for line in run.test]) for run in group]
    return draw_tests(tests, f"{rule} (%)")

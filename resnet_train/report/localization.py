"""Localization errors, on ILSVRC's images as tables 13 and 14, and their curves over iterations."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.engine.metrics import count_replaced
from resnet_train.files import read_if_object, read_object
from resnet_train.report.figures import Picture, draw_tests
from resnet_train.report.improvements import progress
from resnet_train.report.page import Section
from resnet_train.report.runs import FolderMetrics, describe_run
from resnet_train.report.tables import Cell, Table, add_files, strip_folders
from resnet_train.report.values import devices, number, reading, test_images, whole, word

ERRORS = ("error", "error1", "error5", "class_error1", "class_error5")  # of a test, in %


@dataclass(frozen=True)
class Localizer:
    """One run of resnet-localize, as read from its folder."""

    folder: Path
    display_path: str  # of the folder, see Run
    data: str
    stage: str
    seed: int
    iterations: int
    test: list[dict[str, Any]]  # its lines in the metrics
    results: list[dict[str, Any]]  # of resnet-localize test, beside the checkpoints
    images: int  # of the last test; 0 before the first
    command: str
    device: str
    replaced: int = 0  # see Run

    @property
    def published(self) -> bool:
        """Whether the test has as many images as that of tables 13 and 14."""
        return _is_the_papers(self.images)

    @property
    def name(self) -> str:
        """The stage and the seed."""
        return f"{paper.LOCALIZATION_METHODS[self.stage]}, seed {self.seed}"


def _is_the_papers(images: int) -> bool:
    return images in paper.IMAGENET_TEST


def find(folders: FolderMetrics) -> list[Localizer]:
    """The runs of resnet-localize among `folders`. Raises UserError for files that are not those of such a run."""
    localizers = []
    for folder, (display_path, metrics) in folders.items():
        if "stage" in read_if_object(folder / "config.json"):
            with reading(folder, "a run of resnet-localize"):
                localizers.append(_read(folder, display_path, metrics))
    return sorted(localizers, key=lambda run: (run.data, run.stage != "rpn", run.seed, run.display_path))


def _read(folder: Path, display_path: str, metrics: list[dict[str, Any]]) -> Localizer:
    config, environment = read_object(folder / "config.json"), read_if_object(folder / "environment.json")
    lines = [line for line in metrics if line["split"] == "test"]
    return Localizer(
        folder=folder,
        display_path=display_path,
        data=word(metrics[0]["data"]),
        stage={"rpn": "rpn", "rcnn": "rcnn"}[config["stage"]],
        seed=whole(config["seed"]),
        iterations=whole(config["iterations"], 1),
        test=[{"iteration": whole(line["iteration"]), "error": number(line["error"], 0, 100)} for line in lines],
        results=[
            _result(result, f"{display_path}/checkpoints/{path.name}")
            for path in sorted((folder / "checkpoints").glob("*.json"))
            if (result := read_if_object(path)).get("task") == "localization"
        ],
        images=whole(lines[-1]["images"]) if lines else 0,
        command=word(environment.get("command", "")),
        device=devices(environment),
        replaced=whole(count_replaced(metrics)),
    )


def _result(result: dict[str, Any], file: str) -> dict[str, Any]:
    """The values of a test's result, checked and safe to show."""
    words = {key: word(result[key]) for key in ("method", "net", "data", "protocol", "device")}
    errors = {key: number(result[key], 0, 100) for key in ERRORS if key in result}
    names: dict[str, Any] = {"classes": whole(result["classes"], 1)}
    names |= {"classifier": word(result["classifier"]["net"])} if "classifier" in result else {}
    lengths = f"RPN {progress(result)}" + (f", R-CNN {progress(result['rcnn'])}" if "rcnn" in result else "")
    return words | errors | names | {"images": whole(result["images"]), "lengths": lengths, "file": word(file)}


def sections(runs: list[Localizer]) -> list[Section]:
    """A section for the runs on each data set."""
    groups: dict[str, list[Localizer]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    return [_section(group, "" if number == 1 else f"-{number}") for number, group in enumerate(groups.values(), 1)]


def _section(group: list[Localizer], where: str) -> Section:
    data = group[0].data
    images = max(run.images for run in group)
    size = f" ({test_images(images)})" if images else ""
    section = Section(f"Localization on {data}{size}: {len(group)} run{'s' if len(group) > 1 else ''}")
    by_data: dict[str, list[dict[str, Any]]] = {data: []}
    for run in group:
        for result in run.results:
            by_data.setdefault(result["data"], []).append(result)
    for count, (tested, results) in enumerate(by_data.items()):
        suffix = f"{where}-data-{count + 1}" if count else where
        section.tables += _tables(tested, results, suffix, images if not count else 0)
    if any(run.test for run in group):
        caption = (
            f"Localization error on a center crop of the test images of {data}, true class given, over iterations."
        )
        section.figures = [Picture(f"localization{where}", caption, functools.partial(_figure, group))]
    section.commands = [
        (describe_run(run.name, run.device, run.replaced, run.display_path), strip_folders(run.command))
        for run in group
    ]
    return section


def _tables(data: str, results: list[dict[str, Any]], where: str, images: int) -> list[Table]:
    """Tables 13 and 14 if results, or else `images`, are as many as the paper's images; else a table of its own."""
    if any(_is_the_papers(count) for count in (images, *(result["images"] for result in results))):
        return [_errors(data, results, where, published=True), _systems(data, results, where)]
    return [_errors(data, results, where, published=False)]


def _errors(data: str, results: list[dict[str, Any]], where: str, *, published: bool) -> Table:
    """Localization errors with the true class given and with predicted classes; ours, then the paper's if published."""
    name, title = ("table-13", "Table 13: localization") if published else ("localizers", "Localization")
    header = ["whose", "method", "net", "test", "localization error, true class given"]
    header += ["localization error, top-5", "localization error, top-1", "classes named by"]
    header += ["its classification error, top-5", "its classification error, top-1"]
    table = Table(f"{name}{where}", f"{title} error in %, {'ours on ' * published}{data}", header)
    results = sorted(results, key=lambda one: (one["method"] != "RPN", one["protocol"], -one["error"]))
    for result in results:
        row: list[Cell] = ["ours", result["method"], result["net"], result["protocol"], result["error"]]
        row += [result.get("error5"), result.get("error1"), result.get("classifier")]
        table.rows.append([*row, result.get("class_error5"), result.get("class_error1")])
    for method, net, test, error, top5, names, their5 in paper.LOCALIZATION if published else ():
        table.rows.append(["paper", method, net, test, error, top5, None, names, their5, None])
    if not published:  # all are ours; of at most five classes the true one is always among five
        few = all(result["classes"] <= 5 for result in results)
        columns = [index for index, name in enumerate(header) if index and not (few and name.endswith("top-5"))]
        table.header = [header[index] for index in columns]
        table.rows = [[row[index] for index in columns] for row in table.rows]
    add_files(table, [result["file"] for result in results])
    table.notes += [
        f"{one['file']}: {one['lengths']}; {test_images(one['images'])}, on {one['device']}" for one in results
    ]
    if not results:
        table.notes.append("Ours: not measured yet; `resnet-localize test checkpoint=…/checkpoints/last.pt dense=true`")
    table.notes.append(
        "An image is wrong where no answer has its class and overlaps one of its boxes of that class by 0.5 or more: of"
        " one answer with the true class, of one (top-1) or five (top-5) with the classes of a classifier."
    )
    return table


def _systems(data: str, results: list[dict[str, Any]], where: str) -> Table:
    """Top-5 localization errors of systems."""
    table = Table(
        f"table-14{where}",
        f"Table 14: top-5 localization error in %, ours on {data}",
        ["whose", "system", "val", "test"],
    )
    for result in sorted((one for one in results if "error5" in one), key=lambda one: -one["error5"]):
        name = f"{result['net']}, {result['method']}, {result['protocol']}"
        table.rows.append(["ours", name, result["error5"], None])
    for system, (val, test) in paper.LOCALIZATION_SYSTEMS.items():
        table.rows.append(["paper", system, val, test])
    return table


def _figure(group: list[Localizer]) -> Any:
    count = Counter(run.name for run in group)
    names = [f"{run.name}; {run.display_path}" if count[run.name] > 1 else run.name for run in group]
    points = [[(line["iteration"], line["error"]) for line in run.test] for run in group]
    return draw_tests(list(zip(names, points, strict=True)), "localization error (%)")

"""Tables 9 to 12: the gains of appendix B's improvements and AP by class, from the results of resnet-detect test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.files import read_if_object
from resnet_train.report.tables import Cell, Table, add_files
from resnet_train.report.values import config_value, number, test_images, whole, word

# The paper's tables by the test list: kind of the data, number of the table.
TABLES = {"val2014": ("coco", 9), "2007_test": ("voc", 10), "2012_test": ("voc", 11), "val2": ("det", 12)}
MEASURES = {"map07": "mAP, VOC 2007's rule", "map10": "mAP, VOC 2010's rule", "map50": "mAP@.5", "map": "mAP@[.5,.95]"}
MASKS = {"mask_map50": "of masks, @.5", "mask_map": "of masks, @[.5,.95]"}
# What these mean.
MEANING = "mAP: the mean over the classes of the average precision (AP); "
POINTS = "VOC 2007's rule averages the precision at 11 recalls, VOC 2010's takes the area under the whole curve"
OVERLAPS = (
    "@.5: a detection counts from an overlap (IoU) of 0.5 with an object on; @[.5,.95]: the mean over ten such bounds"
)
CLASSES = 40  # with a row each


@dataclass(frozen=True)
class Test:
    """One result of resnet-detect test."""

    file: str
    net: str
    steps: tuple[str, ...]  # the improvements in use, in the paper's order
    members: int
    data: str
    tested: str  # the list of test images
    iterations: str  # of training, done and planned, of each member
    device: str
    images: int
    seconds: float | None  # per image
    protocol: str
    figures: dict[str, float]  # in %
    classes: dict[str, tuple[float | None, int]]  # AP by VOC 2010's rule in %, None without objects; objects

    @property
    def published(self) -> bool:
        """Whether the paper has a table of this list, with as many images and classes."""
        if self.tested not in TABLES:
            return False
        return paper.is_detection_test(TABLES[self.tested][0], self.images, len(self.classes) or None)


def find(folder: Path, display_path: str, last_test: dict[str, Any]) -> list[Test]:
    """The results beside the checkpoints of a run of resnet-detect. Raises the errors in MALFORMED.

    `last_test`, the last test of the training, is the baseline of results that have none.
    """
    files = sorted((folder / "checkpoints").glob("*.json"))
    results = [(path, read_if_object(path)) for path in files]
    tests = [_read(f"{display_path}/checkpoints/{path.name}", result) for path, result in results if "refine" in result]
    if tests and "images" in last_test:
        baseline = _read(
            f"{display_path}/metrics.jsonl", last_test | {"refine": False, "scales": None, "seconds": None}
        )
        alike = [test for test in tests if _baseline_key(test) == _baseline_key(baseline)]
        tests += [baseline] if alike and all(test.steps != baseline.steps for test in alike) else []
    return tests


def _baseline_key(test: Test) -> tuple[Any, ...]:
    """The key of tests that share a baseline."""
    return test.data, test.tested, test.members, test.net


def _read(file: str, result: dict[str, Any]) -> Test:
    members = result.get("members", [result])
    nets = list(dict.fromkeys(word(member["net"]) for member in members))
    steps = {
        "box refinement": result["refine"] is True,
        "context": any("-context" in net for net in nets),
        "multi-scale testing": config_value(result["scales"]) is not None,
    }
    images = whole(result["images"], 1)
    return Test(
        file=word(file),
        net=" and ".join(net.replace("-context", "") for net in nets),
        steps=tuple(step for step, is_on in steps.items() if is_on),
        members=len(members),
        data=word(result["data"]),
        tested=word(result["list"]),
        iterations=", ".join(progress(one) for one in members),
        device=word(result["device"]),
        images=images,
        seconds=None if result["seconds"] is None else number(result["seconds"]) / images,
        protocol=word(result["protocol"]),
        figures={key: number(result[key], 0, 100) for key in (*MEASURES, *MASKS) if key in result},
        classes={word(name): _class(one) for name, one in result["per_class"].items()},
    )


def explain(keys: Iterable[str]) -> str:
    """What the columns of these measures mean."""
    rules = {"map07": POINTS, "map10": POINTS, "map50": OVERLAPS, "map": OVERLAPS}
    return f"{MEANING}{'; '.join(dict.fromkeys(rules[key] for key in keys if key in rules))}."


def progress(member: dict[str, Any]) -> str:
    """The seed and the iterations, done and planned, of a checkpoint named in a result."""
    done, planned = whole(member["iteration"]), whole(member["iterations"], 1)
    of = "" if done == planned else f" of {planned:,}, unfinished"
    return f"seed {whole(member['seed'])}: iteration {done:,}{of}"


def _class(result: dict[str, Any]) -> tuple[float | None, int]:
    return None if result["ap10"] is None else number(result["ap10"], 0, 100), whole(result["objects"])


def tables(tests: list[Test], where: str) -> list[Table]:
    """For each test list a table of the improvements, beside the paper's if it has one, and one of the classes."""
    all_tables: list[Table] = []
    for index, (data, tested) in enumerate(dict.fromkeys((test.data, test.tested) for test in tests)):
        group = sorted((test for test in tests if (test.data, test.tested) == (data, tested)), key=_order)
        suffix = f"{where}-list-{index + 1}" if index else where
        all_tables += [_steps(group, data, suffix), *_classes(group, data, suffix)]
    return all_tables


def _order(test: Test) -> tuple[Any, ...]:
    return test.members, test.net, len(test.steps), test.steps


def _steps(group: list[Test], data: str, where: str) -> Table:
    tested, published = group[0].tested, any(test.published for test in group)
    steps = paper.IMPROVED.get(tested, {})
    measures = [key for key in (*MEASURES, *MASKS) if any(key in test.figures for test in group)]
    header = ["detector", "switched on", *(({**MEASURES, **MASKS})[key] for key in measures), "seconds per image"]
    header += ["paper, ResNet-101, at an overlap of 0.5", "paper, @[.5,.95]"] * published
    name, title = "improvements", "Improvements of appendix B"
    if published:
        name, title = f"table-{TABLES[tested][1]}", f"Table {TABLES[tested][1]}: improvements"
    table = Table(f"{name}{where}", f"{title}, mAP in %, {data}, {tested}", header)
    for test in group:
        row: list[Cell] = [
            _detector_name(test.members, test.net),
            " + ".join(test.steps) or "baseline",
            *(test.figures.get(key) for key in measures),
        ]
        comparable = test.members == 1 and test.net == "resnet-101"
        paper_figures = steps.get(test.steps, (None, None)) if comparable else (None, None)
        table.rows.append([*row, test.seconds, *(paper_figures if published else ())])
    if published:
        done = {test.steps for test in group if test.members == 1 and test.net == "resnet-101"}
        missing = [names for names in steps if names not in done]
        for names in missing:
            blank: list[Cell] = [None] * (len(measures) + 1)
            table.rows.append(["not measured", " + ".join(names) or "baseline", *blank, *steps[names]])
    add_files(table, [test.file for test in group])
    for count, net in dict.fromkeys((test.members, test.net) for test in group):
        if all(test.steps for test in group if (test.members, test.net) == (count, net)):
            table.notes.append(f"{_detector_name(count, net)}: the baseline was not measured.")
    table.notes += [
        f"{test.file}: {test.iterations}; {test_images(test.images)}, on {test.device}; {test.protocol}"
        for test in group
    ]
    table.notes.append(f"Baseline: none of the improvements. {explain(measures)}")
    return table


def _detector_name(members: int, net: str) -> str:
    return net if members == 1 else f"ensemble of {members}: {net}"


def _classes(group: list[Test], data: str, where: str) -> list[Table]:
    """A table of the AP of each class in each test; empty without classes."""
    names = list(dict.fromkeys(name for test in group for name in test.classes))
    columns = [f"{test.net}, {' + '.join(test.steps) or 'baseline'}" for test in group]
    alike = {column for column in columns if columns.count(column) > 1}
    columns = [f"{name}, {test.file}" if name in alike else name for name, test in zip(columns, group, strict=True)]
    title = f"AP of each class in %, VOC 2010's rule, {data}, {group[0].tested}"
    table = Table(f"classes{where}", title, ["class", "objects", *columns])
    for name in names[:CLASSES]:
        values = [test.classes.get(name, (None, 0)) for test in group]
        table.rows.append([name, str(max(objects for _, objects in values)), *(value for value, _ in values)])
    if len(names) > CLASSES:
        table.notes.append(f"The first {CLASSES} of {len(names)} classes; the others are in the tests' JSON files.")
    return [table] if names else []

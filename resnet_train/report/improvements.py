"""Tables 9 to 12: what the improvements of appendix B give, from the results of resnet-detect test, and AP by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.files import read_if_object
from resnet_train.report.tables import Cell, Table
from resnet_train.report.values import number, plain, test_images, whole, word

# Of the paper, by the list of the test: the kind of its data, and the table's number.
TABLES = {"val2014": ("coco", 9), "2007_test": ("voc", 10), "2012_test": ("voc", 11), "val2": ("det", 12)}
MEASURES = {"map07": "mAP, VOC 2007's rule", "map10": "mAP, VOC 2010's rule", "map50": "mAP@.5", "map": "mAP@[.5,.95]"}
MASKS = {"mask_map50": "of masks, @.5", "mask_map": "of masks, @[.5,.95]"}
CLASSES = 40  # of more the table would not be read


@dataclass(frozen=True)
class Test:
    """What one call of resnet-detect test has measured."""

    place: str
    net: str
    steps: tuple[str, ...]  # what was switched on, in the paper's order
    members: int
    data: str
    tested: str  # the list
    iterations: str  # of training, done and planned, of each member
    device: str
    images: int
    seconds: float | None  # of an image
    protocol: str
    figures: dict[str, float]  # in %
    classes: dict[str, tuple[float | None, int]]  # AP by VOC 2010's rule in %, None without objects, and the objects

    @property
    def published(self) -> bool:
        """Whether the paper has a table of this list, and these are as many images and classes as its own."""
        if self.tested not in TABLES:
            return False
        return paper.is_detection_test(TABLES[self.tested][0], self.images, len(self.classes) or None)


def find(folder: Path, place: str, own: dict[str, Any]) -> list[Test]:
    """The results beside the checkpoints of a run of resnet-detect. Raises what values of another form make.

    With them, where they show what a step gives and not what it is without, `own`, the last test of the training.
    """
    files = sorted((folder / "checkpoints").glob("*.json"))
    results = [(path, read_if_object(path)) for path in files]
    tests = [_read(f"{place}/checkpoints/{path.name}", found) for path, found in results if "refine" in found]
    if tests and "images" in own:
        plain = _read(f"{place}/metrics.jsonl", own | {"refine": False, "scales": None, "seconds": None})
        alike = [test for test in tests if _of(test) == _of(plain)]
        tests += [plain] if alike and all(test.steps != plain.steps for test in alike) else []
    return tests


def _of(test: Test) -> tuple[Any, ...]:
    """What has a row without any step."""
    return test.data, test.tested, test.members, test.net


def _read(place: str, found: dict[str, Any]) -> Test:
    members = found.get("members", [found])
    nets = list(dict.fromkeys(word(member["net"]) for member in members))
    on = {
        "box refinement": found["refine"] is True,
        "context": any("-context" in net for net in nets),
        "multi-scale testing": plain(found["scales"]) is not None,
    }
    images = whole(found["images"], 1)
    return Test(
        place=word(place),
        net=" and ".join(net.replace("-context", "") for net in nets),
        steps=tuple(step for step, is_on in on.items() if is_on),
        members=len(members),
        data=word(found["data"]),
        tested=word(found["list"]),
        iterations=", ".join(progress(one) for one in members),
        device=word(found["device"]),
        images=images,
        seconds=None if found["seconds"] is None else number(found["seconds"]) / images,
        protocol=word(found["protocol"]),
        figures={key: number(found[key], 0, 100) for key in (*MEASURES, *MASKS) if key in found},
        classes={word(name): _class(one) for name, one in found["per_class"].items()},
    )


def progress(member: dict[str, Any]) -> str:
    """The seed and the iterations of a checkpoint, done and planned, as a result names them."""
    done, planned = whole(member["iteration"]), whole(member["iterations"], 1)
    of = "" if done == planned else f" of {planned:,}, unfinished"
    return f"seed {whole(member['seed'])}: iteration {done:,}{of}"


def _class(found: dict[str, Any]) -> tuple[float | None, int]:
    return None if found["ap10"] is None else number(found["ap10"], 0, 100), whole(found["objects"])


def tables(tests: list[Test], where: str) -> list[Table]:
    """A table of the steps for each test list, beside the paper's where the images are its own, and of classes."""
    made: list[Table] = []
    for place, (data, tested) in enumerate(dict.fromkeys((test.data, test.tested) for test in tests)):
        group = sorted((test for test in tests if (test.data, test.tested) == (data, tested)), key=_order)
        suffix = f"{where}-list-{place + 1}" if place else where
        made += [_steps(group, data, suffix), *_classes(group, data, suffix)]
    return made


def _order(test: Test) -> tuple[Any, ...]:
    return test.members, test.net, len(test.steps), test.steps


def _steps(group: list[Test], data: str, where: str) -> Table:
    tested, published = group[0].tested, any(test.published for test in group)
    steps = paper.IMPROVED.get(tested, {})
    measures = [key for key in (*MEASURES, *MASKS) if any(key in test.figures for test in group)]
    header = ["detector", "switched on", *(({**MEASURES, **MASKS})[key] for key in measures), "seconds of an image"]
    header += ["paper, ResNet-101, at an overlap of 0.5", "paper, @[.5,.95]"] * published
    name, title = "improvements", "Improvements of appendix B"
    if published:
        name, title = f"table-{TABLES[tested][1]}", f"Table {TABLES[tested][1]}: improvements"
    made = Table(f"{name}{where}", f"{title}, mAP in %, {data}, {tested}", header)
    for test in group:
        row: list[Cell] = [
            _who(test.members, test.net),
            " + ".join(test.steps) or "baseline",
            *(test.figures.get(key) for key in measures),
        ]
        alike = test.members == 1 and test.net == "resnet-101"
        theirs = steps.get(test.steps, (None, None)) if alike else (None, None)
        made.rows.append([*row, test.seconds, *(theirs if published else ())])
    if published:
        done = {test.steps for test in group if test.members == 1 and test.net == "resnet-101"}
        missing = [on for on in steps if on not in done]
        for on in missing:
            blank: list[Cell] = [None] * (len(measures) + 1)
            made.rows.append(["not measured", " + ".join(on) or "baseline", *blank, *steps[on]])
    for count, net in dict.fromkeys((test.members, test.net) for test in group):
        if all(test.steps for test in group if (test.members, test.net) == (count, net)):
            made.notes.append(f"{_who(count, net)}: the baseline was not measured.")
    made.notes += [
        f"{test.place}: {test.iterations}; {test_images(test.images)}, on {test.device}; {test.protocol}"
        for test in group
    ]
    return made


def _who(members: int, net: str) -> str:
    return net if members == 1 else f"ensemble of {members}: {net}"


def _classes(group: list[Test], data: str, where: str) -> list[Table]:
    """AP of each class in each test."""
    names = list(dict.fromkeys(name for test in group for name in test.classes))
    header = ["class", "objects", *(f"{test.net}, {' + '.join(test.steps) or 'baseline'}" for test in group)]
    made = Table(f"classes{where}", f"AP of each class in %, VOC 2010's rule, {data}, {group[0].tested}", header)
    for name in names[:CLASSES]:
        found = [test.classes.get(name, (None, 0)) for test in group]
        made.rows.append([name, str(max(objects for _, objects in found)), *(value for value, _ in found)])
    if len(names) > CLASSES:
        made.notes.append(f"The first {CLASSES} of {len(names)} classes; the others are in the tests' JSON files.")
    return [made] if names else []

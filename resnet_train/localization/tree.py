"""ILSVRC's localization data: an ImageNet tree and the boxes of its images in Annotations/CLS-LOC/."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from resnet_train.config.layout import BOXES, class_folders_of_boxes, folders_in
from resnet_train.data.crops import LONGEST
from resnet_train.detection.annotations import (
    NO_IMAGE,
    Example,
    Fault,
    Faults,
    group_by_stem,
    list_files,
    make_example,
)
from resnet_train.detection.voc import read_objects, read_xml
from resnet_train.errors import UserError

NO_BOX = "images left out: no box of their class"
SAME_NAME = "images left out: another has the same name with another suffix"
NO_CLASS = "images left out: objects of several classes, and no folder that says which"
NO_SUCH_CLASS = "folders of val/ left out: no class of the checkpoint"
TOO_LONG = f"images left out: more than {LONGEST} times as long as wide"


class Photos(Sequence[Example]):
    """Images, each with its class and one box of it or more. Compact: ILSVRC has half a million."""

    def __init__(self, examples: Iterator[Example]) -> None:
        self.paths: list[str] = []
        self.names: list[str] = []
        sizes, labels, boxes, ends = [], [], [], [0]
        for example in examples:
            self.paths.append(str(example.path))
            self.names.append(example.name)
            sizes.append((example.width, example.height))
            labels.append(int(example.labels[0]))
            boxes.append(example.boxes)
            ends.append(ends[-1] + len(example.boxes))
        self.sizes, self.labels = torch.tensor(sizes, dtype=torch.int32).view(-1, 2), torch.tensor(labels)
        self.boxes, self.ends = torch.cat([torch.empty(0, 4), *boxes]), torch.tensor(ends)
        self.indices = range(len(self.paths))

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, indices: range) -> Photos:
        """The images at `indices`."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[indices.start : indices.stop : indices.step]
        return chosen

    def __getitem__(self, place: Any) -> Any:
        """An image, an Example: its class is `labels[0]`, from 1, its `image_id` its number in the whole, from 1."""
        index = self.indices[place]
        start, end = self.ends[index : index + 2].tolist()
        label, size = int(self.labels[index]), self.sizes[index].tolist()
        objects = [(label, box, False, 0.0) for box in self.boxes[start:end].tolist()]
        return make_example(Path(self.paths[index]), self.names[index], index + 1, (size[0], size[1]), objects)


@dataclass
class Localized:
    """The training and the test part."""

    classes: list[str]  # label i is classes[i - 1]
    train: Photos
    test: Photos  # ILSVRC's val
    faults: dict[str, int]  # what was cut or left out, counted by kind; images without boxes among them
    digest: str  # SHA-256 of classes, names, sizes and boxes; not of the pixels
    first_faults: dict[str, str]  # where the first of each kind of fault is, and what


def read_tree(root: Path, *, broken: str, classes: list[str] | None = None) -> Localized:
    """The images in train/CLASS/ and in val/, as CLASS/ or flat, and the boxes of their class.

    Boxes lie in Annotations/CLS-LOC/train/CLASS/NAME.xml and val/NAME.xml, where pixels count from 0 and a box includes
    both of its ends. An image's class is its folder; in a flat val/ it is that of its objects. Objects of other classes
    are not its boxes. An image without any is left out and counted. `broken`: stop or skip, as in detection. With
    `classes`, those of a checkpoint, val/ alone is read. Raises UserError.
    """
    images, folders = class_folders_of_boxes(root, train=classes is None)
    names = folders if classes is None else classes
    faults = Faults(broken)
    if odd := set(folders) - set(names):
        if odd == set(folders):
            raise UserError(f"data.root={root}: val/ has other classes than the checkpoint, such as {min(odd)}")
        faults.count(NO_SUCH_CLASS, str(images / "val" / min(odd)), len(odd))
    parts = {}
    for name in ("train", "val"):
        wanted = classes is None or name == "val"
        parts[name] = Photos(_read_part(root / BOXES / name, images / name, names, faults) if wanted else iter(()))
        if wanted and not len(parts[name]):
            raise UserError(f"data.root={root}: {name}/ has no image with a box of its class")
    digest = hashlib.sha256(json.dumps(names).encode())
    for name, part in parts.items():
        digest.update(json.dumps([name, part.names]).encode())
        for values in (part.sizes, part.labels, part.boxes, part.ends):
            digest.update(values.numpy().tobytes())
    counted = {kind: count for kind, count in sorted(faults.counted.items()) if count}
    return Localized(names, parts["train"], parts["val"], counted, digest.hexdigest(), faults.first)


def check_classes(name: str, theirs: list[str], ours: list[str], what: str = "the data") -> None:
    """Refuse what is of other classes than `what`, or of the same in another order. Raises UserError."""
    if odd := set(theirs) ^ set(ours):
        raise UserError(f"{name}: has other classes than {what}, such as {min(odd)}")
    if theirs != ours:
        raise UserError(f"{name}: has the same classes as {what} in another order")


def _read_part(boxes: Path, images: Path, classes: list[str], faults: Faults) -> Iterator[Example]:
    """The images of train/ or val/ that can be used, in order."""
    listed = set(folders_in(images))  # a checkpoint's class may be called anything, and name no folder elsewhere
    folders = [name for name in classes if name in listed]  # in val/ some may have none
    flat = _annotations(boxes)
    for name in tqdm(folders or [""], desc=f"reading {images.name}", leave=False, disable=None):
        files = group_by_stem(list_files(images / name))
        own = _annotations(boxes / name) if name and (boxes / name).is_dir() else {}
        for stem, (file, *others) in files.items():
            if others:
                where = os.path.join(images, name, others[0])
                faults.count(SAME_NAME, f"{where}: its annotation is that of {file}", len(others))
            example, path = None, own.pop(stem, None) or flat.pop(stem, None)
            if path is None:
                faults.count(NO_BOX, f"{os.path.join(images, name, file)} has no annotation")
                continue
            with faults:
                example = _example(path, images / name / file, f"{name}/{file}".lstrip("/"), classes, faults)
            if example is not None:
                yield example
        _refuse(own, images / name, faults)
    _refuse(flat, images, faults)


def _annotations(folder: Path) -> dict[str, Path]:
    """The annotations in a folder by the names of their images."""
    return {name.removesuffix(".xml"): folder / name for name in sorted(os.listdir(folder)) if name.endswith(".xml")}


def _refuse(annotations: dict[str, Path], folder: Path, faults: Faults) -> None:
    """Each of `annotations`, which are of no image, is a fault."""
    for stem, path in annotations.items():
        with faults:
            raise Fault(NO_IMAGE, f"{path}: there is no image {stem}.* in {folder}")


def _example(path: Path, image: Path, name: str, classes: list[str], faults: Faults) -> Example | None:
    """An image with the boxes of its class; None, counted, where it has none. Raises Fault."""
    size, objects = read_objects(read_xml(path), path, image, classes, faults, first=0)
    if max(size) > LONGEST * min(size):
        raise Fault(TOO_LONG, f"{image}: is {size[0]}x{size[1]}, more than {LONGEST} times as long as wide")
    labels = Counter(label for label, *_ in objects)
    folder, _, file = name.rpartition("/")
    if not folder and len(labels) > 1:
        kinds = ", ".join(classes[label - 1] for label in sorted(labels))
        raise Fault(NO_CLASS, f"{path}: has objects of several classes ({kinds}), and {file} lies in no folder of one")
    own = classes.index(folder) + 1 if folder else next(iter(labels), 0)
    mine = [thing for thing in objects if thing[0] == own]
    if not mine:
        faults.count(NO_BOX, f"{path} has none")
        return None
    return make_example(image, name, 0, size, mine)

"""Pictures with boxes, checked as they are read; what cannot be used is a fault."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.config.layout import is_image, list_file, lists_of
from resnet_train.data.decode import ImageError, read_image
from resnet_train.errors import UserError, nearest

LARGEST_SIDE = 1_000_000  # pixels: whole numbers up to there are exact in float32
LARGEST = torch.finfo(torch.float32).max
NARROWEST = 0.01  # pixels: what is narrower may have no area left once it is mirrored or scaled
# The kinds of faults, as they are counted.
CUT = "boxes cut at the image's edge"
NO_AREA = "boxes left out: no area or swapped corners"
OUTSIDE = "boxes left out: outside of the image"
NO_NUMBER = "boxes left out: not a finite number"
UNKNOWN = "boxes left out: unknown class"
INCOMPLETE = "boxes left out: fields missing or of the wrong type"
NO_SUCH_IMAGE = "boxes left out: of an image that does not exist"
BOX_TWICE = "boxes left out: an id given twice"
NO_MASK = "boxes left out: no mask, or one that cannot be read"
UNREADABLE = "images left out: unreadable"
NO_ANNOTATION = "images left out: no annotation"
BAD_ANNOTATION = "images left out: unreadable annotation"
NO_IMAGE = "images left out: no image file"
OTHER_SIZE = "images left out: not of the annotated size"
IMAGE_TWICE = "images left out: given twice"


@dataclass(frozen=True)
class Example:
    """One image and what is in it."""

    path: Path
    name: str  # VOC: the image's, with its year's folder where years are read (VOC2007/000005); COCO: file_name
    image_id: int  # COCO's own; VOC: 1, 2, … over the training lists and then the test list
    width: int
    height: int
    boxes: Tensor  # float32 (n, 4): left, top, right, bottom edges in pixels, continuous: 0 <= left < right <= width
    labels: Tensor  # int64 (n,): from 1; 0 is the background
    ignored: Tensor  # bool (n,): VOC's difficult, COCO's iscrowd: neither trained on nor counted in a test
    areas: Tensor  # float32 (n,): COCO's area (of the segment); else the box's
    masks: tuple[bytes, ...] = ()  # COCO's run lengths in text, of each box; none where masks are not read


@dataclass
class Examples:
    """The images of the training lists and of the test list."""

    classes: list[str]  # without the background; label i is classes[i - 1]
    category_ids: list[int]  # COCO's id of each class; VOC: 1, 2, …
    train: list[Example]
    test: list[Example]
    faults: dict[str, int]  # what was cut or left out, counted by kind
    digest: str  # SHA-256 of all that is read: lists, names, sizes, classes, boxes, flags; not of the pixels
    first_faults: dict[str, str] = field(default_factory=dict)  # where the first of each kind of fault is, and what


LocatedExamples = list[tuple[str, Example]]  # with where the image really lies: one that is reached in two ways is one
Object = tuple[int, list[float], bool, float]  # label, box, whether it is ignored, area


class Fault(Exception):
    """Something that cannot be used; with `always` it is left out and counted even where others stop."""

    def __init__(self, kind: str, text: str, *, always: bool = False) -> None:
        super().__init__(text)
        self.kind, self.always = kind, always


class Faults:
    """`with faults:` ends at a Fault, which is counted, or raises it as UserError."""

    def __init__(self, broken: str) -> None:
        self.stop, self.counted, self.first = broken == "stop", Counter[str](), dict[str, str]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, fault: BaseException | None, __: object) -> bool:
        if not isinstance(fault, Fault):
            return False
        if self.stop and not fault.always:
            raise UserError(f"{fault}; fix it, or skip and count such files with data.broken=skip") from fault
        self.count(fault.kind, str(fault))
        return True

    def count(self, kind: str, text: str, number: int = 1) -> None:
        """Count what is cut or left out without a Fault; `text` says where it is, and what."""
        self.counted[kind] += number
        self.first.setdefault(kind, text)


def load(example: Example) -> Tensor:
    """The image, (3, H, W) uint8 RGB, whatever its colours were; EXIF rotation is not applied.

    Raises UserError, which begins with the path, where it cannot be decoded or is not of the annotated size.
    """
    image = read_image(example.path)
    height, width = image.shape[1:]
    if (width, height) != (example.width, example.height):
        raise ImageError(f"{example.path}: is {width}x{height}, annotated as {example.width}x{example.height}")
    return image


def group_by_stem(files: Iterable[str]) -> dict[str, list[str]]:
    """The images among `files` by their names without suffix, in order."""
    stems: dict[str, list[str]] = {}
    for name in sorted(filter(is_image, files)):
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    return stems


def file_of_list(root: Path, kind: str, name: str) -> Path:
    """The file of the list `name`. Raises UserError, which names those that there are."""
    file = list_file(root, kind, name)
    if not file.is_file():
        there = lists_of(root, kind)
        raise UserError(f"{file}: there is no such list; there are {', '.join(there) or 'none'}{nearest(name, there)}")
    return file


def list_files(folder: Path) -> dict[str, str]:
    """Where each file in `folder` really lies."""
    try:
        real = os.path.realpath(folder)
        with os.scandir(folder) as entries:
            return {
                entry.name: os.path.realpath(entry) if entry.is_symlink() else os.path.join(real, entry.name)
                for entry in entries
            }
    except OSError as error:
        raise UserError(f"{folder}: its images cannot be listed ({error.strerror})") from error


def check_plain(name: str, file: Path) -> None:
    """Refuse what could lead out of the images' folder, or is no name."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise UserError(f"{file}: {name!r:.80}: is not the name of an image in its folder")


def read_field(row: Any, key: str, kind: type, where: object, fault: str = INCOMPLETE) -> Any:
    """The value of `key`, of exactly the type `kind`. Raises Fault."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:  # True is no number
        raise Fault(fault, f"{where}: has no {key} ({kind.__name__})")
    return value


def read_number(text: str, where: str, fault: str) -> float:
    """A finite number from text. Raises Fault."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) <= LARGEST:
        raise Fault(fault, f"{where} is {text!r:.60}, not a finite number")
    return number


def read_box(edges: Iterable[float], size: tuple[int, int], said: str, faults: Faults) -> list[float]:
    """The part of a box that is in its image, as float32 has it. Counts what is cut; raises Fault for what is none."""
    left, top, right, bottom = edges
    width, height = size
    if right <= left or bottom <= top:
        raise Fault(NO_AREA, f"{said} has no area, or its corners are swapped")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise Fault(OUTSIDE, f"{said} lies outside of its image, which is {width}x{height}")
    cut = left < 0 or top < 0 or right > width or bottom > height
    inside = max(0.0, left), max(0.0, top), min(right, width), min(bottom, height)
    left, top, right, bottom = struct.unpack("4f", struct.pack("4f", *inside))
    if min(right - left, bottom - top) < NARROWEST:
        raise Fault(NO_AREA, f"{said} is narrower than {NARROWEST} pixels", always=cut)
    if cut:
        faults.count(CUT, f"{said} leads out of its image, which is {width}x{height}")
    return [left, top, right, bottom]


def box_area(box: list[float]) -> float:
    """In pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def make_example(
    path: Path, name: str, image_id: int, size: tuple[int, int], objects: list[Object], masks: Sequence[bytes] = ()
) -> Example:
    """The example of an image of `size`, its width and height, with these objects."""
    labels, boxes, ignored, areas = zip(*objects, strict=True) if objects else ((), (), (), ())
    return Example(
        path,
        name,
        image_id,
        *size,
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        ignored=torch.tensor(ignored, dtype=torch.bool),
        areas=torch.tensor(areas, dtype=torch.float32),
        masks=tuple(masks),
    )


def collect_examples(
    classes: dict[int, str], lists: dict[str, LocatedExamples], train: list[str], test: str, faults: Faults
) -> Examples:
    """The lists, once they are found to be fit for training, if any is for it, and testing. Raises UserError."""
    trained = {real for name in train for real, _ in lists[name]}
    if common := [example.name for real, example in lists[test] if real in trained]:
        reason = f"{len(common)} of its images are trained on, such as {common[0]}; the test would not be one"
        raise UserError(f"data.test={test}: {reason}")
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    seen: set[str] = set()
    digest = hashlib.sha256(json.dumps([list(classes.items()), train, test]).encode())
    for part, name in [*(("train", name) for name in train), ("test", test)]:
        if not lists[name]:
            raise UserError(f"data.{part}: {name}: has no image that can be used")
        for real, example in lists[name]:
            with faults:
                if real in seen:
                    raise Fault(IMAGE_TWICE, f"{example.path}: is given twice in data.{part} ({name})")
                seen.add(real)
                parts[part].append(example)
                row = [part, example.name, example.width, example.height, len(example.boxes)]
                digest.update(json.dumps(row).encode())
                for values in (example.boxes, example.labels, example.ignored, example.areas):
                    digest.update(values.numpy().tobytes())
                digest.update(b" ".join(example.masks))
    for part, examples in parts.items():
        if (train or part == "test") and all(example.ignored.all() for example in examples):
            what = "to learn from" if part == "train" else "to find"
            raise UserError(f"data.{part}: has no object {what} in any image")
    counted = {kind: count for kind, count in sorted(faults.counted.items()) if count}
    names, ids = list(classes.values()), list(classes)
    return Examples(names, ids, parts["train"], parts["test"], counted, digest.hexdigest(), faults.first)

"""Pictures with boxes: Pascal VOC trees and COCO's JSON, checked as they are read.

What cannot be used is a fault. With `broken="stop"` the first one is a UserError that names the file and the object;
with "skip" the box, or the image, is left out and counted by kind. A box partly outside of its image is cut at the edge
and counted in both.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.layout import list_file, lists_of
from resnet_train.config.layout import is_image
from resnet_train.data.images import LARGEST_IMAGE, ImageError, image_size, read_image
from resnet_train.errors import UserError, nearest
from resnet_train.files import open_regular, read_regular

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LARGEST_XML = 10_000_000  # bytes: no annotation is near that
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


@dataclass
class Examples:
    """The images of the training lists and of the test list."""

    classes: list[str]  # without the background; label i is classes[i - 1]
    category_ids: list[int]  # COCO's id of each class; VOC: 1, 2, …
    train: list[Example]
    test: list[Example]
    faults: dict[str, int]  # what was cut or left out, counted by kind
    digest: str  # SHA-256 of all that is read: lists, names, sizes, classes, boxes, flags; not of the pixels


Found = list[tuple[str, Example]]  # with where the image really lies: one that is reached in two ways is one
Object = tuple[int, list[float], bool, float]  # label, box, whether it is ignored, area


class _Fault(Exception):
    """Something that cannot be used; with `always` it is left out and counted even where others stop."""

    def __init__(self, kind: str, told: str, *, always: bool = False) -> None:
        super().__init__(told)
        self.kind, self.always = kind, always


class _Faults:
    """`with faults:` ends at a _Fault, which is counted, or raises it as UserError."""

    def __init__(self, broken: str) -> None:
        self.stop, self.counted = broken == "stop", Counter[str]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, fault: BaseException | None, __: object) -> bool:
        if not isinstance(fault, _Fault):
            return False
        if self.stop and not fault.always:
            raise UserError(f"{fault}; mend it, or have such left out and counted: data.broken=skip") from fault
        self.counted[fault.kind] += 1
        return True


def load(example: Example) -> Tensor:
    """The image, (3, H, W) uint8 RGB, whatever its colours were; EXIF rotation is not applied.

    Raises UserError, which begins with the path, where it cannot be decoded or is not of the annotated size.
    """
    image = read_image(example.path)
    height, width = image.shape[1:]
    if (width, height) != (example.width, example.height):
        raise ImageError(f"{example.path}: is {width}x{height}, annotated as {example.width}x{example.height}")
    return image


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def read_voc(root: Path, *, train: list[str], test: str, classes: list[str] | None, broken: str) -> Examples:
    """Lists of a VOCdevkit (2007_trainval is VOC2007/ImageSets/Main/trainval.txt) or of one tree like it (trainval).

    The classes, where none are given, are VOC's own 20 if every object in the training lists is one of them, else the
    sorted names that occur in the training lists. A class that occurs in the test list alone is unknown, a fault.

    VOC counts pixels from 1 and a box includes both of its ends: from xmin to xmax is the continuous interval
    [xmin - 1, xmax], as wide as the devkit has it (xmax - xmin + 1). In a tree that counts from 0, what then lies
    outside is cut and counted. Difficult objects are `ignored`. `broken`: stop or skip, see above. Raises UserError.
    """
    faults = _Faults(broken)
    lists = {name: _annotations(root, name) for name in dict.fromkeys([*train, test])}
    if classes is None:
        named = {kind for name in train for path in lists[name] for kind in _kinds(path)}
        classes = list(VOC_CLASSES) if named <= set(VOC_CLASSES) else sorted(named)
    elif len(set(classes)) < len(classes):
        raise UserError(f"data.classes: {', '.join(classes)[:200]}: has a name twice")
    found: dict[str, Found] = {}
    for name, paths in lists.items():
        files, found[name] = _files(paths[0].parents[1] / "JPEGImages"), []
        images = _by_stem(files)
        for path in tqdm(paths, desc=f"reading {name}", leave=False, disable=None):
            with faults:
                example = _voc_example(root, path, files, images, classes, faults)
                found[name].append((files[example.path.name], example))
    examples = _examples(dict(enumerate(classes, 1)), found, train, test, faults)
    numbers = iter(range(1, 1 + len(examples.train) + len(examples.test)))
    for part in (examples.train, examples.test):
        part[:] = [replace(example, image_id=next(numbers)) for example in part]
    return examples


def _annotations(root: Path, name: str) -> list[Path]:
    """The annotation of each image in a list; the first word of a line is the image, what follows are flags."""
    file = _file_of_list(root, "voc", name)
    try:
        words = [line.split()[0] for line in read_regular(file).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is no list of images that can be read ({error})") from error
    if not words:
        raise UserError(f"{file}: is empty")
    for word in words:
        _check_plain(word, file)
    return [file.parents[2] / "Annotations" / f"{word}.xml" for word in words]


def _kinds(path: Path) -> set[str]:
    """The names of the objects in an annotation; none of one that cannot be read, which is told later."""
    try:
        return {kind for node in _xml(path).findall("object") if (kind := _text(node, "name"))}
    except _Fault:
        return set()


def _by_stem(files: Iterable[str]) -> dict[str, list[str]]:
    """The images among `files` by their names without suffix, in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(filter(is_image, files)):
        found.setdefault(os.path.splitext(name)[0], []).append(name)
    return found


def _voc_example(
    root: Path,
    path: Path,
    files: dict[str, str],
    images: dict[str, list[str]],
    classes: list[str],
    faults: _Faults,
) -> Example:
    """`files`: where each in the images' folder really lies; `images`: the images of them, `_by_stem`."""
    node, tree, stem = _xml(path), path.parents[1], path.name.removesuffix(".xml")
    names = (f"{stem}.jpg", _text(node, "filename"), *images.get(stem, ()))
    image = tree / "JPEGImages" / next((name for name in names if name in files), names[0])
    if image.name not in files:
        raise _Fault(NO_IMAGE, f"{path}: there is no image {image}")
    try:
        size = image_size(image)
    except UserError as error:
        raise _Fault(UNREADABLE, str(error)) from error
    for key, real in zip(("width", "height"), size, strict=True):
        text = _text(node, f"size/{key}")
        if text and (given := _number(text, f"{path}: {key}", BAD_ANNOTATION)) not in (0, real):
            raise _Fault(OTHER_SIZE, f"{path}: has {key} {given:g} for {image.name}, which is {size[0]}x{size[1]}")
    objects = []
    for number, thing in enumerate(node.findall("object"), 1):  # not the parts of one, which have boxes too
        with faults:
            objects.append(_voc_object(thing, f"{path}: object {number}", size, classes, faults))
    return _example(image, stem if tree == root else f"{tree.name}/{stem}", 0, size, objects)


def _voc_object(
    node: ElementTree.Element, where: str, size: tuple[int, int], classes: list[str], faults: _Faults
) -> Object:
    kind = _text(node, "name")
    where = f"{where} ({kind!r:.60})"
    given = {key: _text(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")}
    given |= {"name": kind, "difficult": _text(node, "difficult") or "0"}
    if missing := [key for key, text in given.items() if not text]:
        raise _Fault(INCOMPLETE, f"{where}: has no {missing[0]}")
    if kind not in classes:
        known = ", ".join(classes)[:200]
        raise _Fault(UNKNOWN, f"{where}: is of an unknown class; known are {known}{nearest(kind, classes)}")
    if given["difficult"] not in ("0", "1"):
        raise _Fault(INCOMPLETE, f"{where}: has difficult {given['difficult']!r:.60}; 0 and 1 are known")
    xmin, ymin, xmax, ymax = (_number(given[key], f"{where}: {key}", NO_NUMBER) for key in list(given)[:4])
    said = f"{where}: the box from {xmin:g},{ymin:g} to {xmax:g},{ymax:g}"
    box = _box((xmin - 1, ymin - 1, xmax, ymax), size, said, faults)
    return classes.index(kind) + 1, box, given["difficult"] == "1", _area(box)


def _text(node: ElementTree.Element, place: str) -> str:
    return " ".join(node.findtext(place, "").split())


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, *_: object) -> None:
        """Refuse what can declare entities: some grow without end, some read other files."""
        raise ValueError("it declares a document type, which no annotation needs")


def _xml(path: Path) -> ElementTree.Element:
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_XML + 1)
        if len(data) > LARGEST_XML:
            raise _Fault(BAD_ANNOTATION, f"{path}: is larger than {LARGEST_XML:,} bytes")
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_Builder()))
    except FileNotFoundError as error:
        raise _Fault(NO_ANNOTATION, f"{path}: is missing, and its image is listed") from error
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise _Fault(BAD_ANNOTATION, f"{path}: is not XML that can be read ({error})") from error
    if root.tag != "annotation":
        raise _Fault(BAD_ANNOTATION, f"{path}: is no annotation but {root.tag!r:.60}")
    return root


# --- COCO ------------------------------------------------------------------------------------------------------------


def read_coco(root: Path, *, train: list[str], test: str, broken: str) -> Examples:
    """Lists of a COCO tree: annotations/instances_LIST.json, images in LIST/ or images/LIST/.

    The classes are the categories in the order of their ids, the same in all lists; boxes are [x, y, width, height],
    continuous; sizes are the JSON's, and held against the image's by `load`. Crowds are `ignored`. Without `area` it is
    the box's, without `iscrowd` an object is no crowd. `broken`: stop or skip, see above. Raises UserError.
    """
    faults, classes = _Faults(broken), dict[int, str]()
    found: dict[str, Found] = {}
    for name in dict.fromkeys([*train, test]):
        file = _file_of_list(root, "coco", name)
        content = _json(file)
        own = _categories(content["categories"], file)
        classes = classes or own
        if own != classes:
            raise UserError(f"{file}: has other categories than {list_file(root, 'coco', train[0])}")
        folder = next((place for place in (root / name, root / "images" / name) if place.is_dir()), root / name)
        found[name] = _coco_list(file, content, folder, faults, {key: label for label, key in enumerate(classes, 1)})
    return _examples(classes, found, train, test, faults)


def _json(file: Path) -> dict[str, Any]:
    def lean(row: dict[str, Any]) -> dict[str, Any]:
        row.pop("segmentation", None)  # most of the file, and of memory
        return row

    try:
        found = json.loads(read_regular(file), object_hook=lean)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON that can be read ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise UserError(f"{file}: has no list {key!r}, as COCO's instances have")
    return found


def _categories(rows: list[Any], file: Path) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    try:
        found = {_field(row, "id", int, file): _field(row, "name", str, file) for row in rows}
    except _Fault as fault:
        raise UserError(f"{fault} in a category") from fault
    if not found or len(set(found.values())) < len(rows):
        raise UserError(f"{file}: has {'two categories of one id or name' if rows else 'no categories'}")
    return dict(sorted(found.items()))


def _coco_list(file: Path, content: dict[str, Any], folder: Path, faults: _Faults, labels: dict[int, int]) -> Found:
    files = {"": _files(folder)}  # of each inner folder; once: no question to the file system for each of 118,000
    known: set[int] = set()
    images: dict[int, tuple[str, str, tuple[int, int], list[Object]]] = {}
    for place, row in enumerate(content["images"]):
        with faults:
            where = f"{file}: images[{place}]"
            given = _field(row, "file_name", str, where, BAD_ANNOTATION)
            name = os.path.normpath(given)
            identity, width, height = (
                _field(row, key, int, where, BAD_ANNOTATION) for key in ("id", "width", "height")
            )
            if identity in known:
                raise _Fault(IMAGE_TWICE, f"{where}: {name!r:.80}: has the id {identity} of another")
            known.add(identity)
            if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
                raise _Fault(NO_IMAGE, f"{where}: {given!r:.80}: lies outside of {folder}")
            inner, base = os.path.split(name)
            if inner not in files:
                files[inner] = _files(folder / inner) if os.path.isdir(folder / inner) else {}
            if base not in files[inner]:
                raise _Fault(NO_IMAGE, f"{where}: there is no image {name!r:.80} in {folder}")
            sides = 0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE
            if not sides or width * height > LARGEST_IMAGE:
                raise _Fault(OTHER_SIZE, f"{where}: {name!r:.80}: cannot be {width}x{height}")
            images[identity] = name, files[inner][base], (width, height), []
    seen: set[int] = set()
    for place, row in enumerate(tqdm(content["annotations"], desc=f"reading {file.name}", leave=False, disable=None)):
        with faults:
            where = f"{file}: annotations[{place}]"
            number, image, category = (_field(row, key, int, where) for key in ("id", "image_id", "category_id"))
            where = f"{where} (id {number})"
            if number in seen:
                raise _Fault(BOX_TWICE, f"{where}: its id is that of another")
            seen.add(number)
            if image not in known:
                raise _Fault(NO_SUCH_IMAGE, f"{where}: its image_id {image} does not exist")
            if category not in labels:
                raise _Fault(UNKNOWN, f"{where}: its category_id {category} does not exist")
            if image in images:  # else it is left out, and with it this
                *_, size, objects = images[image]
                objects.append((labels[category], *_coco_object(row, where, size, faults)))
    return [
        (real, _example(folder / name, name, identity, size, objects))
        for identity, (name, real, size, objects) in images.items()
    ]


def _coco_object(
    row: dict[str, Any], where: str, size: tuple[int, int], faults: _Faults
) -> tuple[list[float], bool, float]:
    bbox, crowd, area = _field(row, "bbox", list, where), row.get("iscrowd", 0), row.get("area")
    if len(bbox) != 4 or crowd not in (0, 1):
        raise _Fault(INCOMPLETE, f"{where}: its bbox has not four numbers, or its iscrowd is not 0 or 1")
    for number in bbox if area is None else (*bbox, area):
        if type(number) not in (int, float) or not abs(number) <= LARGEST:
            raise _Fault(NO_NUMBER, f"{where}: its bbox or area is not of finite numbers: {number!s:.60}")
    if area is not None and area < 0:
        raise _Fault(NO_AREA, f"{where}: its area is {area:g}")
    left, top, width, height = map(float, bbox)
    said = f"{where}: its bbox {left:g},{top:g},{width:g},{height:g}"
    box = _box((left, top, left + width, top + height), size, said, faults)
    return box, bool(crowd), _area(box) if area is None else float(area)


# --- Both ------------------------------------------------------------------------------------------------------------


def _file_of_list(root: Path, kind: str, name: str) -> Path:
    file = list_file(root, kind, name)
    if not file.is_file():
        there = lists_of(root, kind)
        raise UserError(f"{file}: there is no such list; there are {', '.join(there) or 'none'}{nearest(name, there)}")
    return file


def _files(folder: Path) -> dict[str, str]:
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


def _check_plain(name: str, file: Path) -> None:
    """Refuse what could lead out of the images' folder, or is no name."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise UserError(f"{file}: {name!r:.80}: is not the name of an image in its folder")


def _field(row: Any, key: str, kind: type, where: object, fault: str = INCOMPLETE) -> Any:
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:  # True is no number
        raise _Fault(fault, f"{where}: has no {key} ({kind.__name__})")
    return value


def _number(text: str, where: str, fault: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) <= LARGEST:
        raise _Fault(fault, f"{where} is {text!r:.60}, not a finite number")
    return number


def _box(edges: Iterable[float], size: tuple[int, int], said: str, faults: _Faults) -> list[float]:
    """The part of a box that is in its image, as float32 has it. Counts what is cut; raises _Fault for what is none."""
    left, top, right, bottom = edges
    width, height = size
    if right <= left or bottom <= top:
        raise _Fault(NO_AREA, f"{said} has no area, or its corners are swapped")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise _Fault(OUTSIDE, f"{said} lies outside of its image, which is {width}x{height}")
    cut = left < 0 or top < 0 or right > width or bottom > height
    inside = max(0.0, left), max(0.0, top), min(right, width), min(bottom, height)
    left, top, right, bottom = struct.unpack("4f", struct.pack("4f", *inside))
    if min(right - left, bottom - top) < NARROWEST:
        raise _Fault(NO_AREA, f"{said} is narrower than {NARROWEST} pixels", always=cut)
    faults.counted[CUT] += cut
    return [left, top, right, bottom]


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _example(path: Path, name: str, image_id: int, size: tuple[int, int], objects: list[Object]) -> Example:
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
    )


def _examples(
    classes: dict[int, str], found: dict[str, Found], train: list[str], test: str, faults: _Faults
) -> Examples:
    """The lists, once they are found to be fit for training and testing. Raises UserError."""
    trained = {real for name in train for real, _ in found[name]}
    if common := [example.name for real, example in found[test] if real in trained]:
        told = f"{len(common)} of its images are trained on, such as {common[0]}; the test would not be one"
        raise UserError(f"data.test={test}: {told}")
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    seen: set[str] = set()
    digest = hashlib.sha256(json.dumps([list(classes.items()), train, test]).encode())
    for part, name in [*(("train", name) for name in train), ("test", test)]:
        if not found[name]:
            raise UserError(f"data.{part}: {name}: has no image that can be used")
        for real, example in found[name]:
            with faults:
                if real in seen:
                    raise _Fault(IMAGE_TWICE, f"{example.path}: is given twice in data.{part} ({name})")
                seen.add(real)
                parts[part].append(example)
                row = [part, example.name, example.width, example.height, len(example.boxes)]
                digest.update(json.dumps(row).encode())
                for values in (example.boxes, example.labels, example.ignored, example.areas):
                    digest.update(values.numpy().tobytes())
    for part, examples in parts.items():
        if all(example.ignored.all() for example in examples):
            what = "to learn from" if part == "train" else "to find"
            raise UserError(f"data.{part}: has no object {what} in any image")
    counted = {kind: count for kind, count in sorted(faults.counted.items()) if count}
    return Examples(list(classes.values()), list(classes), parts["train"], parts["test"], counted, digest.hexdigest())

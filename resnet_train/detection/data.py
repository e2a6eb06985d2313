"""Pictures with boxes: Pascal VOC trees and COCO's JSON, checked as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from resnet_train.config import nearest
from resnet_train.data.images import ImageError, read_image
from resnet_train.detection.config import list_file
from resnet_train.errors import UserError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG")
LARGEST = 10_000_000  # bytes of an annotation: none is near that
CUT = "boxes cut at the image's edge"


@dataclass(frozen=True)
class Example:
    """One image and what is in it."""

    path: Path
    name: str  # VOC: with its year's folder where there are several, VOC2007/000005; COCO: the file's name
    image_id: int  # COCO's own; VOC: 1, 2, …
    width: int
    height: int
    boxes: Tensor  # float32 (n, 4): left, top, right and bottom edge in pixels, 0 <= left < right <= width
    labels: Tensor  # int64 (n,): from 1; 0 is the background
    ignored: Tensor  # bool (n,): VOC's difficult, COCO's iscrowd: neither trained on nor counted in a test
    areas: Tensor  # float32 (n,): COCO's area of the segment; else the box's


@dataclass
class Examples:
    """The images of a data set's training and test lists."""

    classes: list[str]  # without the background; label i is classes[i - 1]
    category_ids: list[int]  # COCO's id of each class; VOC: 1, 2, …
    train: list[Example]
    test: list[Example]
    faults: dict[str, int]  # what was cut or left out, counted by kind
    digest: str  # of all that was read


class _Fault(UserError):
    """An annotation that cannot be used as it is; `kind` is what it is counted under where it is left out."""

    def __init__(self, kind: str, told: str) -> None:
        super().__init__(told)
        self.kind = kind


@dataclass
class _Reader:
    """What to do about faults, and those met so far."""

    broken: str  # stop or skip
    faults: Counter[str]

    def meet(self, fault: _Fault) -> None:
        """Raise the fault, or count it."""
        if self.broken == "stop":
            raise UserError(f"{fault}; mend it, or leave such out and count them with data.broken=skip")
        self.faults[fault.kind] += 1

    def box(self, edges: Sequence[float], width: int, height: int, where: str) -> list[float]:
        """Left, top, right, bottom, cut at the image's edge. Raises _Fault for what is no box in it."""
        left, top, right, bottom = edges
        if not all(map(math.isfinite, edges)):
            raise _Fault("boxes left out (not a number)", f"{where}: has a box that is not finite")
        if right <= left or bottom <= top:
            raise _Fault(
                "boxes left out (no area, or swapped corners)",
                f"{where}: has a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), which has no area",
            )
        cut = [min(max(left, 0.0), width), min(max(top, 0.0), height), min(max(right, 0.0), width)]
        cut.append(min(max(bottom, 0.0), height))
        if torch.tensor(cut[2:]).le(torch.tensor(cut[:2])).any():
            raise _Fault(
                "boxes left out (outside of the image)",
                f"{where}: has a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), outside of its image,"
                f" which is {width}x{height}",
            )
        self.faults[CUT] += cut != list(edges)
        return cut


def load(example: Example) -> Tensor:
    """The image, (3, H, W) uint8 RGB. Raises UserError where it cannot be read or is not of the annotated size."""
    image = read_image(example.path)
    if image.shape[1:] != (example.height, example.width):
        found = f"{image.shape[2]}x{image.shape[1]}"
        raise ImageError(f"{example.path}: is {found}, and annotated as {example.width}x{example.height}")
    return image


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def read_voc(root: Path, *, train: list[str], test: str, classes: list[str] | None, broken: str) -> Examples:
    """The lists of a VOCdevkit (2007_trainval, which lies in VOC2007/) or of one tree like it (trainval).

    Without `classes` they are VOC's 20 where all training objects are of these, else those that the training objects
    are of, sorted. Pixels count from 1 and a box includes both its ends: from xmin to xmax it is the interval
    [xmin - 1, xmax], as wide as the devkit has it. With `broken` stop, UserError names the first box or image that
    cannot be used; with skip, it is left out and counted. A box partly outside of its image is cut in both.
    """
    reader = _Reader(broken, Counter())
    parts = {part: [_listed(root, name) for name in names] for part, names in (("train", train), ("test", [test]))}
    _check_apart(
        [path for found in parts["train"] for path in found], [path for found in parts["test"] for path in found]
    )
    drafts = {part: [draft for found in lists for draft in _drafts(found, reader)] for part, lists in parts.items()}
    if classes is None:
        named = sorted({name for draft in drafts["train"] for name in draft["names"]})
        classes = list(VOC_CLASSES) if set(named) <= set(VOC_CLASSES) else named
    found = {part: [_with_labels(draft, classes, reader) for draft in some] for part, some in drafts.items()}
    several = any((root / f"VOC{name.partition('_')[0]}").is_dir() for name in [*train, test])
    made: dict[str, list[Example]] = {}
    number = 0
    for part, some in found.items():
        made[part] = []
        for draft in some:
            number += 1
            path: Path = draft["path"]
            name = f"{path.parent.parent.name}/{path.stem}" if several else path.stem
            boxes = torch.tensor(draft["boxes"], dtype=torch.float32).view(-1, 4)
            made[part].append(
                Example(
                    path=path,
                    name=name,
                    image_id=number,
                    width=draft["size"][0],
                    height=draft["size"][1],
                    boxes=boxes,
                    labels=torch.tensor(draft["labels"], dtype=torch.int64),
                    ignored=torch.tensor(draft["ignored"], dtype=torch.bool),
                    areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
                )
            )
    return _examples(classes, list(range(1, len(classes) + 1)), made, reader)


def _listed(root: Path, name: str) -> list[Path]:
    """The annotations of the images in a list, in its order. Raises UserError."""
    file = list_file(root, "voc", name)
    tree = file.parent.parent.parent
    try:
        words = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is no list of images that can be read ({error})") from error
    for word in words:
        if "/" in word or "\\" in word or word in (".", ".."):
            raise UserError(f"{file}: {word}: is not the name of an image")
    if twice := [word for word, count in Counter(words).items() if count > 1]:
        raise UserError(f"{file}: {twice[0]}: is in the list twice")
    if not words:
        raise UserError(f"{file}: is empty")
    return [tree / "Annotations" / f"{word}.xml" for word in words]


def _check_apart(train: Sequence[Any], test: Sequence[Any]) -> None:
    if common := set(train) & set(test):
        name = getattr(min(common), "stem", min(common))
        raise UserError(
            f"data.test: {len(common)} of its images are trained on, such as {name}; the test would be none"
        )
    if len(set(train)) < len(train):
        raise UserError("data.train: two of the lists share images; name one of them")


def _drafts(annotations: list[Path], reader: _Reader) -> list[dict[str, Any]]:
    """What the annotations say, with the names of classes."""
    found = []
    for path in tqdm(annotations, desc="annotations", unit="image", leave=False, disable=None):
        try:
            found.append(_draft(path, reader))
        except _Fault as fault:
            reader.meet(fault)
    return found


def _draft(path: Path, reader: _Reader) -> dict[str, Any]:
    tree = _xml(path)
    image = _image_of(path, tree)
    try:
        with Image.open(image) as opened:
            size = opened.size
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"{image}: is not an image that can be read ({str(error).splitlines()[0][:100]})"
        raise _Fault("images left out (unreadable)", reason) from error
    said = [
        _number(tree, f"size/{key}", path) if tree.find(f"size/{key}") is not None else 0 for key in ("width", "height")
    ]
    if all(said) and tuple(said) != size:
        told = f"{path}: says that its image is {said[0]:g}x{said[1]:g}, which is {size[0]}x{size[1]}"
        raise _Fault("images left out (another size than annotated)", told)
    names, boxes, ignored = [], [], []
    for thing in tree.findall("object"):
        try:
            name = (thing.findtext("name") or "").strip()
            if not name:
                raise _Fault("boxes left out (without a class)", f"{path}: has an object without a name")
            xmin, ymin, xmax, ymax = (_number(thing, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append(reader.box((xmin - 1, ymin - 1, xmax, ymax), *size, f"{path}: {name}"))
        except _Fault as fault:
            reader.meet(fault)
            continue
        names.append(name)
        ignored.append((thing.findtext("difficult") or "0").strip() == "1")
    return {"path": image, "where": path, "size": size, "names": names, "boxes": boxes, "ignored": ignored}


def _xml(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > LARGEST:
            raise _Fault("images left out (unreadable annotation)", f"{path}: is larger than {LARGEST:,} bytes")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _Fault("images left out (no annotation)", f"{path}: is missing, and its image is in the list") from error
    except OSError as error:
        raise _Fault("images left out (unreadable annotation)", f"{path}: cannot be read ({error.strerror})") from error
    if re.search(rb"<!(DOCTYPE|ENTITY)", data, re.IGNORECASE):
        raise _Fault("images left out (unreadable annotation)", f"{path}: declares a document type, which none needs")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise _Fault("images left out (unreadable annotation)", f"{path}: is broken XML ({error})") from error


def _image_of(path: Path, tree: ElementTree.Element) -> Path:
    """The image of an annotation: of its own name, else the one that it names."""
    folder = path.parent.parent / "JPEGImages"
    named = (tree.findtext("filename") or "").strip()
    names = [path.stem + suffix for suffix in SUFFIXES] + ([named] if named and Path(named).name == named else [])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise _Fault("images left out (missing)", f"{path}: has no image {folder / path.stem}.jpg")


def _number(tree: ElementTree.Element, place: str, path: Path) -> float:
    text = tree.findtext(place)
    try:
        return float(text or "")
    except ValueError as error:
        told = f"{path}: has {place.replace('/', '.')}={text!r}, which is no number"
        raise _Fault("boxes left out (not a number)", told) from error


def _with_labels(draft: dict[str, Any], classes: list[str], reader: _Reader) -> dict[str, Any]:
    """A draft with labels in place of names; what is of no class is a fault."""
    kept = []
    for place, name in enumerate(draft["names"]):
        if name in classes:
            kept.append(place)
        else:
            told = (
                f"{draft['where']}: {name}: is none of the classes {', '.join(classes)[:200]}{nearest(name, classes)}"
            )
            reader.meet(_Fault("boxes left out (unknown class)", told))
    return draft | {
        "labels": [1 + classes.index(draft["names"][place]) for place in kept],
        "boxes": [draft["boxes"][place] for place in kept],
        "ignored": [draft["ignored"][place] for place in kept],
    }


# --- COCO ------------------------------------------------------------------------------------------------------------


def read_coco(root: Path, *, train: list[str], test: str, broken: str) -> Examples:
    """The lists of a COCO tree: annotations/instances_LIST.json, images in LIST/ or images/LIST/.

    Classes in the order of their ids. `broken` as in `read_voc`; a JSON that is broken as a whole is an error always.
    """
    reader = _Reader(broken, Counter())
    files = {name: _json(list_file(root, "coco", name)) for name in [*train, test]}
    categories = _categories(files[train[0]], list_file(root, "coco", train[0]))
    for name, content in files.items():
        if _categories(content, list_file(root, "coco", name)) != categories:
            raise UserError(f"{list_file(root, 'coco', name)}: has other categories than that of {train[0]}")
    made = {
        part: [example for name in names for example in _of_coco(root, name, files[name], categories, reader)]
        for part, names in (("train", train), ("test", [test]))
    }
    _check_apart([example.path for example in made["train"]], [example.path for example in made["test"]])
    return _examples(list(categories.values()), list(categories), made, reader)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is broken JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        rows = found.get(key) if isinstance(found, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file}: has no list of {key}, as COCO's instances have")
    return found


def _categories(content: dict[str, Any], file: Path) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    try:
        pairs = sorted((int(row["id"]), str(row["name"])) for row in content["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: has a category without an id or a name") from error
    found = dict(pairs)
    if len(found) < len(pairs) or len(set(found.values())) < len(pairs):
        raise UserError(f"{file}: has two categories of one id or name")
    return found


def _of_coco(
    root: Path, name: str, content: dict[str, Any], categories: dict[int, str], reader: _Reader
) -> list[Example]:
    file = list_file(root, "coco", name)
    folder = next((place for place in (root / name, root / "images" / name) if place.is_dir()), None)
    if folder is None:
        raise UserError(f"{root / name}: there is no such folder, with the images of {file.name}")
    there = {entry.name for entry in folder.iterdir()}  # once: not a question for each of 118,000
    images: dict[int, dict[str, Any]] = {}
    missing: set[int] = set()
    for row in content["images"]:
        try:
            identity, width, height, named = (
                int(row["id"]),
                int(row["width"]),
                int(row["height"]),
                str(row["file_name"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: has an image without id, width, height or file_name") from error
        if Path(named).name != named:
            raise UserError(f"{file}: {named}: is not the name of an image")
        if identity in images or identity in missing:
            raise UserError(f"{file}: has two images of id {identity}")
        if named not in there or min(width, height) < 1:
            missing.add(identity)
            reader.meet(_Fault("images left out (missing)", f"{folder / named}: is in {file.name}, and not there"))
            continue
        images[identity] = {"name": named, "size": (width, height), "rows": []}
    places = {identity: place for place, identity in enumerate(categories, 1)}
    seen: set[Any] = set()
    for row in content["annotations"]:
        where = f"{file}: annotation {row.get('id')}"
        try:
            if row.get("image_id") in missing:
                continue
            if row.get("image_id") not in images:
                raise _Fault(
                    "boxes left out (of no image)", f"{where}: is of image {row.get('image_id')}, which is not there"
                )
            if row.get("category_id") not in places:
                raise _Fault(
                    "boxes left out (unknown class)", f"{where}: is of category {row.get('category_id')}, of none"
                )
            if row.get("id") in seen:
                raise _Fault("boxes left out (twice)", f"{where}: there are two of this id")
            seen.add(row.get("id"))
            image = images[row["image_id"]]
            image["rows"].append((places[row["category_id"]], *_of_row(row, image["size"], where, reader)))
        except _Fault as fault:
            reader.meet(fault)
    return [
        Example(
            path=folder / image["name"],
            name=image["name"],
            image_id=identity,
            width=image["size"][0],
            height=image["size"][1],
            boxes=torch.tensor([row[1] for row in image["rows"]], dtype=torch.float32).view(-1, 4),
            labels=torch.tensor([row[0] for row in image["rows"]], dtype=torch.int64),
            ignored=torch.tensor([row[3] for row in image["rows"]], dtype=torch.bool),
            areas=torch.tensor([row[2] for row in image["rows"]], dtype=torch.float32),
        )
        for identity, image in images.items()
    ]


def _of_row(row: dict[str, Any], size: tuple[int, int], where: str, reader: _Reader) -> tuple[list[float], float, bool]:
    """The box, the area and whether it is a crowd."""
    try:
        left, top, width, height = map(float, row["bbox"])
        area = float(row.get("area", width * height))
    except (KeyError, TypeError, ValueError) as error:
        raise _Fault("boxes left out (not a number)", f"{where}: its bbox is not four numbers") from error
    if not math.isfinite(area):
        raise _Fault("boxes left out (not a number)", f"{where}: its area is not finite")
    return reader.box((left, top, left + width, top + height), *size, where), area, bool(row.get("iscrowd", 0))


def _examples(classes: list[str], category_ids: list[int], made: dict[str, list[Example]], reader: _Reader) -> Examples:
    for part, examples in made.items():
        if not examples:
            raise UserError(f"data.{part}: has no image that can be used")
        if not any((~example.ignored).any() for example in examples):
            what = "to learn from" if part == "train" else "to find"
            raise UserError(f"data.{part}: has no object {what} in any image")
    digest = hashlib.sha256(json.dumps([classes, category_ids]).encode())
    for part, examples in made.items():
        for example in examples:
            digest.update(f"{part} {example.name} {example.width}x{example.height}\n".encode())
            for values in (example.boxes, example.labels, example.ignored, example.areas):
                digest.update(values.numpy().tobytes())
    faults = {kind: count for kind, count in sorted(reader.faults.items()) if count}
    return Examples(classes, category_ids, made["train"], made["test"], faults, digest.hexdigest())

"""COCO's JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resnet_train.config.layout import list_file
from resnet_train.data.decode import LARGEST_IMAGE
from resnet_train.detection.annotations import (
    BAD_ANNOTATION,
    BOX_TWICE,
    IMAGE_TWICE,
    INCOMPLETE,
    LARGEST,
    LARGEST_SIDE,
    NO_AREA,
    NO_IMAGE,
    NO_NUMBER,
    NO_SUCH_IMAGE,
    OTHER_SIZE,
    UNKNOWN,
    Examples,
    Fault,
    Faults,
    LocatedExamples,
    Object,
    box_area,
    collect_examples,
    file_of_list,
    list_files,
    make_example,
    read_box,
    read_field,
)
from resnet_train.detection.masks import read_mask
from resnet_train.errors import UserError
from resnet_train.files import read_regular

LARGEST_FILE = 2**32  # bytes


def read_coco(root: Path, *, train: list[str], test: str, broken: str, masks: bool = False) -> Examples:
    """Lists of a COCO tree: annotations/instances_LIST.json, images in LIST/ or images/LIST/.

    The classes are the categories in the order of their ids, the same in all lists; boxes are [x, y, width, height],
    continuous; sizes are the JSON's, and held against the image's by `load`. Crowds are `ignored`. Without `area` it is
    the box's, without `iscrowd` an object is no crowd. With `masks` an object needs one, polygons or RLE. `broken`:
    stop at what cannot be used, or skip and count it. Raises UserError.
    """
    faults, classes = Faults(broken), dict[int, str]()
    lists: dict[str, LocatedExamples] = {}
    for name in dict.fromkeys([*train, test]):
        file = file_of_list(root, "coco", name)
        content = _json(file, masks)
        own = _categories(content["categories"], file)
        classes = classes or own
        if own != classes:
            raise UserError(f"{file}: has other categories than {list_file(root, 'coco', train[0])}")
        folder = next((place for place in (root / name, root / "images" / name) if place.is_dir()), root / name)
        labels = {key: label for label, key in enumerate(classes, 1)}
        lists[name] = _coco_list(file, content, folder, faults, labels, masks)
    return collect_examples(classes, lists, train, test, faults)


def _json(file: Path, masks: bool) -> dict[str, Any]:
    def lean(row: dict[str, Any]) -> dict[str, Any]:
        if not masks:
            row.pop("segmentation", None)  # most of the file, and of memory
        return row

    try:
        content = json.loads(read_regular(file, LARGEST_FILE), object_hook=lean)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON that can be read ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file}: has no list {key!r}, as COCO's instances have")
    rows = content["annotations"]
    if masks and rows and not any(isinstance(row, dict) and row.get("segmentation") for row in rows):
        raise UserError(f"masks=true: {file}: has no segmentation in any annotation")
    return content


def _categories(rows: list[Any], file: Path) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    try:
        names = {read_field(row, "id", int, file): read_field(row, "name", str, file) for row in rows}
    except Fault as fault:
        raise UserError(f"{fault} in a category") from fault
    if not names or len(set(names.values())) < len(rows):
        raise UserError(f"{file}: has {'two categories of one id or name' if rows else 'no categories'}")
    return dict(sorted(names.items()))


def _coco_list(
    file: Path, content: dict[str, Any], folder: Path, faults: Faults, labels: dict[int, int], masks: bool
) -> LocatedExamples:
    files = {"": list_files(folder)}  # of each inner folder; once: no question to the file system for each of 118,000
    known: set[int] = set()
    images: dict[int, tuple[str, str, tuple[int, int], list[Object], list[bytes]]] = {}
    for place, row in enumerate(content["images"]):
        with faults:
            where = f"{file}: images[{place}]"
            given = read_field(row, "file_name", str, where, BAD_ANNOTATION)
            name = os.path.normpath(given)
            identity, width, height = (
                read_field(row, key, int, where, BAD_ANNOTATION) for key in ("id", "width", "height")
            )
            if identity in known:
                raise Fault(IMAGE_TWICE, f"{where}: {name!r:.80}: has the id {identity} of another")
            known.add(identity)
            if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
                raise Fault(NO_IMAGE, f"{where}: {given!r:.80}: lies outside of {folder}")
            inner, base = os.path.split(name)
            if inner not in files:
                files[inner] = list_files(folder / inner) if os.path.isdir(folder / inner) else {}
            if base not in files[inner]:
                raise Fault(NO_IMAGE, f"{where}: there is no image {name!r:.80} in {folder}")
            sides = 0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE
            if not sides or width * height > LARGEST_IMAGE:
                raise Fault(OTHER_SIZE, f"{where}: {name!r:.80}: cannot be {width}x{height}")
            images[identity] = name, files[inner][base], (width, height), [], []
    seen: set[int] = set()
    for place, row in enumerate(tqdm(content["annotations"], desc=f"reading {file.name}", leave=False, disable=None)):
        with faults:
            where = f"{file}: annotations[{place}]"
            number, image, category = (read_field(row, key, int, where) for key in ("id", "image_id", "category_id"))
            where = f"{where} (id {number})"
            if number in seen:
                raise Fault(BOX_TWICE, f"{where}: its id is that of another")
            seen.add(number)
            if image not in known:
                raise Fault(NO_SUCH_IMAGE, f"{where}: its image_id {image} does not exist")
            if category not in labels:
                raise Fault(UNKNOWN, f"{where}: its category_id {category} does not exist")
            if image in images:  # else it is left out, and with it this
                *_, size, objects, texts = images[image]
                mask = [read_mask(row.pop("segmentation", None), size, where)] if masks else []
                objects.append((labels[category], *_coco_object(row, where, size, faults)))
                texts += mask
    return [
        (real, make_example(folder / name, name, identity, size, objects, texts))
        for identity, (name, real, size, objects, texts) in images.items()
    ]


def _coco_object(
    row: dict[str, Any], where: str, size: tuple[int, int], faults: Faults
) -> tuple[list[float], bool, float]:
    bbox, crowd, area = read_field(row, "bbox", list, where), row.get("iscrowd", 0), row.get("area")
    if len(bbox) != 4 or crowd not in (0, 1):
        raise Fault(INCOMPLETE, f"{where}: its bbox has not four numbers, or its iscrowd is not 0 or 1")
    for number in bbox if area is None else (*bbox, area):
        if type(number) not in (int, float) or not abs(number) <= LARGEST:
            raise Fault(NO_NUMBER, f"{where}: its bbox or area is not of finite numbers: {number!s:.60}")
    if area is not None and area < 0:
        raise Fault(NO_AREA, f"{where}: its area is {area:g}")
    left, top, width, height = map(float, bbox)
    said = f"{where}: its bbox {left:g},{top:g},{width:g},{height:g}"
    box = read_box((left, top, left + width, top + height), size, said, faults)
    return box, bool(crowd), box_area(box) if area is None else float(area)

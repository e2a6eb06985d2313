"""Pascal VOC trees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from resnet_train.data.decode import image_size
from resnet_train.detection.annotations import (
    BAD_ANNOTATION,
    INCOMPLETE,
    NO_ANNOTATION,
    NO_IMAGE,
    NO_NUMBER,
    OTHER_SIZE,
    UNKNOWN,
    UNREADABLE,
    Example,
    Examples,
    Fault,
    Faults,
    Found,
    Object,
    box_area,
    check_plain,
    collect_examples,
    file_of_list,
    group_by_stem,
    list_files,
    make_example,
    read_box,
    read_number,
)
from resnet_train.errors import UserError, nearest
from resnet_train.files import open_regular, read_regular

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LARGEST_XML = 10_000_000  # bytes: no annotation is near that


def read_voc(root: Path, *, train: list[str], test: str, classes: list[str] | None, broken: str) -> Examples:
    """Lists of a VOCdevkit (2007_trainval is VOC2007/ImageSets/Main/trainval.txt) or of one tree like it (trainval).

    The classes, where none are given, are VOC's own 20 if every object in the training lists is one of them, else the
    sorted names that occur in the training lists. A class that occurs in the test list alone is unknown, a fault.

    VOC counts pixels from 1 and a box includes both of its ends: from xmin to xmax is the continuous interval
    [xmin - 1, xmax], as wide as the devkit has it (xmax - xmin + 1). In a tree that counts from 0, what then lies
    outside is cut and counted. Difficult objects are `ignored`. `broken`: stop or skip, see above. Raises UserError.
    """
    faults = Faults(broken)
    lists = {name: _annotations(root, name) for name in dict.fromkeys([*train, test])}
    if classes is None:
        named = {kind for name in train for path in lists[name] for kind in _kinds(path)}
        classes = list(VOC_CLASSES) if named <= set(VOC_CLASSES) else sorted(named)
    elif len(set(classes)) < len(classes):
        raise UserError(f"data.classes: {', '.join(classes)[:200]}: has a name twice")
    found: dict[str, Found] = {}
    for name, paths in lists.items():
        files, found[name] = list_files(paths[0].parents[1] / "JPEGImages"), []
        images = group_by_stem(files)
        for path in tqdm(paths, desc=f"reading {name}", leave=False, disable=None):
            with faults:
                example = _voc_example(root, path, files, images, classes, faults)
                found[name].append((files[example.path.name], example))
    examples = collect_examples(dict(enumerate(classes, 1)), found, train, test, faults)
    numbers = iter(range(1, 1 + len(examples.train) + len(examples.test)))
    for part in (examples.train, examples.test):
        part[:] = [replace(example, image_id=next(numbers)) for example in part]
    return examples


def _annotations(root: Path, name: str) -> list[Path]:
    """The annotation of each image in a list; the first word of a line is the image, what follows are flags."""
    file = file_of_list(root, "voc", name)
    try:
        words = [line.split()[0] for line in read_regular(file).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is no list of images that can be read ({error})") from error
    if not words:
        raise UserError(f"{file}: is empty")
    for word in words:
        check_plain(word, file)
    return [file.parents[2] / "Annotations" / f"{word}.xml" for word in words]


def _kinds(path: Path) -> set[str]:
    """The names of the objects in an annotation; none of one that cannot be read, which is told later."""
    try:
        return {kind for node in read_xml(path).findall("object") if (kind := _text(node, "name"))}
    except Fault:
        return set()


def _voc_example(
    root: Path,
    path: Path,
    files: dict[str, str],
    images: dict[str, list[str]],
    classes: list[str],
    faults: Faults,
) -> Example:
    """`files`: where each in the images' folder really lies; `images`: the images of them, `group_by_stem`."""
    node, tree, stem = read_xml(path), path.parents[1], path.name.removesuffix(".xml")
    names = (f"{stem}.jpg", _text(node, "filename"), *images.get(stem, ()))
    image = tree / "JPEGImages" / next((name for name in names if name in files), names[0])
    if image.name not in files:
        raise Fault(NO_IMAGE, f"{path}: there is no image {image}")
    size, objects = read_objects(node, path, image, classes, faults)
    return make_example(image, stem if tree == root else f"{tree.name}/{stem}", 0, size, objects)


def read_objects(
    node: ElementTree.Element, path: Path, image: Path, classes: list[str], faults: Faults, *, first: int = 1
) -> tuple[tuple[int, int], list[Object]]:
    """The size of an image, held against that in its annotation `path`, of which `node` is the root, and its objects.

    `first` is the number of the first pixel. Raises Fault.
    """
    try:
        size = image_size(image)
    except UserError as error:
        raise Fault(UNREADABLE, str(error)) from error
    for key, real in zip(("width", "height"), size, strict=True):
        text = _text(node, f"size/{key}")
        if text and (given := read_number(text, f"{path}: {key}", BAD_ANNOTATION)) not in (0, real):
            raise Fault(OTHER_SIZE, f"{path}: has {key} {given:g} for {image.name}, which is {size[0]}x{size[1]}")
    objects = []
    for number, thing in enumerate(node.findall("object"), 1):  # not the parts of one, which have boxes too
        with faults:
            objects.append(_voc_object(thing, f"{path}: object {number}", size, classes, faults, first))
    return size, objects


def _voc_object(
    node: ElementTree.Element, where: str, size: tuple[int, int], classes: list[str], faults: Faults, first: int
) -> Object:
    kind = _text(node, "name")
    where = f"{where} ({kind!r:.60})"
    given = {key: _text(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")}
    given |= {"name": kind, "difficult": _text(node, "difficult") or "0"}
    if missing := [key for key, text in given.items() if not text]:
        raise Fault(INCOMPLETE, f"{where}: has no {missing[0]}")
    if kind not in classes:
        known = ", ".join(classes)[:200]
        raise Fault(UNKNOWN, f"{where}: is of an unknown class; known are {known}{nearest(kind, classes)}")
    if given["difficult"] not in ("0", "1"):
        raise Fault(INCOMPLETE, f"{where}: has difficult {given['difficult']!r:.60}; 0 and 1 are known")
    xmin, ymin, xmax, ymax = (read_number(given[key], f"{where}: {key}", NO_NUMBER) for key in list(given)[:4])
    said = f"{where}: the box from {xmin:g},{ymin:g} to {xmax:g},{ymax:g}"
    last = 1 - first
    box = read_box((xmin - first, ymin - first, xmax + last, ymax + last), size, said, faults)
    return classes.index(kind) + 1, box, given["difficult"] == "1", box_area(box)


def _text(node: ElementTree.Element, place: str) -> str:
    return " ".join(node.findtext(place, "").split())


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, *_: object) -> None:
        """Refuse what can declare entities: some grow without end, some read other files."""
        raise ValueError("it declares a document type, which no annotation needs")


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an annotation. Raises Fault."""
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_XML + 1)
        if len(data) > LARGEST_XML:
            raise Fault(BAD_ANNOTATION, f"{path}: is larger than {LARGEST_XML:,} bytes")
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_Builder()))
    except FileNotFoundError as error:
        raise Fault(NO_ANNOTATION, f"{path}: is missing, and its image is listed") from error
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise Fault(BAD_ANNOTATION, f"{path}: is not XML that can be read ({error})") from error
    if root.tag != "annotation":
        raise Fault(BAD_ANNOTATION, f"{path}: is no annotation but {root.tag!r:.60}")
    return root

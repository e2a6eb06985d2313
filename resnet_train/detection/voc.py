"""Pascal VOC trees, and ILSVRC's for detection (DET), which have annotations like theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tqdm import tqdm

from resnet_train.config.layout import IMAGE_SUFFIXES, list_file, lists_by_class
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
    LocatedExamples,
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
from resnet_train.files import LARGEST_TEXT, open_regular, read_regular

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LARGEST_XML = 10_000_000  # bytes: no annotation is near that


class Listed(NamedTuple):
    """An image of a list: its annotation, the folder that it lies in, and its name in records."""

    annotation: Path
    folder: Path
    name: str


class Listing(NamedTuple):
    """An images' folder: where each file really lies, and the images by their names without suffix."""

    files: dict[str, str]
    stems: dict[str, list[str]]


def read_voc(
    root: Path, *, train: list[str], test: str, classes: list[str] | None, broken: str, det: bool = False
) -> Examples:
    """Lists of a VOCdevkit (2007_trainval is VOC2007/ImageSets/Main/trainval.txt) or of one tree like it (trainval).

    With `det` those of ILSVRC's tree for detection: ImageSets/DET/val1.txt, Annotations/DET/val/, Data/DET/val/, and
    likewise train/ for lists whose name begins so; `train` is, where it is no file, the union of what ILSVRC's lists
    by class, train_1.txt to train_200.txt, have as positive (1) or partly so (0).

    The classes, where none are given, are VOC's own 20 if every object in the training lists is one of them, else the
    sorted names that occur in the training lists. A class that occurs in the test list alone is unknown, a fault.

    VOC counts pixels from 1 and a box includes both of its ends: from xmin to xmax is the continuous interval
    [xmin - 1, xmax], as wide as the devkit has it (xmax - xmin + 1). In a tree that counts from 0, what then lies
    outside is cut and counted. Difficult objects are `ignored`. `broken`: stop at what cannot be used,
    or skip and count it. Raises UserError.
    """
    faults = Faults(broken)
    read_list = _det_list if det else _voc_list
    lists = {name: read_list(root, name) for name in dict.fromkeys([*train, test])}
    trained = tqdm([image for name in train for image in lists[name]], desc="classes", leave=False, disable=None)
    named = {kind for image in trained for kind in _kinds(image.annotation)}
    if classes is None:
        classes = list(VOC_CLASSES) if named <= set(VOC_CLASSES) else sorted(named)
    elif len(set(classes)) < len(classes):
        raise UserError(f"data.classes: {', '.join(classes)[:200]}: has a name twice")
    others = sorted(named - set(classes))
    for kind in classes if others else ():  # else none is left out, and one may be for the test or for later
        if kind not in named:
            near = nearest(kind, others)
            raise UserError(
                f"data.classes: {kind}: no training object is one; others are {', '.join(others)[:200]}{near}"
            )
    located: dict[str, LocatedExamples] = {}
    folders: dict[Path, Listing] = {}
    for name, images in lists.items():
        located[name] = []
        for image in tqdm(images, desc=f"reading {name}", leave=False, disable=None):
            with faults:
                if image.folder not in folders:
                    if det and not image.folder.is_dir():
                        raise Fault(NO_IMAGE, f"{image.annotation}: there is no folder {image.folder}")
                    files = list_files(image.folder)
                    folders[image.folder] = Listing(files, group_by_stem(files))
                example = _voc_example(image, folders[image.folder], classes, faults)
                located[name].append((folders[image.folder].files[example.path.name], example))
    examples = collect_examples(dict(enumerate(classes, 1)), located, train, test, faults)
    numbers = iter(range(1, 1 + len(examples.train) + len(examples.test)))
    for part in (examples.train, examples.test):
        part[:] = [replace(example, image_id=next(numbers)) for example in part]
    return examples


def _voc_list(root: Path, name: str) -> list[Listed]:
    """The images of a list of VOC's."""
    file = file_of_list(root, "voc", name)
    tree = file.parents[2]
    words = [first for first, *_ in _lines(file)]
    for word in words:
        check_plain(word, file)
    before = "" if tree == root else f"{tree.name}/"
    return [Listed(tree / "Annotations" / f"{word}.xml", tree / "JPEGImages", f"{before}{word}") for word in words]


def _det_list(root: Path, name: str) -> list[Listed]:
    """The images of a list of ILSVRC's; those by class have each image that holds several of them several times."""
    split = "train" if name.startswith("train") else "test" if name.startswith("test") else "val"
    parts = lists_by_class(root) if name == "train" and not list_file(root, "det", name).is_file() else []
    words: list[tuple[str, Path]] = []
    before: set[str] = set()  # in the lists of other classes; twice in its own is a fault
    for file in parts:
        own = [first for first, *flags in _lines(file) if flags[:1] != ["-1"] and first not in before]
        words += [(first, file) for first in own]
        before.update(own)
    if not parts:
        file = file_of_list(root, "det", name)
        # Only in lists by class a flag says whether the image has it; in others it is a number.
        words = [(first, file) for first, *flags in _lines(file) if split != "train" or flags[:1] != ["-1"]]
    listed = []
    for word, file in words:
        for part in word.split("/"):
            check_plain(part, file)
        folder = (root / "Data" / "DET" / split / word).parent
        listed.append(Listed(root / "Annotations" / "DET" / split / f"{word}.xml", folder, f"{split}/{word}"))
    return listed


def _lines(file: Path) -> list[list[str]]:
    """The words of each line of a list: the first is the image, what follows are flags."""
    try:
        text = read_regular(file, LARGEST_TEXT).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is no list of images that can be read ({error})") from error
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file}: is empty")
    return lines


def _kinds(path: Path) -> set[str]:
    """The names of the objects in an annotation; none of one that cannot be read, which is told later."""
    try:
        return {kind for node in read_xml(path).findall("object") if (kind := _text(node, "name"))}
    except Fault:
        return set()


def _voc_example(listed: Listed, listing: Listing, classes: list[str], faults: Faults) -> Example:
    path = listed.annotation
    node, stem = read_xml(path), path.name.removesuffix(".xml")
    # <filename> last, which copied annotations share; but it chooses among images of the annotation's own name.
    given = _text(node, "filename")
    names = (f"{stem}.jpg", *sorted(listing.stems.get(stem, ()), key=given.__ne__), given)
    image = listed.folder / next((name for name in names if name in listing.files), names[0])
    if image.name not in listing.files:
        raise Fault(NO_IMAGE, f"{path}: there is no image {image}")
    size, objects = read_objects(node, path, image, classes, faults)
    return make_example(image, listed.name, 0, size, objects)


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
        suffix = next((end for end in IMAGE_SUFFIXES if path.stem.lower().endswith(end)), None)
        hint = f"; names in lists go without {suffix}" if suffix else ""
        raise Fault(NO_ANNOTATION, f"{path}: is missing, and its image is listed{hint}") from error
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise Fault(BAD_ANNOTATION, f"{path}: is not XML that can be read ({error})") from error
    if root.tag != "annotation":
        raise Fault(BAD_ANNOTATION, f"{path}: is no annotation but {root.tag!r:.60}")
    return root

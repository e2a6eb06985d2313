"""The layout of folders that `data.root` may name; no torch here, so that errors come at once."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from resnet_train.errors import UserError, closest, first_few, nearest
from resnet_train.files import expand

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
LISTS = "ImageSets/Main"  # of VOC
DET_LISTS = "ImageSets/DET"  # of ILSVRC's detection
BOXES = "Annotations/CLS-LOC"  # of ILSVRC's localization, whose images are in the root or in Data/CLS-LOC
CIFAR_FOLDER = "cifar-10-batches-py"
# For data sets distributed as archives: the folder that the archive unpacks to, and a file in it.
OFFICIAL = {"cifar10": (CIFAR_FOLDER, "data_batch_1"), "cifar100": ("cifar-100-python", "train")}
PACKED = "pack.json"  # the file that marks a complete pack
PACKING = "packing"  # the folder for the state of an incomplete pack
REMOTE = ("s3://", "gs://", "azure://", "local:")  # prefixes that litdata can read


def is_official(name: str, root: Path) -> bool:
    """Whether `root` is a data set's official archive (a file), the folder that it unpacks to, or that one's parent."""
    folder, file = OFFICIAL.get(name, ("", ""))
    return name in OFFICIAL and (root.is_file() or any((parent / file).is_file() for parent in (root, root / folder)))


def name_data(name: str, root: str | None) -> str:
    """The label of data before their images are read: the data set's name for official files, else the folder's name.

    A folder may have any content, so one that is called cifar10 or digits becomes cifar10-folder.
    """
    if root is None or is_official(name, expand(root)):
        return name
    folder = expand(root).resolve().name or "root"
    return f"{folder}-folder" if folder in (*OFFICIAL, "digits") else folder


def check_source(name: str, root: str | None, *, train: bool = True) -> None:
    """Raises UserError for a data.root that does not have the layout of the data set; see `class_folders`."""
    if root is None:
        if name in (*OFFICIAL, "digits"):
            return
        kinds = "a folder with train/ and test/ or val/, or a folder for each class"
        raise UserError(f"data.root: data={name} needs one: data.root=PATH, {kinds}")
    path = expand(root)
    if name == "digits":
        raise UserError(f"data.root={root}: data=digits comes with scikit-learn and takes none; remove it")
    if "://" in root or is_remote(root):
        if name != "imagenet" or not is_remote(root):
            raise UserError(f"data.root={root}: data=imagenet reads packed folders from {' '.join(REMOTE)}")
        return
    if not path.exists():
        raise UserError(f"data.root={root}: there is no such file or folder")
    if is_official(name, path):
        return
    if name == "cifar100":
        raise UserError(f"data.root={root}: is not CIFAR-100's archive or its folder; others are data=imagefolder")
    if not path.is_dir():
        raise UserError(f"data.root={root}: is a file; data={name} takes a folder with train/ and test/ or val/")
    if name == "imagenet" and is_packed(root):
        return
    if not class_folders(path, train=train)[1] and name == "cifar10":
        raise UserError(f"data.root={root}: has no train/ and test/ folders; data=imagefolder divides it by itself")


def is_remote(root: str) -> bool:
    """Whether `root` is in object storage, where only packs are read."""
    return root.startswith(REMOTE)


def is_packed(root: str) -> bool:
    """Whether `root` is a packed folder, or is remote and thus may be one."""
    return is_remote(root) or (expand(root) / PACKED).is_file()


def count_images(folder: Path) -> int:
    """The number of image files below folder/<class>/."""
    return sum(len(images_in(folder / name)[0]) for name in folders_in(folder))


def folders_in(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones such as .ipynb_checkpoints."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: str | Path) -> tuple[list[os.DirEntry[str]], Counter[str]]:
    """The image files of a class, sorted by name, and the number of other files by kind."""
    images, other = [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name):
                images.append(entry)
            elif entry.name.startswith("."):
                pass
            elif entry.is_dir():
                other["in subfolders"] += sum(is_image(name) for _, _, names in os.walk(entry) for name in names)
            else:
                other[ascii(os.path.splitext(entry.name)[1].lower())[1:-1] or "without a suffix"] += 1
    return sorted(images, key=lambda entry: entry.name), other


def left_out(name: str, root: str | None) -> Counter[str]:
    """The number of files by kind that are not used, in all classes of a tree; empty for other data."""
    if name == "digits" or root is None or is_official(name, folder := expand(root)):
        return Counter()
    classes, test = class_folders(folder, train=False)
    folders = (folder / part / name for part in parts_of(folder, test) for name in classes)
    return sum((images_in(folder)[1] for folder in folders), Counter[str]())


def describe_left_out(counts: Mapping[str, int]) -> str:
    """A line about the files that are not used, from their `counts` by kind; empty if there are none."""
    kinds = (+Counter(counts)).most_common()
    parts = [f"{count} {kind}" for kind, count in kinds[:5]]
    if rest := sum(count for _, count in kinds[5:]):
        parts.append(f"{rest} of other kinds")
    line = f"left out of the class folders: {', '.join(parts)}; images end in {' '.join(IMAGE_SUFFIXES)}"
    return line if parts else ""


def describe_unreadable(unreadable: Mapping[str, Sequence[str]]) -> str:
    """A line about the images of each part that could not be decoded; empty if there are none."""
    files = [f"{part}: {file}" for part, names in unreadable.items() for file in names]
    return f"{count_unreadable(len(files))} ({first_few(files)})" if files else ""


def count_unreadable(count: int) -> str:
    """The number of images that could not be decoded, in words; empty if there are none."""
    return f"images left out because they cannot be decoded: {count}" if count else ""


def _check_whole(root: Path) -> None:
    """Raises UserError for a folder of classes that is a part of a set, with another part beside it."""
    others = [part for part in ("train", "test", "val") if part != root.name and (root.parent / part).is_dir()]
    beside = [part for part in others if set(folders_in(root.parent / part)) & set(folders_in(root))]
    if root.name in ("train", "test", "val") and beside:
        raise UserError(f"data.root={root}: is a part of a set, with {beside[0]}/ beside it; name {root.parent}")


def class_folders(root: Path, *, train: bool = True) -> tuple[list[str], str]:
    """The class names of a train/<class>/*, test/<class>/* tree and the name of its test part (test or val).

    For an undivided tree, <class>/*, the name is empty; `part_for_test` divides it. What does not train (`train` false)
    needs the test part alone. Raises UserError if the two parts do not have the same classes or a class has no images.
    """
    try:
        if (root / PACKED).is_file():
            raise UserError(f"data.root={root}: is a packed folder, which data=imagenet reads")
        if (root / PACKING).is_dir():
            raise UserError(f"data.root={root}: is packed incompletely; the same resnet-pack command resumes it")
        # ImageNet's own test/ is flat, without classes: there val/ is the test part.
        parts = [name for name in ("test", "val") if (root / name).is_dir()]
        test = next((name for name in parts if folders_in(root / name)), parts[0] if parts else None)
        if not any(root.iterdir()):
            raise UserError(f"data.root={root}: the folder is empty")
        if test is None and not (root / "train").is_dir():
            _check_whole(root)
            return _undivided_classes(root), ""
        if test is None or (train and not (root / "train").is_dir()):
            lacks = "no train/ and test/ (or val/) folders with a folder for each class"
            if test is not None and folders_in(root / test):
                lacks = f"{test}/ and no train/, which is needed beside it, with the same classes"
            raise UserError(f"data.root={root}: has {lacks}{_suggest_name(folders_in(root))}")
        classes = {}
        for part in ["train", test] if train else parts_of(root, test):
            classes[part] = folders_in(root / part)
            if not classes[part]:
                raise UserError(f"data.root={root}: {part}/ has no folder for any class")
            for name in classes[part]:
                with os.scandir(root / part / name) as entries:
                    has_images = any(is_image(entry.name) for entry in entries)
                if not has_images:
                    none = f"has no images ({' '.join(IMAGE_SUFFIXES)}); remove that folder, or put images into it"
                    raise UserError(f"data.root={root}: {part}/{name}/ {none}")
    except OSError as error:
        raise UserError(f"data.root={root}: {error.strerror}: {error.filename}") from error
    for here, there in itertools.permutations(classes, 2):
        for name in classes[here]:
            if name not in classes[there]:
                near = nearest(name, set(classes[there]) - set(classes[here]))
                raise UserError(f"data.root={root}: class {name} is in {here}/ and not in {there}/{near}")
    if len(classes[test]) < 2:
        raise UserError(f"data.root={root}: has one class, {classes[test][0]}; at least two are needed")
    return classes[test], test


def parts_of(root: Path, test: str) -> list[str]:
    """The folders of classes: train and `test`; `test` alone where train/ lacks classes; undivided, the root, ""."""
    whole = test and (root / "train").is_dir() and folders_in(root / "train") == folders_in(root / test)
    return ["train", test] if whole else [test]


def _suggest_name(folders: Collection[str]) -> str:
    """Advice on folders whose names are similar to those of the parts of a tree: tset, validation, Train."""
    for folder in sorted(set(folders) - {"train", "test", "val"}):
        alike = [part for part in ("train", "test", "val") if folder.lower().startswith(part)]
        if part := alike[0] if alike else closest(folder, ["train", "test", "val"]):
            return f"; {folder}/ is not one: name it {part}/ if it is meant"
    return ""


def _undivided_classes(root: Path) -> list[str]:
    """The classes of a <class>/* tree. Raises UserError."""
    count = {name: len(images_in(root / name)[0]) for name in folders_in(root)}
    filled = [name for name, images in count.items() if images]
    if len(filled) < 2:
        raise UserError(f"data.root={root}: {_describe_no_classes(root, filled)}")
    for name, images in count.items():
        if images < 2:
            files = "one image" if images else f"no images ({' '.join(IMAGE_SUFFIXES)})"
            raise UserError(f"data.root={root}: {name}/ has {files}; at least two are needed, one of them for the test")
    return list(count)


def _describe_no_classes(root: Path, filled: list[str]) -> str:
    """What a folder is that is no tree of classes; of its folders those `filled` have images."""
    folders = folders_in(root)
    if filled:
        empty = [f"{name}/" for name in folders if name not in filled]
        return f"has one class, {filled[0]}; at least two are needed" + (
            f"; without images: {first_few(empty)}" if empty else ""
        )
    if images := len(images_in(root)[0]):
        return f"has {images} image{'s' * (images > 1)} in no folder; put the images into a folder for each class"
    if advice := _suggest_name(folders):
        return f"has no train/ and test/ (or val/) folders with a folder for each class{advice}"
    if len(folders) == 1:
        inner = folders_in(root / folders[0])
        if "train" in inner or sum(bool(images_in(root / folders[0] / name)[0]) for name in inner) > 1:
            return f"the classes seem to lie in {folders[0]}/; try data.root={root / folders[0]}"
    return "has neither a folder of images for each class nor train/ and test/ (or val/) with such folders"


def part_for_test(name: str, files: Collection[str]) -> set[str]:
    """The test files of class `name` of an undivided tree: the fifth whose names have the lowest hashes.

    So the division depends only on the names, not on the machine, the seed or the order of the folder.
    """
    ordered = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(f"{name}/{file}")).digest())
    return set(ordered[: max(1, round(len(ordered) / 5))])


def files_for_test(name: str, root: str | None) -> list[str]:
    """The test images of an undivided tree as CLASS/FILE, in order; empty if the data have a test part."""
    if name == "digits" or root is None or is_packed(root) or is_official(name, folder := expand(root)):
        return []
    classes, test = class_folders(folder, train=False)
    by_class = {} if test else {name: [entry.name for entry in images_in(folder / name)[0]] for name in classes}
    return [f"{name}/{file}" for name, files in by_class.items() for file in sorted(part_for_test(name, files))]


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def list_file(root: Path, kind: str, name: str) -> Path:
    """The file of the image list `name`, such as 2007_trainval (trainval in a single VOC folder) or train2014."""
    if kind == "coco":
        return root / "annotations" / f"instances_{name}.json"
    if kind == "det":
        return root / DET_LISTS / f"{name}.txt"
    year, _, rest = name.partition("_")
    folder = root / f"VOC{year}"
    return folder / LISTS / f"{rest}.txt" if rest and folder.is_dir() else root / LISTS / f"{name}.txt"


def lists_by_class(root: Path) -> list[Path]:
    """ILSVRC's training lists, one for each class: ImageSets/DET/train_1.txt, …, train_200.txt."""
    paths = {path.stem.removeprefix("train_"): path for path in root.glob(f"{DET_LISTS}/train_*.txt")}
    return [paths[number] for number in sorted((name for name in paths if name.isdecimal()), key=int)]


def lists_of(root: Path, kind: str) -> list[str]:
    """The names of the available image lists."""
    if kind == "coco":
        return sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
    if kind == "det":
        parts = lists_by_class(root)
        names = {path.stem for path in root.glob(f"{DET_LISTS}/*.txt")} - {path.stem for path in parts}
        return sorted(names | ({"train"} if parts else set()))
    years = (f"{path.parts[-4].removeprefix('VOC')}_{path.stem}" for path in root.glob(f"VOC*/{LISTS}/*.txt"))
    return sorted([*years, *(path.stem for path in root.glob(f"{LISTS}/*.txt"))])


def class_folders_of_boxes(root: Path, *, train: bool = True) -> tuple[Path, list[str]]:
    """Where the images of an ImageNet tree with boxes lie, in train/ and val/, and its classes. Raises UserError.

    For a test (`train` false) val/ alone, which may be flat, is needed: the classes are its folders, if any.
    """
    parts = ("train", "val") if train else ("val",)
    places = (root, root / "Data/CLS-LOC")
    images = next((place for part in ("train", "val") for place in places if (place / part).is_dir()), root)
    for place in (base / part for base in (images, root / BOXES) for part in parts):
        if not place.is_dir():
            raise UserError(f"data.root={root}: has no {place.relative_to(root)}/, as ILSVRC's localization has")
    try:
        classes = folders_in(images / parts[0])
    except OSError as error:
        raise UserError(f"data.root={root}: {error.strerror}: {error.filename}") from error
    if train and not classes:
        raise UserError(f"data.root={root}: train/ has no folder for any class")
    return images, classes

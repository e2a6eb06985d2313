"""Where the lists of a detection data set lie; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

LISTS = "ImageSets/Main"


def list_file(root: Path, kind: str, name: str) -> Path:
    """The file that says which images are in the list `name`: 2007_trainval, or in one folder trainval; train2014."""
    if kind == "coco":
        return root / "annotations" / f"instances_{name}.json"
    year, _, rest = name.partition("_")
    folder = root / f"VOC{year}"
    return folder / LISTS / f"{rest}.txt" if rest and folder.is_dir() else root / LISTS / f"{name}.txt"


def lists_of(root: Path, kind: str) -> list[str]:
    """The names of the lists that there are."""
    if kind == "coco":
        return sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
    years = (f"{path.parts[-4].removeprefix('VOC')}_{path.stem}" for path in root.glob(f"VOC*/{LISTS}/*.txt"))
    return sorted([*years, *(path.stem for path in root.glob(f"{LISTS}/*.txt"))])

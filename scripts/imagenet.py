"""Lay out ImageNet (ILSVRC2012) from its official archives as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

    python scripts/imagenet.py FOLDER_OF_THE_ARCHIVES OUT

FOLDER_OF_THE_ARCHIVES holds ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB) and
ILSVRC2012_devkit_t12.tar.gz, as image-net.org gives them. They are checked (MD5), which reads them once; then 145 GB
are written. Killed, it resumes when it is run again: a class that is laid out is not done again, an archive whose
checksum has held is not read again for it. Reading the devkit's synset table needs scipy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resnet_train.data.download import CHUNK, checksum
from resnet_train.errors import UserError
from resnet_train.files import put

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
WNID = re.compile(r"n\d{8}")
IMAGE = re.compile(r"[A-Za-z0-9_]+\.JPEG")
DONE = ".done"  # in OUT: what has been checked and laid out


def layout(archives: Path, out: Path, md5: dict[str, str] = MD5) -> None:
    """Check the three archives in `archives` and lay them out in `out`, or resume it. Raises UserError."""
    done = out / DONE
    try:
        done.mkdir(parents=True, exist_ok=True)
        for name, expected in md5.items():
            _check(archives / name, expected, done)
        wnids, truth = _read_devkit(archives / DEVKIT)
        _lay_out_train(archives / TRAIN, out / "train", set(wnids.values()), done)
        _lay_out_val(archives / VAL, out / "val", [wnids[number] for number in truth], done)
    except (OSError, EOFError, tarfile.TarError) as error:
        place, reason = getattr(error, "filename", None) or archives, str(error).splitlines()
        raise UserError(f"{place}: {(reason or [type(error).__name__])[0]}") from error


def _check(archive: Path, md5: str, done: Path) -> None:
    """See that an archive is the official one, unless it was seen before and has not changed."""
    status = archive.stat()
    note, seen = done / f"{archive.name}.md5", f"{md5} {status.st_size} {status.st_mtime_ns}"
    if note.is_file() and note.read_text() == seen:
        return
    print(f"{archive.name}: checking", flush=True)
    if checksum(archive) != md5:
        raise UserError(f"{archive}: is damaged or not the official archive (its MD5 is not {md5})")
    put(note, seen.encode())


def _read_devkit(archive: Path) -> tuple[dict[int, str], list[int]]:
    """The wnid of each of the ILSVRC2012 ids of the leaves of the hierarchy, and the id of each validation image."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("reading the devkit needs scipy: pip install scipy") from error
    with tarfile.open(archive) as devkit:
        found = {Path(member.name).name: member for member in devkit if member.isfile()}

        def content(name: str) -> bytes:
            file = devkit.extractfile(found[name]) if name in found else None
            if file is None:
                raise UserError(f"{archive}: holds no {name}")
            return file.read()

        synsets: Any = loadmat(io.BytesIO(content("meta.mat")), squeeze_me=True)["synsets"]
        truth = [int(word) for word in content("ILSVRC2012_validation_ground_truth.txt").split()]
    leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    for wnid in leaves.values():
        if not WNID.fullmatch(wnid):
            raise UserError(f"{archive}: {wnid!r} is no wnid")
    if unknown := set(truth) - set(leaves):
        raise UserError(f"{archive}: validation images have the id {min(unknown)}, of which there is no class")
    return leaves, truth


def _lay_out_train(archive: Path, train: Path, wnids: set[str], done: Path) -> None:
    """An archive of archives, one for each class; a class is there whole or not at all."""
    train.mkdir(exist_ok=True)
    seen = set()
    with tarfile.open(archive) as outer, tqdm(total=len(wnids), desc="train", unit=" classes", disable=None) as bar:
        for member in outer:
            wnid = member.name.removesuffix(".tar")
            if wnid not in wnids or not member.isfile():
                raise UserError(f"{archive}: holds {member.name!r}, which is no class's archive")
            seen.add(wnid)
            bar.update()
            if (train / wnid).is_dir():
                continue
            part = done / wnid
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image in inner:
                    _extract(inner, image, part)
            _sync(part)
            part.replace(train / wnid)
    if wnids - seen:
        raise UserError(f"{archive}: has no archive of class {min(wnids - seen)}")


def _lay_out_val(archive: Path, val: Path, wnids: list[str], done: Path) -> None:
    """ILSVRC2012_val_00000001.JPEG and on, each to the folder of its class."""
    seen = set()
    for wnid in set(wnids):
        (val / wnid).mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as images, tqdm(total=len(wnids), desc="val", unit=" images", disable=None) as bar:
        for image in images:
            number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", image.name)
            if not number or not 1 <= int(number[1]) <= len(wnids):
                raise UserError(f"{archive}: holds {image.name!r}, which is no validation image")
            seen.add(int(number[1]))
            bar.update()
            folder = val / wnids[int(number[1]) - 1]
            if not (folder / image.name).is_file() or (folder / image.name).stat().st_size != image.size:
                _extract(images, image, folder, done)
    if len(seen) != len(wnids):
        raise UserError(f"{archive}: holds {len(seen)} of {len(wnids)} validation images")


def _extract(archive: tarfile.TarFile, image: tarfile.TarInfo, folder: Path, by_way_of: Path | None = None) -> None:
    """Write a member to `folder`, whole or not at all. Only plain files with plain names are taken."""
    file = archive.extractfile(image) if image.isreg() else None
    if file is None or not IMAGE.fullmatch(image.name):
        raise UserError(f"{archive.name!s}: holds {image.name!r}, which is no image")
    part = (by_way_of or folder) / f"{image.name}.part"
    with part.open("wb") as written:
        shutil.copyfileobj(file, written, CHUNK)
    if part.stat().st_size != image.size:
        raise UserError(f"{archive.name!s}: ends within {image.name}")
    part.replace(folder / image.name)


def _sync(folder: Path) -> None:
    """Put the folder's files on disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("out", type=Path)
    words = parser.parse_args()
    with _one_line():
        layout(words.archives, words.out)
        print(f"{words.out}: complete; resnet-train data=imagenet data.root={words.out}")

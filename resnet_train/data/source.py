"""Data sets that fit in memory: CIFAR, class-folder trees and scikit-learn's digits, as uint8."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.layout import class_folders, images_in, is_official, part_for_test, parts_of
from resnet_train.data import cifar10, cifar100
from resnet_train.data.cache import cache_folder, load_cached
from resnet_train.data.crops import whole_view
from resnet_train.data.decode import ImageError, read_image
from resnet_train.data.download import download
from resnet_train.data.image_set import DataSet, ImageSet, make_data_set
from resnet_train.engine.limits import check_memory
from resnet_train.errors import UserError, first_few, join_faults
from resnet_train.files import expand

SMALL_FILE = 10_000  # bytes: of 60,000 images of 3 kB, 16 threads decode a quarter of what one does


def load(name: str, root: str | None, size: int, *, skip: bool = False) -> DataSet:
    """Load the data set `name` at `root` into memory; decoded on the first call, then read from the cache.

    Images are `size` pixels square. Raises UserError for data that are missing or damaged; with `skip`, images that
    cannot be decoded are left out instead.
    """
    if name == "digits":
        return _digits(size)
    path = expand(root) if root else None
    if name in ("cifar10", "cifar100") and (path is None or is_official(name, path)):
        cifar: Any = cifar10 if name == "cifar10" else cifar100
        archive = cache_folder() / cifar.MIRRORS[0].rpartition("/")[2]
        source = path or download(cifar.MIRRORS, archive, cifar.ARCHIVE_MD5, cifar.ARCHIVE_SIZE)
        files = [source] if source.is_file() else [cifar10.official_folder(source, name) / file for file in cifar.FILES]
        return load_cached(name, files, "", lambda: cifar.read_official(source))
    assert path is not None
    classes, test = class_folders(path, train=False)
    files_of = {part: listing(path, part, classes, test) for part in ("train", "test")}
    files = [file for part in files_of.values() for file, _ in part]
    exact = name == "cifar10"

    def decode() -> DataSet:
        what = f"data.size={size}: {len(files):,} images of {[size, size, 3]}"
        check_memory(
            len(files) * size * size * 3, what, "use a smaller one, or data=imagenet, which keeps none in memory"
        )
        faults: dict[Path, UserError] = {}
        sets = [_decode(part, size, exact, faults) for part in files_of.values()]
        if wrong := [file for file in sorted(faults) if not (skip and isinstance(faults[file], ImageError))]:
            skippable = not exact and not skip and any(isinstance(faults[file], ImageError) for file in wrong)
            advice = "; remove such, or train without them by data.broken=skip" if skippable else ""
            raise UserError(join_faults({str(file): faults[file] for file in wrong}) + advice)
        for part, listed, images in zip(("training", "test"), files_of.values(), sets, strict=True):
            for label in {label for _, label in listed} - set(images.labels.tolist()):
                broken = first_few(sorted(_name(file) for file in faults if file.parent.name == classes[label]))
                raise UserError(f"data.root={root}: {classes[label]} has no {part} image that can be decoded: {broken}")
        names = [[_name(file) for file, _ in part if file in faults] for part in files_of.values()]
        data = make_data_set(sets[0], sets[1], classes)
        return replace(data, unreadable=dict(zip(("train", "test"), names, strict=True)))

    return load_cached(path.name, files, f"{size} {exact} {skip}", decode)


def listing(root: Path, part: str, classes: list[str], test: str) -> list[tuple[Path, int]]:
    """The image files of `part`, train or test, of a tree with their labels, in order.

    `test` is the folder of the test part, empty for an undivided tree. Of a part that is not there, none.
    """
    name_of_part = part if test and part == "train" else test
    if name_of_part not in parts_of(root, test):
        return []
    folder = root / name_of_part
    entries: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = [entry.name for entry in images_in(folder / name)[0]]
        tested = set() if test else part_for_test(name, files)
        entries += [(folder / name / file, label) for file in files if test or (file in tested) == (part == "test")]
    return entries


def file_names(name: str, root: str | None, classes: list[str], part: str) -> list[str] | None:
    """CLASS/FILE of every image of a part (train or test) of `load`, in order.

    None for scikit-learn's digits and CIFAR's archives, which have no file per image.
    """
    if name == "digits" or root is None or is_official(name, expand(root)):
        return None
    folder = expand(root)
    test = class_folders(folder, train=False)[1]  # it may be val/
    return [_name(file) for file, _ in listing(folder, part, classes, test)]


def _name(file: Path) -> str:
    """CLASS/FILE."""
    return f"{file.parent.name}/{file.name}"


def _decode(files: list[tuple[Path, int]], size: int, exact: bool, faults: dict[Path, UserError]) -> ImageSet:
    """Decode all files; images of another size are faults if `exact`, else resized and center-cropped.

    What cannot be read goes to `faults` and is left out.
    """
    if not files:
        return ImageSet(torch.empty(0, size, size, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))

    def read(item: tuple[Path, int]) -> Tensor | None:
        try:
            image = read_image(item[0])
            if exact and image.shape[1:] != (size, size):
                shape = f"{image.shape[2]}x{image.shape[1]}"
                raise UserError(f"{item[0]}: is {shape}; data=cifar10 takes {size}x{size}, data=imagefolder any size")
        except UserError as fault:
            faults[item[0]] = fault
            return None
        return (image if image.shape[1:] == (size, size) else whole_view(image, size)).permute(1, 2, 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
        decoded = map(read, files) if _are_small(files) else pool.map(read, files)
        bar = tqdm(decoded, total=len(files), desc=f"decoding {files[0][0].parts[-3]}", disable=None)
        for index, image in enumerate(bar):
            if image is not None:
                images[index] = image
    whole = ImageSet(images, torch.tensor([label for _, label in files]))
    good = [index for index, (file, _) in enumerate(files) if file not in faults]
    return whole if len(good) == len(files) else whole.part(torch.tensor(good, dtype=torch.int64))


def _are_small(files: list[tuple[Path, int]]) -> bool:
    """Whether threads would wait longer for the interpreter's lock than files take to decode, judged by the first."""
    with contextlib.suppress(OSError):
        return files[0][0].stat().st_size < SMALL_FILE
    return True


def _digits(size: int) -> DataSet:
    """scikit-learn's 1,797 digits, 8x8, enlarged; a fixed fifth is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data=digits: needs scikit-learn: pip install 'resnet-train[digits]'") from error
    from torchvision.transforms.v2 import functional as TF

    from resnet_train.data.sampler import held_out

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().float()[:, None]
    # Resized as float and then rounded: rounding of uint8 depends on the processor, and the digest would differ.
    large = TF.resize(grey, [size, size], antialias=True).round().to(torch.uint8)
    images = large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    all_images = ImageSet(images, torch.from_numpy(digits.target).long())
    train, test = held_out(len(all_images), 360)
    return make_data_set(all_images.part(train), all_images.part(test), [str(digit) for digit in range(10)])

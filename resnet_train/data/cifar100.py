"""CIFAR-100's official archive: as many images as CIFAR-10 in 100 classes. The paper has no results for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from resnet_train.data.cifar10 import image_set, read_files, unpickle
from resnet_train.data.image_set import DataSet, make_data_set

ARCHIVE_SIZE = 169_001_437
MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",)
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FILES = {  # name: MD5
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def read_official(source: Path, files: Mapping[str, str] = FILES) -> DataSet:
    """CIFAR-100, its 100 fine classes, from the official archive or its folder. `files` maps the files to their MD5.

    As for CIFAR-10, nothing is extracted to disk, and nothing is unpickled unverified. Raises UserError.
    """
    raw = {name: unpickle(content) for name, content in read_files(source, "cifar100", files).items()}
    train, test = (image_set([raw[part]], "fine_labels") for part in ("train", "test"))
    return make_data_set(train, test, list(raw["meta"]["fine_label_names"]))

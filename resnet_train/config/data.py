"""The data.* keys of each command, and checks that need only look at folders; no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from resnet_train.config import keys
from resnet_train.config.keys import Free, OnlyFor, Range
from resnet_train.config.layout import OFFICIAL, check_source, class_folders, count_images, files_for_test, is_official
from resnet_train.errors import UserError
from resnet_train.files import expand


@dataclass(frozen=True)
class Data:
    """A data set: configs/data/."""

    name: Literal["cifar10", "cifar100", "digits", "imagefolder", "imagenet"]
    family: Literal["cifar", "imagenet"]
    root: keys.Root
    validation: Annotated[int, Range(0)]
    size: Annotated[int, keys.IMAGE_SIZE]
    workers: Annotated[int | Literal["auto"], Range(0, 256), Free(), OnlyFor("imagenet")]
    broken: Annotated[keys.Broken, OnlyFor("imagenet", "imagefolder")]


@dataclass(frozen=True)
class EvalData:
    """The data to evaluate on; `same` is what the checkpoint was trained on."""

    name: Literal["same", "cifar10", "cifar100", "digits", "imagefolder", "imagenet"]
    root: str | None


@dataclass(frozen=True)
class FeaturesData:
    """The data to take features of, as in `EvalData`; none if images are named."""

    name: Literal["none", "same", "cifar10", "cifar100", "digits", "imagefolder", "imagenet"]
    root: str | None


@dataclass(frozen=True)
class PackData:
    """The tree to pack."""

    root: str | None
    broken: Literal["stop", "skip"]


@dataclass(frozen=True)
class WeightsData:
    """The data set that imported weights are for; auto is imagenet or cifar10, as the net is."""

    name: Literal["auto", "cifar10", "cifar100", "digits", "imagefolder", "imagenet"]
    root: str | None
    size: Annotated[int | None, keys.IMAGE_SIZE]


def _is_official(data: Data) -> bool:
    return data.name in OFFICIAL and (data.root is None or is_official(data.name, expand(data.root)))


def check_family(data: Data) -> None:
    """Raises UserError for a family that the data set cannot have."""
    if data.family == "imagenet" and (_is_official(data) or data.name == "digits"):
        raise UserError(f"data.family=imagenet: is for folders of photographs, not for data={data.name}")
    if data.family == "cifar" and data.name == "imagenet":
        raise UserError("data.family=cifar: keeps images in memory, as data=imagefolder does; use that")


def training_images(data: Data) -> int | None:
    """The number of training images of a data set in memory; None if it is not known before the data are opened."""
    if _is_official(data) or data.name == "digits":
        return 50_000 if _is_official(data) else 1_437
    root = expand(data.root or "")
    folder = root / "train"
    if data.family == "cifar" and root.is_dir() and not folder.is_dir() and class_folders(root, train=False)[1] == "":
        return count_images(root) - len(files_for_test(data.name, data.root))
    return count_images(folder) if data.family == "cifar" and folder.is_dir() else None


def check_held_out(data: Data) -> None:
    """Raises UserError if more images are held out than the training set has."""
    images = training_images(data) if data.validation else None
    if images is not None and data.validation >= images:
        raise UserError(f"data.validation={data.validation}: the training set has {images} images; hold out fewer")


def check_other_data(data: EvalData) -> None:
    """Raises UserError for data, other than the checkpoint's own, that are missing or in the wrong layout."""
    if data.name != "same":
        check_source(data.name, data.root, train=False)
    elif data.root is not None and not expand(data.root).exists():
        raise UserError(f"data.root={data.root}: there is no such file or folder")

"""What `resnet-detect` may be told: typed dataclasses and their checks; no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from resnet_train.config import boxes, keys
from resnet_train.config.keys import Alias, OnlyFor, Range
from resnet_train.config.layout import list_file, lists_of
from resnet_train.config.paths import anchored, check_checkpoints, check_folder, check_image, check_out, check_paths
from resnet_train.config.schema import as_list, from_dict
from resnet_train.config.train import check_depth
from resnet_train.errors import UserError, nearest
from resnet_train.files import expand, read_if_object

LIST_FILES = {
    "voc": "ImageSets/Main/*.txt or VOC*/ImageSets/Main/*.txt",
    "coco": "annotations/instances_*.json",
    "det": "ImageSets/DET/*.txt",
}


@dataclass(frozen=True, kw_only=True)
class DetectData(boxes.BoxData):
    """Pictures with boxes: configs/detection/data/."""

    name: Literal["voc", "coco", "det"]
    train: list[str]
    test: str
    classes: list[str] | None


@dataclass(frozen=True, kw_only=True)
class DetectConfig(boxes.BoxConfig):
    """The configuration of `resnet-detect`: configs/detection/detect.yaml, the data set and the recipe."""

    data: Annotated[DetectData, Alias("dataset")]
    backbone: Literal["resnet", "vgg16"]
    depth: Annotated[keys.Depth, OnlyFor("resnet")]
    pyramid: Annotated[bool, OnlyFor("resnet")]
    context: Annotated[bool, OnlyFor("resnet")]
    masks: Annotated[bool, OnlyFor("resnet")]
    regions: Annotated[int, Range(2, 10_000)]
    warmup: Annotated[int, Range(0, 10**9)]
    freeze: Annotated[Literal["conv1", "layer1", "layer2", "layer3"] | None, Alias("frozen_stages")]
    min_size: Annotated[int, Range(32, 4096)]
    max_size: Annotated[int, Range(32, 8192)]
    proposals: Annotated[int, Range(1, 10_000)]

    @property
    def net(self) -> str:
        """The network's name: resnet-101, resnet-101-pyramid, resnet-101-context, resnet-101-masks, vgg-16."""
        if self.backbone == "vgg16":
            return "vgg-16"
        words = [word for word in ("pyramid", "context", "masks") if getattr(self, word)]
        return "-".join([f"resnet-{self.depth}", *words])


@dataclass(frozen=True, kw_only=True)
class DetectTestData(boxes.BoxTestData):
    """The pictures of a test; null is what the checkpoint has."""

    test: str | None


@dataclass(frozen=True)
class DetectTestConfig:
    """The configuration of `resnet-detect test`: configs/detection/test.yaml."""

    checkpoint: list[str]
    data: DetectTestData
    refine: bool
    scales: Annotated[list[int] | None, Range(32, 4096)]
    devices: keys.Devices
    device: keys.Device
    timeout: keys.Timeout
    out: str | None


@dataclass(frozen=True)
class PredictConfig:
    """The configuration of `resnet-detect predict` beside the images: configs/detection/predict.yaml."""

    checkpoint: str
    score: Annotated[float, Range(0, 1)]
    device: keys.Device
    out: str


def check_detect(values: Mapping[str, Any], requested: Collection[str] = ()) -> DetectConfig:
    """The checked configuration of a run from plain, resolved `values`; `requested` are the keys that the user named.

    Looks at the command line and at directory listings only. Raises UserError.
    """
    data = {**values["data"], "train": as_list(values["data"]["train"])}
    config = from_dict(DetectConfig, {**values, "data": data})
    boxes.check_boxes(config, requested, "backbone")
    _check_backbone(config)
    if config.max_size < config.min_size:
        raise UserError(f"max_size={config.max_size}: is below min_size={config.min_size}")
    if config.freeze is not None and config.init_from is None:
        if "freeze" in requested:
            raise UserError(f"freeze={config.freeze}: would keep random weights; add init_from=, or remove it")
        config = dataclasses.replace(config, freeze=None)
    if not config.data.train:
        raise UserError("data.train=[]: name at least one list")
    _check_data(config.data, {"data.train": config.data.train, "data.test": [config.data.test]}, requested or None)
    return boxes.with_absolute_paths(config)


def _check_backbone(config: DetectConfig) -> None:
    if config.backbone == "resnet":
        check_depth(config.depth, "imagenet")
    if config.pyramid and len(config.anchors) != 5:
        raise UserError(f"anchors={config.anchors}: pyramid=true has five levels; give five, as [32,64,128,256,512]")
    if config.pyramid and config.context:
        raise UserError("context=true: is for conv5_x on each region, which pyramid=true has not; remove one of them")
    if config.masks and config.data.name != "coco":
        raise UserError(f"masks=true: data={config.data.name} has boxes alone; use data=coco, or remove it")


def _check_data(data: DetectData, named: Mapping[str, list[str]], requested: Collection[str] | None = None) -> None:
    """Refuse what a look at the folder shows to be wrong, such as lists that keys name. Raises UserError.

    Keys that were not `requested`, where that is said, have the names of the data set's own lists.
    """
    if data.root is None:
        raise UserError(f"data.root: data={data.name} needs one: data.root=PATH")
    root = boxes.check_root(data.root)
    if data.classes is not None and data.name == "coco":
        raise UserError("data.classes: COCO's are those of its JSON; remove it")
    for key, lists in named.items():
        for name in lists:
            there = lists_of(root, data.name)
            if not there:
                raise UserError(f"data.root={data.root}: has no {LIST_FILES[data.name]}")
            if name not in there and not list_file(root, data.name, name).is_file():
                if requested is not None and key not in requested:
                    likely = min(there, key=lambda one: (not one.startswith(key[5:]), "val" not in one))
                    way = f"{key}=[{likely}]" if key == "data.train" else f"{key}={likely}"
                    raise UserError(
                        f"{key}: the default, {name}, is not there; {data.root} has {', '.join(there)}; say which, as"
                        f" in {way}"
                    )
                raise UserError(f"{key}={name}: {data.root} has {', '.join(there)}{nearest(name, there)}")


TEST_RESULT = ("list", "protocol", "refine")  # keys of a test's result


def check_test(values: Mapping[str, Any]) -> DetectTestConfig:
    """The checked configuration of a test. Raises UserError."""
    config = from_dict(DetectTestConfig, {**values, "checkpoint": as_list(values["checkpoint"])})
    check_paths({"data.root": config.data.root, "out": config.out})
    check_checkpoints(config.checkpoint)
    _check_test_list(config.data, expand(config.checkpoint[0]))
    check_out(config.out, TEST_RESULT)
    if config.scales is not None and len(config.scales) < 2:
        raise UserError(f"scales={config.scales}: give two or more, as [200,400,600,800,1000]; null is training's one")
    if config.scales is not None:
        boxes.check_rising("scales", config.scales, "[200,400,600,800,1000]")
    return dataclasses.replace(config, data=anchored(config.data))


def _check_test_list(data: DetectTestData, checkpoint: Path) -> None:
    """Refuse a folder or a list that is not there, as far as command line and config.json say. Raises UserError.

    The checkpoint itself takes torch to be read: `with_test_data` checks what it says.
    """
    trained = read_if_object(checkpoint.absolute().parent.parent / "config.json").get("data")
    given = data.root or (trained.get("root") if isinstance(trained, dict) else None)
    if data.root is not None:
        boxes.check_root(data.root)
    if data.test is None or not isinstance(given, str) or not (root := expand(given)).is_dir():
        return
    there = [name for kind in LIST_FILES for name in lists_of(root, kind)]
    if there and data.test not in there and not any(list_file(root, kind, data.test).is_file() for kind in LIST_FILES):
        raise UserError(f"data.test={data.test}: {given} has {', '.join(there)}{nearest(data.test, there)}")


def with_test_data(config: DetectConfig, requested: DetectTestData) -> DetectConfig:
    """A checkpoint's configuration, on the pictures that the command line names, if any. Raises UserError."""
    tested = boxes.with_test_data(config, requested)
    _check_data(tested.data, {"data.test": [tested.data.test]})
    return tested


def check_predict(values: Mapping[str, Any], images: Collection[str]) -> PredictConfig:
    """The checked configuration of a prediction for `images`. Raises UserError."""
    config = from_dict(PredictConfig, values)
    check_paths({"out": config.out})
    check_checkpoints([config.checkpoint])
    if not images:
        raise UserError("name the images, as in resnet-detect predict photo.jpg checkpoint=…")
    seen: dict[str, str] = {}
    for image in images:
        check_image(image)
        stem = Path(image).stem
        if stem in seen:
            raise UserError(f"{image}: its picture and that of {seen[stem]} would have one name; give them one each")
        seen[stem] = image
        picture = expand(config.out) / f"{stem}.png"
        if picture.exists() and picture.samefile(expand(image)):
            raise UserError(f"out={config.out}: the picture of {image} would take its place; use another folder")
    check_folder(config.out, "detections.json", ("checkpoint", "score", "images"))
    return config


def config_from_checkpoint(values: Any) -> DetectConfig:
    """The configuration that a checkpoint holds. Raises UserError if it is of another version."""
    try:
        config = from_dict(DetectConfig, values)
        check_depth(config.depth, "imagenet")
        return config
    except UserError as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def run_directory(config: DetectConfig, requested: Collection[str]) -> Path:
    """Where the run goes: `run_dir`, or runs/DATA-detection/NET/ and the values of other keys that were `requested`."""
    shown = ("backbone", "depth", "pyramid", "context", "masks")
    return boxes.run_directory(config, requested, "detection", config.net, shown)

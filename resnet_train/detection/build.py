"""From a configuration to a detector, around new weights or those of a checkpoint (appendix A)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_train.config.detection import DetectConfig, config_from_checkpoint
from resnet_train.config.schema import format_value
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.detection.model import Detector, DetectorSettings, resnet_detector, vgg_detector
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet
from resnet_train.weights import state_dicts
from resnet_train.weights.source import read_source


@dataclass(frozen=True)
class Backbone:
    """What a detector is built around, as its checkpoint keeps it."""

    shortcut: str
    bottleneck_stride: str
    mean: list[float]  # of images in 0 to 1, subtracted from them
    std: list[float]  # and what is left divided by
    pretrained: str | None  # the net in words; None: random weights
    detector: str | None = None  # the detector that training went on from, in words


# Pascal VOC's names of classes that COCO names otherwise.
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
PER_CLASS = {  # rows of each class
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}


def build_new(config: DetectConfig, names: list[str]) -> tuple[Detector, Backbone]:
    """The detector of the classes `names` as training begins: around the weights of `init_from`, else random ones.

    With weights, batch norm stays as they have it (appendix A); random ones could not do without it. A detector's are
    taken whole (appendix B, from COCO to VOC). Raises UserError.
    """
    classes = len(names)
    plain = Backbone("B", "1x1", list(state_dicts.MEAN), list(IMAGENET_STD), None)
    if config.init_from is None:
        return _assemble(config, plain, classes)
    path = Path(config.init_from)
    content = state_dicts.read(path)
    if checkpoint.is_ours(content) and "detector" in content:
        return _go_on_from(config, content, names, path)
    if config.backbone == "vgg16":
        backbone = dataclasses.replace(plain, pretrained=f"VGG-16 of {path.name}")
        model, _ = _assemble(config, backbone, classes)
        _load_vgg(model, content, path)
        return model, backbone
    source = read_source(path, content=content)
    if source.family != "imagenet" or source.depth != config.depth:
        raise UserError(
            f"init_from={path}: holds {source.name}; "
            + (f"use depth={source.depth}" if source.family == "imagenet" else "detection takes an ImageNet net")
        )
    if source.arch != "resnet":
        advice = (
            "detection takes a residual net"
            if source.arch
            else "which may be a plain one; resnet-weights import FILE arch=resnet out=… says that it is not"
        )
        raise UserError(f"init_from={path}: holds {source.name}, {advice}")
    backbone = Backbone(
        shortcut=source.shortcut,
        bottleneck_stride=source.bottleneck_stride,
        mean=(source.mean.mean((0, 1)) / 255).tolist(),
        std=list(source.std),
        pretrained=f"{source.name} of {path.name}",
    )
    model, _ = _assemble(config, backbone, classes)
    _load_resnet(model, source.model, path)
    return model, backbone


def build_like_checkpoint(config: DetectConfig, state: dict[str, Any]) -> tuple[Detector, Backbone]:
    """The detector that a checkpoint's `state` holds, its weights not yet in it. Raises UserError."""
    with checkpoint.checkpoint_errors(state["path"]):
        backbone, classes = Backbone(**state["detector"]), len(state["classes"])
        checkpoint.check_net(state["model"], lambda: _assemble(config, backbone, classes)[0], config.depth)
        return _assemble(config, backbone, classes)


def _go_on_from(config: DetectConfig, state: dict[str, Any], names: list[str], path: Path) -> tuple[Detector, Backbone]:
    """The detector of a checkpoint's `state`, for the classes `names`: those that it does not know begin anew."""
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        theirs = config_from_checkpoint(state["config"])
    for key in ("backbone", "depth", "pyramid", "context", "masks", "anchors"):
        if (value := getattr(theirs, key)) != getattr(config, key):
            raise UserError(f"init_from={path}: is a detector with {key}={format_value(value)}; use that, or another")
    old, backbone = build_like_checkpoint(theirs, state | {"path": f"init_from={path}"})
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        old.load_state_dict(state["model"])
    known = {COCO_NAMES.get(name, name): row for row, name in enumerate(state["classes"], 1)}
    rows = [(0, 0)]  # the background's
    rows += [(row, known[own]) for row, name in enumerate(names, 1) if (own := COCO_NAMES.get(name, name)) in known]
    origin = f"the detector {theirs.net} of {path.name}, trained on {state['label']}"
    backbone = dataclasses.replace(backbone, detector=f"{origin}, {len(rows) - 1} of {len(names)} classes with it")
    model, _ = _assemble(config, backbone, len(names))
    weights = model.state_dict()
    for name, value in old.state_dict().items():
        if (each := PER_CLASS.get(name.rpartition(".")[0])) is None:
            weights[name] = value
            continue
        for row, other in rows:
            weights[name][each * row : each * (row + 1)] = value[each * other : each * (other + 1)]
    model.load_state_dict(weights)
    return model, backbone


def _assemble(config: DetectConfig, backbone: Backbone, classes: int) -> tuple[Detector, Backbone]:
    frame = DetectorSettings(
        anchors=config.anchors,
        proposals=config.proposals,
        regions=config.regions,
        min_size=config.min_size,
        max_size=config.max_size,
        mean=backbone.mean,
        std=backbone.std,
    )
    if config.backbone == "vgg16":
        model = vgg_detector(classes, frame)
    else:
        net = imagenet_resnet(config.depth, backbone.shortcut, bottleneck_stride=backbone.bottleneck_stride)
        model = resnet_detector(net, classes, frame, pyramid=config.pyramid, context=config.context, masks=config.masks)
    model.freeze(config.freeze, norm=backbone.pretrained is not None)
    return model, backbone


def _load_resnet(model: Detector, weights: dict[str, Tensor], path: Path) -> None:
    """Put the weights of a net, but for its classifier, where the detector has them."""
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        places = [model.backbone, *([] if hasattr(model.backbone, "layer4") else [model.roi_heads.box_head])]
        for place in places:
            own = {name for name in place.state_dict() if not name.startswith("fpn.")}
            place.load_state_dict({name: weights[name] for name in own}, strict=not hasattr(place, "fpn"))


def _load_vgg(model: Detector, content: object, path: Path) -> None:
    """Put torchvision's VGG-16, but for its last layer, where the detector has it. Raises UserError."""
    weights = state_dicts.tensors(content, path)
    if "features.0.weight" not in weights or "features.1.running_mean" in weights:
        raise UserError(f"init_from={path}: is not torchvision's vgg16 (features.0.weight, …, classifier.6.bias)")
    with checkpoint.checkpoint_errors(f"init_from={path}"):
        for place in (model.backbone, model.roi_heads.box_head):
            place.load_state_dict({name: weights[name] for name in place.state_dict()})

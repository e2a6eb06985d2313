"""The paper's arrangement of Faster R-CNN (appendix A) from torchvision's parts, around our ResNets or VGG-16.

The layers up to conv4_x (VGG-16: conv5_3), at stride 16, are shared by the whole image: the region proposal network
looks at what they give, and RoI pooling cuts it into regions of 14x14 (VGG-16: 7x7). conv5_x (VGG-16: fc6 and fc7) is
computed on each region, then the class and the box. With a feature pyramid (Lin et al. 2017) conv5_x is shared too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resnet_train.detection.mask_branch import add_mask_branch
from resnet_train.detection.pooling import ContextPool, Pool, Pooled, align
from resnet_train.detection.sampling import RegionSampler
from resnet_train.models.resnet import ResNet

STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")  # the paper's conv1, conv2_x, …, conv5_x
# The modules of VGG-16's `features` that are conv1_x, …, conv4_x, each with the pooling behind it.
VGG_ENDS = {"conv1": 5, "layer1": 10, "layer2": 17, "layer3": 24}
STRIDE = 16
PYRAMID = 256  # channels of the feature pyramid
RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height to its width
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")  # torchvision's names
NMS = 0.3  # Fast R-CNN's threshold of overlap among the detections of a class


class C4Backbone(nn.Module):
    """conv1 to conv4_x: images (N, 3, H, W) to (N, C, H/16, W/16), in float32, which coordinates need."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3 = (net.get_submodule(stage) for stage in STAGES[1:4])
        self.out_channels = _channels(net, "layer3")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(self.layer1(x))).float()


class RoIHead(nn.Module):
    """conv5_x and global average pooling: regions (K, C, 14, 14) to (K, 2C)."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.layer4 = net.get_submodule("layer4")

    keep = False  # the maps of the last regions, in training, for a mask branch
    maps: Tensor | None = None

    def conv5(self, x: Tensor) -> Tensor:
        """Regions (K, C, 14, 14) to maps (K, 2C, 7, 7)."""
        return self.layer4(x).float()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv5(x)
        self.maps = maps if self.keep and self.training else None
        return maps.mean((2, 3))


class Pyramid(nn.Module):
    """A feature pyramid over conv2_x to conv5_x: images to maps of 256 channels at strides 4, 8, 16, 32 and 64."""

    out_channels = PYRAMID

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (net.get_submodule(stage) for stage in STAGES[1:])
        widths = [_channels(net, stage) for stage in STAGES[1:]]
        self.fpn = FeaturePyramidNetwork(widths, PYRAMID, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = OrderedDict()
        for level, stage in enumerate(STAGES[1:]):
            maps[str(level)] = x = getattr(self, stage)(x)
        return OrderedDict((name, value.float()) for name, value in self.fpn(maps).items())


class SharedVGG(nn.Module):
    """VGG-16's convolutions, conv1_1 to conv5_3: images (N, 3, H, W) to (N, 512, H/16, W/16)."""

    out_channels = 512

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features[:-1]  # without the last pooling, which RoI pooling replaces

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).float()


class PerRegionVGG(nn.Module):
    """VGG-16's fc6 and fc7: regions (K, 512, 7, 7) to (K, 4096)."""

    def __init__(self, classifier: nn.Sequential) -> None:
        super().__init__()
        self.classifier = classifier[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.flatten(1)).float()


class ContextHead(RoIHead):
    """conv5_x and global average pooling of regions and of their images, side by side: to (K, 4C)."""

    def forward(self, pooled: Pooled) -> Tensor:  # type: ignore[override]
        regions, context, counts = pooled
        features = super().forward(torch.cat([regions, context]))
        own, wholes = features[: len(regions)], features[len(regions) :]
        beside = [whole.expand(count, -1) for whole, count in zip(wholes, counts, strict=True)]
        return torch.cat([own, torch.cat(beside)], 1)


class Proposals(RPNHead):
    """Its results in float32 also where it computes in bf16, in which a coordinate of 1,000 pixels is off by 4."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, boxes = super().forward(maps)
        return [value.float() for value in objectness], [value.float() for value in boxes]


class Predictor(FastRCNNPredictor):
    """Likewise."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores.float(), boxes.float()


class Detector(FasterRCNN):
    """torchvision's Faster R-CNN, some of whose parts stay as they are.

    Frozen parts get no gradients. Batch norm that `fixed_norm` fixes is an affine map with the statistics of the
    pre-training, in training too.
    """

    frozen: tuple[nn.Module, ...] = ()
    fixed_norm = False

    def freeze(self, last: str | None, *, norm: bool) -> None:
        """Freeze all from the input to the stage `last` (of STAGES) and, with `norm`, batch norm everywhere."""
        self.frozen, self.fixed_norm = _upto(self.backbone, last), norm
        for module in self.frozen:
            module.requires_grad_(False)
        for module in self._norms() if norm else ():
            module.requires_grad_(False)
        self.train(self.training)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; what is frozen stays in the latter."""
        super().train(mode)
        for module in (*self.frozen, *(self._norms() if self.fixed_norm else ())):
            module.eval()
        return self


@dataclass(frozen=True)
class DetectorSettings:
    """What is the same around every backbone.

    `anchors`: the sides of square anchors, in pixels of the resized image; a pyramid takes one of five for each level.
    `proposals`: regions looked at in a test; `regions`: those sampled from an image in training. Images come as
    (3, H, W) in 0 to 1; `mean` is subtracted, what is left divided by `std`, and the shorter side brought to `min_size`
    or, where that would make the longer one longer than `max_size`, that to `max_size`.
    """

    anchors: Sequence[int]
    proposals: int
    regions: int
    min_size: int
    max_size: int
    mean: Sequence[float]
    std: Sequence[float]


def resnet_detector(
    net: ResNet,
    classes: int,
    frame: DetectorSettings,
    *,
    pyramid: bool = False,
    context: bool = False,
    masks: bool = False,
) -> Detector:
    """Faster R-CNN around the convolutions of `net`, an ImageNet net whose classifier is left out.

    `classes`: without the background. `context`: beside a region's features those of its image; not with a pyramid.
    `masks`: with Mask R-CNN's branch, and RoIAlign, which it needs, in place of RoI pooling. Raises ValueError for a
    CIFAR net, and for other than five anchors of a pyramid.
    """
    if not hasattr(net, "layer4"):
        raise ValueError("a CIFAR net has no conv5_x; use an ImageNet net")
    if not pyramid:
        width = _channels(net, "layer4")
        pool = align([STRIDE], 14) if masks else Pool(14, 1 / STRIDE)
        shared, head = C4Backbone(net), ContextHead(net) if context else RoIHead(net)
        seen = ContextPool(pool) if context else pool
        detector = _detector(shared, seen, head, 2 * width if context else width, classes, frame)
        if masks:
            add_mask_branch(detector, classes, pool, width)
        return detector
    if len(frame.anchors) != 5:
        raise ValueError(f"a pyramid has five levels, and takes so many anchors, not {len(frame.anchors)}")
    strides = [4, 8, 16, 32]
    detector = _detector(Pyramid(net), align(strides, 7), TwoMLPHead(PYRAMID * 7 * 7, 1024), 1024, classes, frame)
    if masks:
        add_mask_branch(detector, classes, align(strides, 14), None)
    return detector


def vgg_detector(classes: int, frame: DetectorSettings) -> Detector:
    """The baseline: the same frame around VGG-16 (Ren et al. 2015), initialised from torch's random state.

    Its names are torchvision's: `backbone.features.0.weight`, …, `roi_heads.box_head.classifier.3.bias`.
    """
    net = vgg16(weights=None)
    return _detector(SharedVGG(net.features), Pool(7, 1 / STRIDE), PerRegionVGG(net.classifier), 4096, classes, frame)


def _detector(
    shared: Any, pool: nn.Module, head: nn.Module, width: int, classes: int, frame: DetectorSettings
) -> Detector:
    """The numbers of proposals are Faster R-CNN's (Ren et al. 2015, section 3.3), sampling is torchvision's."""
    levels = [(side,) for side in frame.anchors] if isinstance(shared, Pyramid) else [tuple(frame.anchors)]
    anchors = AnchorGenerator(tuple(levels), (RATIOS,) * len(levels))
    detector = Detector(
        shared,
        min_size=frame.min_size,
        max_size=frame.max_size,
        image_mean=list(frame.mean),
        image_std=list(frame.std),
        rpn_anchor_generator=anchors,
        rpn_head=Proposals(shared.out_channels, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        rpn_post_nms_top_n_train=2_000,
        rpn_post_nms_top_n_test=frame.proposals,
        box_head=head,
        box_predictor=Predictor(width, classes + 1),
        box_nms_thresh=NMS,
        box_batch_size_per_image=frame.regions,
    )
    for part in (detector.rpn, detector.roi_heads):
        usual = part.fg_bg_sampler
        part.fg_bg_sampler = RegionSampler(usual.batch_size_per_image, usual.positive_fraction)
    detector.roi_heads.box_roi_pool = pool  # afterwards: its own check knows of RoIAlign alone
    return detector


def losses_of(masks: bool) -> tuple[str, ...]:
    """The names of a detector's losses."""
    return (*LOSSES, "loss_mask") if masks else LOSSES


def _channels(net: ResNet, stage: str) -> int:
    """The channels that come out of a stage."""
    return [module for module in getattr(net, stage).modules() if isinstance(module, nn.BatchNorm2d)][-1].num_features


def _upto(shared: nn.Module, last: str | None) -> tuple[nn.Module, ...]:
    """The modules from the input to the stage `last`."""
    if last is None:
        return ()
    if isinstance(shared, SharedVGG):
        return tuple(shared.features[: VGG_ENDS[last]])
    return (shared.conv1, shared.bn1, *(getattr(shared, stage) for stage in STAGES[1 : STAGES.index(last) + 1]))

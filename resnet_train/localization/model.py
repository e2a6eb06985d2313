"""A classification net with per-class localization in the place of its classifier (appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import roi_align

from resnet_train.data.augment import normalise
from resnet_train.detection.model import RATIOS
from resnet_train.models.resnet import ResNet

# How boxes are told from what they are moved from: as in Faster R-CNN's two stages.
CODERS = {"rpn": BoxCoder((1.0, 1.0, 1.0, 1.0)), "rcnn": BoxCoder((10.0, 10.0, 5.0, 5.0))}
BETA = 1 / 9  # where smooth L1 turns linear, as in torchvision


class Localizer(nn.Module):
    """The layers of `net` up to its pooling, and two sibling 1x1 layers, cls and reg, each with outputs per class.

    The RPN (`pooled` false) looks at every place of the feature map, with several anchors; R-CNN at a region as a
    whole, behind the pooling, where a 1x1 layer is a fully connected one. Only the outputs of the classes that are
    asked for are computed. Images are (N, H, W, 3) uint8, `labels` (N, K) int64, classes from 0. Gives scores (N, K, P)
    and moves (N, K, P, 4), in float32, for P anchors in the order of `anchors_of`. Batch norm stays as the net has it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: ResNet, classes: int, shapes: int, *, pooled: bool, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """`shapes`: of anchors at a place. `mean` is subtracted from images in 0 to 1, the rest divided by `std`."""
        super().__init__()
        width = net.fc.in_features
        self.net, self.shapes, self.pooled = net, shapes, pooled
        self.net.fc = nn.Identity()  # type: ignore[assignment]
        self.cls, self.reg = nn.Conv2d(width, classes * shapes, 1), nn.Conv2d(width, classes * shapes * 4, 1)
        for layer in (self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(1, 1, 3), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        for norm in self._norms():
            norm.requires_grad_(False)
        self.train(self.training)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; batch norm stays in the latter."""
        super().train(mode)
        for norm in self._norms():
            norm.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = self._features(normalise(images, self.mean, self.std))
        scores, moves = (self._of_classes(layer, features, labels) for layer in (self.cls, self.reg))
        count, classes = labels.shape
        return scores.reshape(count, classes, -1), moves.reshape(count, classes, -1, 4)

    def _features(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
        for stage in net.stages:
            x = net.get_submodule(stage)(x)
        return net.avgpool(x) if self.pooled else x

    def _of_classes(self, layer: nn.Conv2d, features: Tensor, labels: Tensor) -> Tensor:
        """What a 1x1 layer gives for some classes of each image, (N, K, places, outputs of a class), in float32."""
        rows = len(layer.weight) // (len(self.cls.weight) // self.shapes)
        weight = layer.weight.view(-1, rows, features.shape[1])[labels]  # (N, K, rows, C)
        assert layer.bias is not None
        bias = layer.bias.view(-1, rows)[labels]
        outputs = torch.bmm(weight.flatten(1, 2), features.flatten(2)).float()  # (N, K * rows, places)
        return outputs.view(*labels.shape, rows, -1).transpose(2, 3) + bias[:, :, None]


def stride_of(family: str) -> int:
    """The pixels between two places of a net's last feature map."""
    return 32 if family == "imagenet" else 4


def anchors_of(sides: Sequence[int], shape: Sequence[int], stride: int) -> Tensor:
    """The anchors (P, 4) of an image of `shape` (H, W), as the RPN's outputs are ordered: by rows, then by shapes."""
    generator = AnchorGenerator((tuple(sides),), (RATIOS,))
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    grid = [math.ceil(side / stride) for side in shape]
    return generator.grid_anchors([grid], [[torch.tensor(stride), torch.tensor(stride)]])[0]


def loss_parts(scores: Tensor, moves: Tensor, target: dict[str, Tensor]) -> Tensor:
    """The two losses of a batch, of classes and boxes: (2,).

    Scores (N, P) and moves (N, P, 4) of the true class at P places of each image; `target`: which of them are taken
    (`valid`) and which of these are the object (`positive`), (N, P) bool, and where it is (`moves`). Logistic loss of
    all that are taken and smooth L1 of the positive ones, summed and divided by N P, whatever is taken, so that the
    parts of a batch count alike.
    """
    valid, positive = target["valid"], target["positive"]
    cls = F.binary_cross_entropy_with_logits(scores, positive.float(), reduction="none")
    reg = F.smooth_l1_loss(moves, target["moves"], beta=BETA, reduction="none").sum(2)
    return torch.stack([(cls * valid).sum(), (reg * positive).sum()]) / valid.numel()


def warp(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Parts of an image (3, H, W) uint8, cut out and brought to `size`: boxes (n, 4) to (n, S, S, 3) uint8."""
    regions = roi_align(image[None].float(), [boxes.to(torch.float32)], (size, size), aligned=True)
    return regions.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

"""The networks of section 3 and table 1: plain and residual, for CIFAR-10 and for ImageNet.

Module names are torchvision's, so that state dicts are interchangeable: a 50-layer net with option B and the stride in
the 3x3 is torchvision's resnet50.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from resnet_train.models.batchnorm import BatchNorm2d, preserve_statistics

# Table 1: the kind of block and the number of blocks in each stage.
IMAGENET = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def cifar_resnet(
    depth: int,
    shortcut: str = "A",
    *,
    num_classes: int = 10,
    init: str = "fan_in",
    zero_gamma: bool = False,
) -> ResNet:
    """The CIFAR-10 net of section 4.2: 6n+2 layers, stages of 2n 3x3 layers with 16, 32 and 64 filters.

    `shortcut`: A, B, C (section 3.3) or none for the plain net. `init`: He initialisation over fan_in or fan_out.
    Takes images (N, 3, 32, 32), gives logits (N, num_classes). Raises ValueError for a depth that is not 6n+2.
    """
    n, remainder = divmod(depth - 2, 6)
    if n < 1 or remainder:
        raise ValueError(f"depth must be 6n+2, not {depth}")
    return ResNet(BasicBlock, (n, n, n), 16, shortcut, num_classes=num_classes, init=init, zero_gamma=zero_gamma)


def imagenet_resnet(
    depth: int,
    shortcut: str = "B",
    *,
    num_classes: int = 1000,
    bottleneck_stride: str = "1x1",
    init: str = "fan_in",
    zero_gamma: bool = False,
) -> ResNet:
    """The ImageNet net of table 1 with 18, 34, 50, 101 or 152 layers.

    `bottleneck_stride`: where a bottleneck has its stride of 2: 1x1 (the paper and its Caffe release) or 3x3
    (torchvision, "v1.5"). Takes images (N, 3, 224, 224), gives logits (N, num_classes). Raises ValueError for
    another depth or stride.
    """
    if depth not in IMAGENET:
        raise ValueError(f"depth must be one of {list(IMAGENET)}, not {depth}")
    if bottleneck_stride not in ("1x1", "3x3"):
        raise ValueError(f"bottleneck_stride must be 1x1 or 3x3, not {bottleneck_stride}")
    kind, blocks = IMAGENET[depth]
    block = BasicBlock if kind == "basic" else Bottleneck if bottleneck_stride == "3x3" else BottleneckV1
    return ResNet(block, blocks, 64, shortcut, num_classes=num_classes, init=init, zero_gamma=zero_gamma, imagenet=True)


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (batch norm follows), padded to keep the image's size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class PaddedIdentity(nn.Module):
    """Option A where the dimensions change: identity with spatial stride, extra channels zero. No parameters.

    (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride)); the zeros come after the channels.
    """

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The shortcut of one block (section 3.3); None for the identity, and in plain nets, which have no shortcuts.

    A: identity, zero-padded where the dimensions change. B: a projection (1x1 convolution and batch norm) there,
    identity elsewhere. C: a projection everywhere.
    """
    changes = stride != 1 or in_channels != out_channels
    if option == "none" or (option in ("A", "B") and not changes):
        return None
    if option == "A":
        return PaddedIdentity(stride, out_channels - in_channels)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 layers (figure 5, left). Batch norm right after each convolution, ReLU after the addition."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 layers (figure 5, right), the stride in the 3x3 as in torchvision."""

    expansion = 4
    stride_in_1x1 = False

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1, first)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, second)
        self.bn2 = BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = BatchNorm2d(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out)


class BottleneckV1(Bottleneck):
    """The paper's bottleneck: the stride in the first 1x1."""

    stride_in_1x1 = True


class ResNet(nn.Module):
    """The stem, the stages, global average pooling and the classifier; use `cifar_resnet` or `imagenet_resnet`.

    With `recompute`, training keeps only the input of each block, and the backward pass recomputes the rest (Chen et
    al. 2016): less memory for a third more time. As the forward pass then runs twice, batch norm must not update its
    running statistics there: batchnorm.GroupBatchNorm2d.
    """

    recompute = False
    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        width: int,
        shortcut: str,
        *,
        num_classes: int,
        init: str,
        zero_gamma: bool,
        imagenet: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "C", "none"):
            raise ValueError(f"shortcut must be A, B, C or none, not {shortcut}")
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False) if imagenet else conv(3, width, 3)
        self.bn1 = BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        in_channels = width
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            layer = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(block(in_channels, channels, stride, shortcut))
                in_channels = channels * block.expansion
            self.add_module(self.stages[stage], nn.Sequential(*layer))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        self._initialise(init, zero_gamma)

    def _initialise(self, init: str, zero_gamma: bool) -> None:
        # He et al. 2015 ("[13]"): std sqrt(2 / fan), over fan_in in the authors' Caffe. The classifier's weights are
        # PyTorch's default, its bias zero, as in fb.resnet.torch. Batch norm starts as the identity (also its default).
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu")  # type: ignore[arg-type]
            elif isinstance(module, (BasicBlock, Bottleneck)) and zero_gamma:
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)
        nn.init.zeros_(self.fc.bias)

    def freeze(self, last: str) -> None:
        """Freeze all from the input to the stage `last` (conv1, layer1, …): no gradients, no statistics."""
        self.frozen = ("conv1", "bn1", *self.stages[: ["conv1", *self.stages].index(last)])
        for name in self.frozen:
            getattr(self, name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen stages stay in evaluation mode, so that batch norm is constant."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks, from the input on."""
        for stage in self.stages:
            yield from getattr(self, stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        if self.recompute and self.training:
            for block in self.blocks():
                contexts = functools.partial(_first_and_again, block)
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        else:
            for stage in self.stages:
                x = getattr(self, stage)(x)
        features = torch.flatten(self.avgpool(x), 1).to(self.fc.weight.dtype)
        with _full_precision(x.device.type):
            return self.fc(features)


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, for the classifier: logits rounded to bf16 would tie, and the order in topk would count."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward pass and its recomputation: statistics are collected in the first only."""
    return nullcontext(), preserve_statistics(block)


def parameters(model: nn.Module) -> int:
    """The number of parameters (table 6), frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and classifier for one (3, size, size) image (table 1)."""
    model = copy.deepcopy(model).to("meta").eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):  # not counted, and most of the time that counting takes
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2

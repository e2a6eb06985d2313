"""Batch norm: PyTorch's, and one whose statistics are over small groups of images, on any number of devices.

In the paper these were 32 images on each of 8 GPUs for ImageNet, and 64 on each of 2 for CIFAR-10. Here a device may
process several such groups, in one pass or several, and the mathematics is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train.engine.distributed import all_reduce_sum


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batches are counted by `update_statistics`, for all norms in one kernel on a GPU."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class GroupBatchNorm2d(BatchNorm2d):
    """nn.BatchNorm2d over groups of `images` consecutive images; its state dict is the same.

    In training the forward pass does not change the running statistics: it adds mean and (unbiased) variance of each
    group to `sums`, and `update_statistics` updates them once per step. In evaluation it is nn.BatchNorm2d.
    """

    sums: Tensor  # (2, channels)

    def __init__(self, channels: int, images: int) -> None:
        super().__init__(channels)
        self.images = images
        self.register_buffer("sums", torch.zeros(2, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same; in training N is a multiple of `images`."""
        if not self.training:
            return super().forward(x)
        parts = []
        for group in x.split(self.images):
            mean, var = torch.zeros_like(self.sums)  # overwritten by batch_norm with momentum 1
            parts.append(F.batch_norm(group, mean, var, self.weight, self.bias, True, 1.0, self.eps))
            self.sums += torch.stack([mean, var])
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def use_group_batch_norm(model: nn.Module, images: int) -> None:
    """Replace every batch norm of a new `model` by one over groups of `images`, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is BatchNorm2d:
                grouped = GroupBatchNorm2d(child.num_features, images)
                grouped.load_state_dict(child.state_dict())
                setattr(module, name, grouped)


@contextlib.contextmanager
def preserve_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the sums of `model` on exit: a forward pass that is recomputed has already been added to them.

    As the passes do not differ otherwise, compiled code is the same in both.
    """
    sums = [module.sums for module in model.modules() if isinstance(module, GroupBatchNorm2d)]
    saved = [tensor.clone() for tensor in sums]
    try:
        yield
    finally:
        for tensor, value in zip(sums, saved, strict=True):
            tensor.copy_(value)


@torch.no_grad()
def update_statistics(model: nn.Module, groups: int) -> None:
    """Count one step in every batch norm that is not frozen.

    Batch norms over groups also update their running statistics here, towards the mean over the `groups` of the step
    in all processes.
    """
    trained = [module for module in model.modules() if isinstance(module, BatchNorm2d) and module.training]
    if not trained:
        return
    torch._foreach_add_([norm.num_batches_tracked for norm in trained], 1)
    norms = [norm for norm in trained if isinstance(norm, GroupBatchNorm2d)]
    if not norms:
        return
    means = all_reduce_sum(torch.cat([norm.sums.flatten() for norm in norms])).div_(groups)
    running = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    torch._foreach_lerp_(running, means.split([len(buffer) for buffer in running]), norms[0].momentum)
    torch._foreach_zero_([norm.sums for norm in norms])


@torch.no_grad()
def average_statistics(model: nn.Module, passes: Iterable[Tensor], count: int) -> None:
    """Set the running statistics to averages over groups, as in the authors' released models.

    `passes` lazily computes forward passes of `model` in training mode over one group each: this process's share of
    `count`. Sums are in float64, so that the result does not depend on the number of processes.
    """
    was_training = model.training
    model.train()
    norms = [module for module in model.modules() if isinstance(module, GroupBatchNorm2d) and module.training]
    if not norms:  # all of them frozen
        model.train(was_training)
        return
    sums = torch.cat([torch.zeros_like(norm.sums, dtype=torch.float64).flatten() for norm in norms])
    for _ in passes:
        sums += torch.cat([norm.sums.flatten() for norm in norms])
        torch._foreach_zero_([norm.sums for norm in norms])
    running = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    for buffer, mean in zip(running, all_reduce_sum(sums).div_(count).split([len(b) for b in running]), strict=True):
        buffer.copy_(mean)
    model.train(was_training)

"""Errors as counts: (wrong, seen), summed as integers and divided once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train.classification.details import answers
from resnet_train.data.views import Views
from resnet_train.engine.compute import compute_logits
from resnet_train.engine.distributed import all_reduce_sum, for_all_ranks, rank, world_size
from resnet_train.errors import UserError


@dataclass
class Count:
    """The result of one pass over a split: integer counts and the summed loss."""

    wrong: int
    wrong5: int
    seen: int
    loss_sum: float

    @property
    def error(self) -> float:
        """Top-1 error in %."""
        return 100 * self.wrong / self.seen

    @property
    def error5(self) -> float:
        """Top-5 error in %."""
        return 100 * self.wrong5 / self.seen

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.seen


def wrong_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Wrong top-1 and top-5 answers of a batch: (2,) int64 on the device. Labels of -1 are not counted."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    real = labels >= 0
    return torch.stack([(real & ~top[:, 0]).sum(), (real & ~top.any(1)).sum()])


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without gradients; the mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def count_errors(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    size: int,
    answer_rows: list[Tensor] | None = None,
    *,
    skip: bool = False,
) -> Count:
    """Run `model` in evaluation mode over `batches`, which have `size` labels other than -1; only these are counted.

    With `skip` they may have fewer: broken images have -1 too. Each process passes its own share of the batches, and
    all get the same count, that of a single process. The answers of each batch of this process (details.answers) are
    appended to `answer_rows`. Raises UserError if no image is left.
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        outcomes = ((compute_logits(model, images, precision), labels) for images, labels in batches)
        return count(outcomes, size, device, answer_rows, skip=skip)


def count(
    outcomes: Iterable[tuple[Tensor, Tensor]],
    size: int,
    device: torch.device,
    answer_rows: list[Tensor] | None = None,
    *,
    skip: bool = False,
) -> Count:
    """`count_errors` of this process's share of batches of logits (or log-probabilities) and labels."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    losses = []
    for logits, labels in outcomes:
        losses.append(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").double())
        counts += torch.cat([wrong_answers(logits, labels), (labels >= 0).sum()[None]])
        if answer_rows is not None:
            answer_rows.append(answers(logits, labels))
    wrong, wrong5, seen = all_reduce_sum(counts).tolist()
    if not seen:
        raise for_all_ranks(UserError(f"none of the {size} images can be decoded"))
    assert seen == size or skip, f"{seen} images counted of {size}"
    all_losses = torch.zeros(int(all_reduce_sum(torch.tensor(len(losses)))), dtype=torch.float64, device=device)
    if losses:  # ordered by batch, so that their sum does not depend on the number of processes
        all_losses[rank() :: world_size()] = torch.stack(losses)
    return Count(wrong, wrong5, seen, all_reduce_sum(all_losses).sum().item())


def probabilities(model: nn.Module, batches: Iterable[Views], precision: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The softmax of `model`, averaged over the views of each image (section 3.4), with the labels: (N, K), (N,)."""
    with eval_mode(model):
        for views, labels in batches:
            sums: Tensor | None = None
            for images, indices in views:
                scores = compute_logits(model, images, precision).softmax(1)
                sums = scores.new_zeros(len(labels), scores.shape[1]) if sums is None else sums
                sums[indices] += scores.view(-1, len(indices), scores.shape[1]).sum(0)
            assert sums is not None
            yield sums / sums.sum(1, keepdim=True), labels

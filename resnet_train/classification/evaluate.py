"""Errors as counts: (wrong, seen), summed as integers and divided once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train.classification.details import answers, check_places, in_order, write_details
from resnet_train.classification.load import average_batch_norm, load_model, open_dataset, pick_eval_batch
from resnet_train.config.commands import EvalConfig
from resnet_train.config.data import EvalData
from resnet_train.config.layout import check_source
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import PROTOCOLS, Views
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.engine.distributed import (
    all_reduce_sum,
    is_main,
    local_rank_zero_first,
    on_rank_zero,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from resnet_train.errors import UserError
from resnet_train.files import expand, write_result
from resnet_train.models.compile import compile_network
from resnet_train.terminal import say
from resnet_train.weights.source import load


@dataclass
class Count:
    """The outcome of one pass: integer counts and the summed loss."""

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
    """`model` in evaluation mode, without gradients; after it in training mode or not, as it was."""
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
    kept: list[Tensor] | None = None,
) -> Count:
    """Run `model` in evaluation mode over `batches`, whose labels count where they are not -1: `size` of them.

    Of several processes each takes its own share of the batches, and all get the same count, that of one process.
    `kept` is given the answers of each batch of this process (details.answers).
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        outcomes = ((compute_logits(model, images, precision), labels) for images, labels in batches)
        return count(outcomes, size, device, kept)


def count(
    outcomes: Iterable[tuple[Tensor, Tensor]], size: int, device: torch.device, kept: list[Tensor] | None = None
) -> Count:
    """Count this process's share of batches of logits (or log-probabilities) and labels, and add all shares."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    mine = []
    for logits, labels in outcomes:
        mine.append(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").double())
        counts += torch.cat([wrong_answers(logits, labels), (labels >= 0).sum()[None]])
        if kept is not None:
            kept.append(answers(logits, labels))
    wrong, wrong5, seen = all_reduce_sum(counts).tolist()
    assert seen == size, f"{seen} images counted of {size}"
    losses = torch.zeros(int(all_reduce_sum(torch.tensor(len(mine)))), dtype=torch.float64, device=device)
    if mine:  # each loss in its batch's place, so that their sum does not depend on the number of processes
        losses[rank() :: world_size()] = torch.stack(mine)
    return Count(wrong, wrong5, seen, all_reduce_sum(losses).sum().item())


def probabilities(model: nn.Module, batches: Iterable[Views], precision: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The softmax of `model`, averaged over the views of each image (section 3.4), with the labels: (N, K), (N,)."""
    with eval_mode(model):
        for views, labels in batches:
            sums: Tensor | None = None
            for images, whose in views:
                found = compute_logits(model, images, precision).softmax(1)
                sums = found.new_zeros(len(labels), found.shape[1]) if sums is None else sums
                sums[whose] += found.view(-1, len(whose), found.shape[1]).sum(0)
            assert sums is not None
            yield sums / sums.sum(1, keepdim=True), labels


def evaluate_checkpoint(asked: EvalConfig) -> None:
    """The command `resnet-eval`: the error of a checkpoint, or of several together; JSON and one line.

    Under the protocol of training, the count that training reported, from the file alone.
    """
    device = pick_device(asked.device)
    with process_group(device, asked.timeout):
        _evaluate(asked, device)


@dataclass
class Member:
    """A checkpoint to be tested, alone or in an ensemble."""

    path: Path
    config: Config
    state: dict[str, Any]

    def told(self) -> dict[str, Any]:
        """What a result says of it."""
        return checkpoint.describe(self.path, self.config.net, self.config, self.state)


def _evaluate(asked: EvalConfig, device: torch.device) -> None:
    members = [_member(expand(name), asked) for name in asked.checkpoint]
    config = members[0].config
    raise_on_all_ranks(lambda: _check_members(members, asked))
    dataset = local_rank_zero_first(lambda: open_dataset(config))
    known = {member.state["digest"] for member in members} - {""}  # of imported weights nobody knows it
    if known - {dataset.digest} and asked.data.name == "same" and is_main():
        print("note: these are not the images that the checkpoint was trained on", flush=True)
    raise_on_all_ranks(lambda: _check_split(dataset, asked))
    out = expand(asked.out) if asked.out else _default_out(members, dataset, asked)
    kept: list[Tensor] | None = [] if asked.details else None
    if asked.details:
        raise_on_all_ranks(lambda: check_places(out))
    counted, precision, compiled = _counted(members, dataset, asked, device, kept)
    found = None if kept is None else in_order(kept)
    one = len(members) == 1
    result = {
        **(members[0].told() if one else {"net": f"ensemble of {len(members)}"}),
        **({} if one else {"members": [member.told() for member in members]}),
        "data": dataset.label,
        "split": asked.split,
        "protocol": PROTOCOLS.get(asked.protocol, dataset.protocol),
        "image_size": config.data.size,
        "batch_norm": f"averages over {asked.precise_bn} training batches" if asked.precise_bn else "moving averages",
        "wrong": counted.wrong,
        "seen": counted.seen,
        "error": counted.error,
        **({"wrong5": counted.wrong5, "error5": counted.error5} if dataset.top5 else {}),
        "loss": counted.loss,
        "precision": precision,
        "compile": compiled,
        "device": str(device),
    }
    if not is_main():
        return
    what = " + ".join(f"{m.config.net} (seed {m.config.seed}, iteration {m.state['iteration']})" for m in members)
    write_result(out, result)
    say(
        f"{what} on {dataset.label} {asked.split}, {result['protocol']}"
        + (f", batch norm over {asked.precise_bn} batches" if asked.precise_bn else "")
        + f": {counted.wrong} of {counted.seen} wrong, error {counted.error:.2f} %"
        + (f", top-5 {counted.error5:.2f} %" if dataset.top5 else "")
        + f"; {out}"
    )
    if found is not None:  # last: whatever befalls it, what was counted is there
        say(f"what it gets wrong: {write_details(out, what, result, found, dataset)}")


def _member(path: Path, asked: EvalConfig) -> Member:
    state = on_rank_zero(lambda: load(path))
    return Member(
        path, raise_on_all_ranks(lambda: with_data(config_from_checkpoint(state["config"]), asked.data)), state
    )


def _check_members(members: list[Member], asked: EvalConfig) -> None:
    """Refuse an ensemble whose members do not look at the same images. Raises UserError."""
    first = members[0]
    for key in ("name", "root", "family", "size", *(["validation"] if asked.split != "test" else [])):
        for other in members[1:]:
            here, there = getattr(first.config.data, key), getattr(other.config.data, key)
            if here != there:
                raise UserError(
                    f"checkpoint: {first.path} has data.{key}={here} and {other.path} data.{key}={there}; an ensemble"
                    " looks at the same images"
                )
    if asked.protocol != "center" and first.config.data.family == "cifar":
        raise UserError(f"protocol={asked.protocol}: is for ImageNet nets; nets for CIFAR see each image once: center")


def _check_split(dataset: MemoryDataset | StreamingDataset, asked: EvalConfig) -> None:
    if dataset.sizes[asked.split] == 0:
        raise UserError(f"split={asked.split}: no part of the training set was held out; use split=test")


def _counted(
    members: list[Member],
    dataset: MemoryDataset | StreamingDataset,
    asked: EvalConfig,
    device: torch.device,
    kept: list[Tensor] | None,
) -> tuple[Count, str, bool]:
    """The count of all members together, their precision, and whether all were compiled."""
    sums: list[tuple[Tensor, Tensor]] = []
    precisions, compiled, size = set(), True, dataset.sizes[asked.split]
    torch.backends.cudnn.benchmark = asked.protocol != "multiscale"  # whose shapes vary
    for member in members:
        of = member.path, member.config, member.state, dataset.classes, device
        restore = functools.partial(load_model, *of, precise_bn=asked.precise_bn > 0)
        model, mean, precision, compile = raise_on_all_ranks(restore)
        precisions.add(precision)
        if asked.precise_bn:
            images = member.state["measure"]["bn_images"]
            average_batch_norm(model, mean, member.config, images, dataset, asked.precise_bn, precision)
        compile = compile and compile_network(model, member.config.depth, device)
        compiled = compiled and compile
        deal = (asked.split, mean, device, pick_eval_batch(member.config, device), rank(), world_size())
        if len(members) == 1 and asked.protocol == "center":
            return count_errors(model, dataset.eval_batches(*deal), precision, size, kept), precision, compiled
        found = probabilities(model, dataset.eval_views(asked.protocol, *deal), precision)
        if not sums:
            sums = [(p.cpu(), labels.cpu()) for p, labels in found]
        else:
            sums = [(total + p.cpu(), labels) for (total, labels), (p, _) in zip(sums, found, strict=True)]
    means = (((p / len(members)).log(), labels) for p, labels in sums)
    return count(means, size, torch.device("cpu"), kept), " and ".join(sorted(precisions)), compiled


def _default_out(members: list[Member], dataset: MemoryDataset | StreamingDataset, asked: EvalConfig) -> Path:
    """Beside the first checkpoint, named after what was measured."""
    first = members[0]
    words = [first.path.stem] if len(members) == 1 else [f"ensemble-of-{len(members)}"]
    words += [] if dataset.digest == first.state["digest"] else [dataset.label]
    words += [] if asked.protocol == "center" else [asked.protocol]
    words += [f"precise-bn-{asked.precise_bn}"] if asked.precise_bn else []
    return first.path.with_name("-".join([*words, asked.split]) + ".json")


def with_data(config: Config, asked: EvalData) -> Config:
    """The checkpoint's configuration, on the data that the command line names, if any."""
    data = config.data
    if asked.name != "same":
        data = dataclasses.replace(data, name=asked.name, root=None)
    if asked.root is not None:
        data = dataclasses.replace(data, root=asked.root)
    check_source(data.name, data.root)
    return dataclasses.replace(config, data=data)

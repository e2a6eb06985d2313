"""Errors as counts: (wrong, seen), summed as integers and divided once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train import checkpoint
from resnet_train.build import compile_network, logits_of, network, open_sets, pick_device, placed
from resnet_train.config import Config, EvalConfig, check_source, restored
from resnet_train.data.sets import MemorySets, StreamedSets
from resnet_train.distributed import from_main, joined, main, one_after_all, rank, together, total, world
from resnet_train.errors import UserError
from resnet_train.files import expand, write_result
from resnet_train.models.resnet import ResNet


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


@torch.no_grad()
def count_errors(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str, size: int) -> Count:
    """Run `model` in evaluation mode over `batches`, whose labels count where they are not -1: `size` of them.

    Of several processes each takes its own share of the batches, and all get the same count, that of one process.
    Leaves the model in training mode or not, as it was.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    mine = []
    for images, labels in batches:
        logits = logits_of(model, images, precision)
        mine.append(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").double())
        counts += torch.cat([wrong_answers(logits, labels), (labels >= 0).sum()[None]])
    model.train(was_training)
    wrong, wrong5, seen = total(counts).tolist()
    assert seen == size, f"{seen} images counted of {size}"
    losses = torch.zeros(int(total(torch.tensor(len(mine)))), dtype=torch.float64, device=device)
    if mine:  # each loss in its batch's place, so that their sum does not depend on the number of processes
        losses[rank() :: world()] = torch.stack(mine)
    return Count(wrong, wrong5, seen, total(losses).sum().item())


def evaluate_checkpoint(asked: EvalConfig) -> None:
    """The command `resnet-eval`: the count that training reported, from the file alone; JSON and one line."""
    device = pick_device(asked.device)
    with joined(device, asked.timeout):
        _evaluate(asked, device)


def _evaluate(asked: EvalConfig, device: torch.device) -> None:
    path = expand(asked.checkpoint)
    state = from_main(lambda: checkpoint.load(path))
    config = together(lambda: _with_data(restored(state["config"]), asked))
    sets = one_after_all(lambda: open_sets(config))
    model, mean, precision, compiled = together(lambda: _restored(state, config, sets, asked, device))
    if asked.data.name == "same" and sets.digest != state["digest"] and main():
        print("note: these are not the images that the checkpoint was trained on", flush=True)
    if compiled:
        compiled = compile_network(model, config.depth, device)
    batches = sets.eval_batches(asked.split, mean, device, config.eval_batch_size, rank(), world())
    count = count_errors(model, batches, precision, sets.sizes[asked.split])
    result = {
        "checkpoint": str(path.absolute()),
        "net": config.net,
        "data": config.data_label,
        "split": asked.split,
        "protocol": sets.protocol,
        "seed": config.seed,
        "iteration": state["iteration"],
        "iterations": config.iterations,
        "wrong": count.wrong,
        "seen": count.seen,
        "error": count.error,
        **({"wrong5": count.wrong5, "error5": count.error5} if sets.top5 else {}),
        "loss": count.loss,
        "precision": precision,
        "compile": compiled,
        "device": str(device),
    }
    if not main():
        return
    where = "" if sets.digest == state["digest"] else f"-{config.data_label}"
    out = expand(asked.out) if asked.out else path.with_name(f"{path.stem}{where}-{asked.split}.json")
    write_result(out, result)
    print(
        f"{config.net} on {config.data_label} {asked.split} ({sets.protocol}), seed {config.seed}, iteration"
        f" {state['iteration']}: {count.wrong} of {count.seen} wrong, error {count.error:.2f} %"
        + (f", top-5 {count.error5:.2f} %" if sets.top5 else "")
        + f"; {out}"
    )


def _restored(
    state: dict[str, Any], config: Config, sets: MemorySets | StreamedSets, asked: EvalConfig, device: torch.device
) -> tuple[ResNet, Tensor, str, bool]:
    """The checkpoint's net, mean image, precision and whether it was compiled. Raises UserError."""
    if sets.classes != state["classes"]:
        raise UserError(
            f"data: {config.data_label} has the classes {', '.join(sets.classes)[:60]}…, the checkpoint was trained on"
            f" {', '.join(map(str, state['classes']))[:60]}…"
        )
    if asked.split == "val" and sets.sizes["val"] == 0:
        raise UserError("split=val: no part of the training set was held out; take split=test")
    with checkpoint.fitting(asked.checkpoint):
        precision = state["measure"]["precision"]
        model = placed(network(config, len(sets.classes)), device, precision)
        model.load_state_dict(state["model"])
        return model, state["mean"].to(device), precision, state["measure"]["compile"]


def _with_data(config: Config, asked: EvalConfig) -> Config:
    """The checkpoint's configuration, on the data that the command line names, if any."""
    data = config.data
    if asked.data.name != "same":
        data = dataclasses.replace(data, name=asked.data.name, root=None)
    if asked.data.root is not None:
        data = dataclasses.replace(data, root=asked.data.root)
    check_source(data.name, data.root)
    return dataclasses.replace(config, data=data)

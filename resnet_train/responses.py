"""Figure 7: how strongly the 3x3 layers of a trained CIFAR net respond."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_train import paper
from resnet_train.build import logits_of, open_sets, pick_device, pick_eval_batch, restored_net
from resnet_train.config.commands import ResponsesConfig
from resnet_train.config.training import restored
from resnet_train.data.sets import MemorySets
from resnet_train.errors import UserError
from resnet_train.evaluate import Member, testing, with_data
from resnet_train.files import expand, put
from resnet_train.models.resnet import ResNet
from resnet_train.report import figures
from resnet_train.weights import load


def layers(model: ResNet) -> dict[str, nn.Module]:
    """The batch norms after the 3x3 layers of a CIFAR net, in the order of the layers: 6n+1 of them."""
    found: dict[str, nn.Module] = {"bn1": model.bn1}
    for stage in model.stages:
        for number, block in enumerate(getattr(model, stage)):
            found |= {f"{stage}.{number}.{name}": getattr(block, name) for name in ("bn1", "bn2")}
    return found


class Moments:
    """The number, mean and sum of squared distances from the mean of all values seen so far (Chan et al. 1979).

    On the device, in float64; nothing of the values themselves is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add all elements of `values`."""
        variance, mean = torch.var_mean(values.double(), correction=0)
        count = self.count + values.numel()
        distance = mean - self.mean
        self.squares += variance * values.numel() + distance**2 * (self.count * values.numel() / count)
        self.mean += distance * (values.numel() / count)
        self.count = count

    def std(self) -> float:
        """The standard deviation (over n)."""
        return math.sqrt(self.squares.item() / self.count)


@contextlib.contextmanager
def measured(model: ResNet, real: Callable[[], int]) -> Iterator[dict[str, Moments]]:
    """The moments of every layer's response, gathered by forward hooks; of a batch the first `real()` images count."""
    device = next(model.parameters()).device
    moments = {name: Moments(device) for name in layers(model)}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: moments[name].add(output[: real()])

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers(model).items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def response_stds(
    model: ResNet, batches: Iterable[tuple[Tensor, Tensor]], images: int, precision: str
) -> dict[str, float]:
    """The standard deviation of each 3x3 layer's response over the first `images` of `batches`, in one pass.

    `batches` are images (N, 3, H, W) and labels (N,), -1 for what fills the last batch up. In evaluation mode.
    """
    left, real = images, 0
    with testing(model), measured(model, lambda: real) as moments:
        for batch, labels in batches:
            real = min(left, int((labels >= 0).sum()))
            logits_of(model, batch, precision)
            left -= real
            if not left:
                break
    return {name: moment.std() for name, moment in moments.items()}


def responses(asked: ResponsesConfig) -> None:
    """The command `resnet-responses`: both panels of figure 7, and their values as CSV. Raises UserError."""
    device = pick_device(asked.device)
    opened = [_opened(name, asked) for name in asked.checkpoint]  # all, before the first is measured
    rows, found = [], []
    for member in opened:
        state, config = member.state, member.config
        label, stds = _measure(member, asked, device)
        note = paper.shortened(label, config.iterations)
        done = state["iteration"], state["iteration"] == config.iterations
        found.append(figures.Responses(config.net, label, config.seed, list(stds.values()), note, done[1]))
        rows += [
            (config.net, label, config.seed, *done, number, name, std, asked.split, asked.images, note)
            for number, (name, std) in enumerate(stds.items(), 1)
        ]
        mean = sum(stds.values()) / len(stds)
        print(
            f"{config.net} on {label} {asked.split}, seed {config.seed}, iteration {state['iteration']}:"
            f" {len(stds)} layers, {asked.images} images, mean std {mean:.4f}, largest {max(stds.values()):.4f}",
            flush=True,
        )
    out = expand(asked.out)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["net", "data", "seed", "iteration", "finished", "index", "layer", "std", "split", "images", "note"]
    )
    writer.writerows(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures.save(figures.draw_responses(found), out / "figure-7")
        put(out / "responses.csv", text.getvalue().encode())
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from error
    print(f"{out}/figure-7.png, figure-7.svg, responses.csv")


def _opened(name: str, asked: ResponsesConfig) -> Member:
    """A checkpoint and its configuration, on the data that was asked for. Raises UserError for an ImageNet net."""
    path = expand(name)
    state = load(path)
    config = restored(state["config"])
    if config.data.family != "cifar":
        raise UserError(f"checkpoint={name}: holds {config.net} for ImageNet; figure 7 is about CIFAR nets")
    return Member(path, with_data(config, asked.data), state)


def _measure(member: Member, asked: ResponsesConfig, device: torch.device) -> tuple[str, dict[str, float]]:
    """The data's label and the responses of each layer."""
    config = member.config
    sets = open_sets(config)
    assert isinstance(sets, MemorySets)
    model, mean, precision, _ = restored_net(member.path, config, member.state, sets.classes, device)
    size = sets.sizes[asked.split]
    if asked.images > size:
        raise UserError(f"images={asked.images}: {sets.label} {asked.split} has {size}; take fewer")
    batches = sets.eval_batches(asked.split, mean, device, min(pick_eval_batch(config, device), asked.images))
    return sets.label, response_stds(model, batches, asked.images, precision)

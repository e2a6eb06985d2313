"""The signals in a trained CIFAR net: how strongly its 3x3 layers respond (figure 7), and the gradients there."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_train import paper
from resnet_train.classification.evaluate import Member, eval_mode, with_data
from resnet_train.classification.load import load_model, open_dataset, pick_eval_batch
from resnet_train.config.commands import ResponsesConfig
from resnet_train.config.train import config_from_checkpoint
from resnet_train.data.memory import MemoryDataset
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.errors import UserError
from resnet_train.files import expand, put
from resnet_train.models.resnet import ResNet
from resnet_train.report import figures
from resnet_train.terminal import say
from resnet_train.weights.source import load


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
    with eval_mode(model), measured(model, lambda: real) as moments:
        for batch, labels in batches:
            real = min(left, int((labels >= 0).sum()))
            compute_logits(model, batch, precision)
            left -= real
            if not left:
                break
    return {name: moment.std() for name, moment in moments.items()}


@dataclass(frozen=True)
class Signals:
    """What is measured of one checkpoint: values of each 3x3 layer, in layer order."""

    net: str
    data: str  # the label of the data
    seed: int
    iteration: int
    finished: bool
    note: str  # that the training was shortened
    stds: dict[str, float]  # of the responses, by the layers' names
    by_response: list[float]  # norms of the gradients
    by_weights: list[float]
    batch: int  # the images in each batch that gave gradients


def gradient_norms(
    model: ResNet, batches: Iterable[tuple[Tensor, Tensor]], precision: str
) -> tuple[list[float], list[float]]:
    """The L2 norms of the loss's gradients by the response and by the weights of each 3x3 layer (section 4.1).

    `batches` are images (N, 3, H, W) and labels (N,), at least one batch. Batch norm takes their statistics, as in a
    training step; `model` stays as it is. By the response: the gradient of a batch's summed loss by the response to one
    image, as the root mean square over all images. By the weights: that of a batch's mean loss, over all batches.
    """
    model = copy.deepcopy(model).train().requires_grad_(True)
    norms = layers(model)
    parameters = dict(model.named_parameters())
    weights = [parameters[f"{name.replace('bn', 'conv')}.weight"] for name in norms]
    seen: list[Tensor] = []
    for norm in norms.values():
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    squares, count = torch.zeros(2, len(norms), dtype=torch.float64), 0
    for images, labels in batches:
        seen.clear()
        loss = F.cross_entropy(compute_logits(model, images, precision), labels)
        gradients = torch.autograd.grad(loss, [*seen, *weights])
        found = torch.stack([gradient.double().square().sum() for gradient in gradients]).view(2, -1).cpu()
        found[0] *= len(images)  # N^2 for a sum in place of the mean, over N images
        squares += found
        count += 1
    by_response, by_weights = (squares / count).sqrt().tolist()
    return by_response, by_weights


def responses(asked: ResponsesConfig) -> None:
    """The command `resnet-responses`: figure 7 and the norms of the gradients, and their values as CSV.

    Raises UserError.
    """
    device = pick_device(asked.device)
    opened = [_opened(name, asked) for name in asked.checkpoint]  # all, before the first is measured
    measured = []
    for member in opened:
        one = _measure(member, asked, device)
        measured.append(one)
        mean = sum(one.stds.values()) / len(one.stds)
        say(
            f"{one.net} on {one.data} {asked.split}, seed {one.seed}, iteration {one.iteration}:"
            f" {len(one.stds)} layers, {asked.images} images, mean std {mean:.4f}, largest"
            f" {max(one.stds.values()):.4f}; gradients by response {min(one.by_response):.2g} to"
            f" {max(one.by_response):.2g}, by weights {min(one.by_weights):.2g} to {max(one.by_weights):.2g}",
        )
    out = expand(asked.out)

    def lines(values: Callable[[Signals], Sequence[float]]) -> list[figures.Responses]:
        return [
            figures.Responses(one.net, one.data, one.seed, values(one), one.note, one.finished, one.iteration)
            for one in measured
        ]

    try:
        out.mkdir(parents=True, exist_ok=True)
        header = ["net", "data", "seed", "iteration", "finished", "index", "layer"]
        rows = [
            [*_about(one), number, name, std, asked.split, asked.images, one.note]
            for one in measured
            for number, (name, std) in enumerate(one.stds.items(), 1)
        ]
        _put_csv(out / "responses.csv", [*header, "std", "split", "images", "note"], rows)
        rows = [
            [*_about(one), number, *values, asked.split, asked.images // one.batch * one.batch, one.batch, one.note]
            for one in measured
            for number, values in enumerate(zip(one.stds, one.by_response, one.by_weights, strict=True), 1)
        ]
        columns = ["by_response", "by_weights", "split", "images", "batch", "note"]
        _put_csv(out / "gradients.csv", [*header, *columns], rows)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from error
    norms = [lines(lambda one: one.by_response), lines(lambda one: one.by_weights)]
    stds = lines(lambda one: list(one.stds.values()))
    drawn = figures.draw(
        [
            figures.Picture("figure-7", "", lambda: figures.draw_responses(stds)),
            figures.Picture("gradients", "", lambda: figures.draw_gradients(*norms)),
        ],
        out,
    )
    pictures = [f"{one.name}.{kind}" for one in drawn for kind in ("png", "svg")]
    say(f"{out}/{', '.join(['responses.csv', 'gradients.csv', *pictures])}")


def _about(one: Signals) -> list[Any]:
    """What stands in every row of a checkpoint."""
    return [one.net, one.data, one.seed, one.iteration, one.finished]


def _put_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all. Raises OSError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    put(path, text.getvalue().encode())


def _opened(name: str, asked: ResponsesConfig) -> Member:
    """A checkpoint and its configuration, on the data that was asked for. Raises UserError for an ImageNet net."""
    path = expand(name)
    state = load(path)
    config = config_from_checkpoint(state["config"])
    if config.data.family != "cifar":
        raise UserError(f"checkpoint={name}: holds {config.net} for ImageNet; figure 7 is about CIFAR nets")
    return Member(path, with_data(config, asked.data), state)


def _measure(member: Member, asked: ResponsesConfig, device: torch.device) -> Signals:
    config, state = member.config, member.state
    dataset = open_dataset(config)
    assert isinstance(dataset, MemoryDataset)
    model, mean, precision, _ = load_model(member.path, config, state, dataset.classes, device)
    size = dataset.sizes[asked.split]
    if asked.images > size:
        raise UserError(f"images={asked.images}: {dataset.label} {asked.split} has {size}; use fewer")
    batches = dataset.eval_batches(asked.split, mean, device, min(pick_eval_batch(config, device), asked.images))
    stds = response_stds(model, batches, asked.images, precision)
    with checkpoint.checkpoint_errors(member.path):
        batch = min(int(state["measure"]["bn_images"]), asked.images)  # the statistics are as in training
        if batch < 1:
            raise ValueError(f"bn_images {batch}")
    full = itertools.islice(dataset.eval_batches(asked.split, mean, device, batch), asked.images // batch)
    exact = "fp64" if precision == "fp64" else "fp32"  # small gradients vanish in 16 bits
    by_response, by_weights = gradient_norms(model, full, exact)
    return Signals(
        net=config.net,
        data=dataset.label,
        seed=config.seed,
        iteration=state["iteration"],
        finished=state["iteration"] == config.iterations,
        note=paper.shortened(dataset.label, config.iterations),
        stds=stds,
        by_response=by_response,
        by_weights=by_weights,
        batch=batch,
    )

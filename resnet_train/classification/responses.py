"""Responses of the 3x3 layers of a trained CIFAR net (figure 7), and the gradients there."""

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
from resnet_train.classification.command import Member, with_data
from resnet_train.classification.evaluate import eval_mode
from resnet_train.classification.load import check_split, load_model, open_dataset, pick_eval_batch
from resnet_train.config.commands import ResponsesConfig
from resnet_train.config.train import config_from_checkpoint
from resnet_train.data.memory import MemoryDataset
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.errors import UserError, from_write_error
from resnet_train.files import expand, put
from resnet_train.models.resnet import ResNet
from resnet_train.report import figures
from resnet_train.terminal import say
from resnet_train.weights.source import load


def layers(model: ResNet) -> dict[str, nn.Module]:
    """The batch norms after the 3x3 layers of a CIFAR net, in layer order: 6n+1 of them."""
    norms: dict[str, nn.Module] = {"bn1": model.bn1}
    for stage in model.stages:
        for number, block in enumerate(getattr(model, stage)):
            norms |= {f"{stage}.{number}.{name}": getattr(block, name) for name in ("bn1", "bn2")}
    return norms


class Moments:
    """The number, mean and sum of squared distances from the mean of all values seen so far (Chan et al. 1979).

    On the device, in float64; the values themselves are not stored.
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
def record_moments(model: ResNet, real: Callable[[], int]) -> Iterator[dict[str, Moments]]:
    """The moments of every layer's response, collected by forward hooks over the first `real()` images of a batch."""
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

    `batches` are images (N, 3, H, W) and labels (N,), -1 for padding of the last batch. In evaluation mode.
    """
    left, real = images, 0
    with eval_mode(model), record_moments(model, lambda: real) as moments:
        for batch, labels in batches:
            real = min(left, int((labels >= 0).sum()))
            compute_logits(model, batch, precision)
            left -= real
            if not left:
                break
    return {name: moment.std() for name, moment in moments.items()}


@dataclass(frozen=True)
class Signals:
    """The measurements of one checkpoint: values of each 3x3 layer, in layer order."""

    net: str
    data: str  # the label of the data
    seed: int
    iteration: int
    finished: bool
    note: str  # says so if the training was shortened
    stds: dict[str, float]  # of the responses, by layer name
    by_response: list[float]  # norms of the gradients
    by_weights: list[float]
    batch: int  # images per batch for the gradients


def gradient_norms(
    model: ResNet, batches: Iterable[tuple[Tensor, Tensor]], precision: str
) -> tuple[list[float], list[float]]:
    """The L2 norms of the loss's gradients by the response and by the weights of each 3x3 layer (section 4.1).

    `batches` are images (N, 3, H, W) and labels (N,), at least one batch. Batch norm uses their statistics, as in a
    training step; `model` is not changed. By the response: the gradient of a batch's summed loss by the response to one
    image, as the root mean square over all images. By the weights: that of a batch's mean loss, over all batches.
    """
    model = copy.deepcopy(model).train().requires_grad_(True)
    norms = layers(model)
    parameters = dict(model.named_parameters())
    weights = [parameters[f"{name.replace('bn', 'conv')}.weight"] for name in norms]
    responses: list[Tensor] = []
    for norm in norms.values():
        norm.register_forward_hook(lambda module, inputs, output: responses.append(output))
    squares, count = torch.zeros(2, len(norms), dtype=torch.float64), 0
    for images, labels in batches:
        responses.clear()
        loss = F.cross_entropy(compute_logits(model, images, precision), labels)
        gradients = torch.autograd.grad(loss, [*responses, *weights])
        norms_squared = torch.stack([gradient.double().square().sum() for gradient in gradients]).view(2, -1).cpu()
        norms_squared[0] *= len(images)  # N^2 for a sum in place of the mean, over N images
        squares += norms_squared
        count += 1
    by_response, by_weights = (squares / count).sqrt().tolist()
    return by_response, by_weights


def responses(args: ResponsesConfig) -> None:
    """The command `resnet-responses`: figure 7, the norms of the gradients, and the values of both as CSV.

    Raises UserError.
    """
    device = pick_device(args.device)
    members = [_load_member(name, args) for name in args.checkpoint]  # all of them first: errors come early
    results: list[Signals] = []
    for member in members:
        s = _measure(member, args, device)
        for number, other in enumerate(results):
            if _columns(s) == _columns(other):
                same = f"{s.net} on {s.data}, seed {s.seed}, iteration {s.iteration}"
                raise UserError(f"checkpoint={member.path}: is {same}, as is {members[number].path}; use another out=")
        results.append(s)
        mean = sum(s.stds.values()) / len(s.stds)
        say(
            f"{s.net} on {s.data} {args.split}, seed {s.seed}, iteration {s.iteration}:"
            f" {len(s.stds)} layers, {args.images} images, mean std {mean:.4f}, largest"
            f" {max(s.stds.values()):.4f}; gradients by response {min(s.by_response):.2g} to"
            f" {max(s.by_response):.2g}, by weights {min(s.by_weights):.2g} to {max(s.by_weights):.2g}",
        )
    out = expand(args.out)

    def lines(values: Callable[[Signals], Sequence[float]]) -> list[figures.Responses]:
        return [figures.Responses(s.net, s.data, s.seed, values(s), s.note, s.finished, s.iteration) for s in results]

    try:
        out.mkdir(parents=True, exist_ok=True)
        header = ["net", "data", "seed", "iteration", "finished", "index", "layer"]
        rows = [
            [*_columns(s), number, name, std, args.split, args.images, s.note]
            for s in results
            for number, (name, std) in enumerate(s.stds.items(), 1)
        ]
        _put_csv(out / "responses.csv", [*header, "std", "split", "images", "note"], rows)
        rows = [
            [*_columns(s), number, *values, args.split, args.images // s.batch * s.batch, s.batch, s.note]
            for s in results
            for number, values in enumerate(zip(s.stds, s.by_response, s.by_weights, strict=True), 1)
        ]
        columns = ["by_response", "by_weights", "split", "images", "batch", "note"]
        _put_csv(out / "gradients.csv", [*header, *columns], rows)
    except OSError as error:
        raise from_write_error(f"out={out}: cannot be written", error) from error
    norms = [lines(lambda s: s.by_response), lines(lambda s: s.by_weights)]
    stds = lines(lambda s: list(s.stds.values()))
    drawn = figures.draw(
        [
            figures.Picture("figure-7", "", lambda: figures.draw_responses(stds)),
            figures.Picture("gradients", "", lambda: figures.draw_gradients(*norms)),
        ],
        out,
    )
    pictures = [f"{picture.name}.{kind}" for picture in drawn for kind in ("png", "svg")]
    say(f"{out}/{', '.join(['responses.csv', 'gradients.csv', *pictures])}")


def _columns(signals: Signals) -> list[Any]:
    """The first columns of every row of a checkpoint."""
    return [signals.net, signals.data, signals.seed, signals.iteration, signals.finished]


def _put_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all. Raises OSError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    put(path, text.getvalue().encode())


def _load_member(name: str, args: ResponsesConfig) -> Member:
    """Load a checkpoint, with the data of the command line. Raises UserError for an ImageNet net."""
    path = expand(name)
    state = load(path)
    config = config_from_checkpoint(state["config"])
    if config.data.family != "cifar":
        raise UserError(f"checkpoint={name}: holds {config.net} for ImageNet; figure 7 is about CIFAR nets")
    return Member(path, with_data(config, args.data), state)


def _measure(member: Member, args: ResponsesConfig, device: torch.device) -> Signals:
    config, state = member.config, member.state
    dataset = open_dataset(config)
    assert isinstance(dataset, MemoryDataset)
    model, mean, precision, _ = load_model(member.path, config, state, dataset.classes, device)
    check_split(dataset, args.split)
    size = dataset.sizes[args.split]
    if args.images > size:
        raise UserError(f"images={args.images}: {dataset.label} {args.split} has {size}; use fewer")
    batches = dataset.eval_batches(args.split, mean, device, min(pick_eval_batch(config, device), args.images))
    stds = response_stds(model, batches, args.images, precision)
    with checkpoint.checkpoint_errors(member.path):
        batch = min(state["measure"]["bn_images"], args.images)  # the statistics are as in training
    full = itertools.islice(dataset.eval_batches(args.split, mean, device, batch), args.images // batch)
    exact = "fp64" if precision == "fp64" else "fp32"  # small gradients vanish in 16 bits
    by_response, by_weights = gradient_norms(model, full, exact)
    return Signals(
        net=config.net,
        data=dataset.label,
        seed=config.seed,
        iteration=state["iteration"],
        finished=state["iteration"] == config.iterations,
        note=paper.shortened(dataset.label, config.data.family, config.iterations),
        stds=stds,
        by_response=by_response,
        by_weights=by_weights,
        batch=batch,
    )

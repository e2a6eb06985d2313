"""The command `resnet-eval`: the error of a checkpoint, or of several together."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.classification.details import check_places, in_order, write_details
from resnet_train.classification.evaluate import Count, count, count_errors, probabilities
from resnet_train.classification.load import (
    average_batch_norm,
    check_split,
    load_model,
    open_dataset,
    pick_eval_batch,
    trained_in_blocks,
)
from resnet_train.config.commands import EVAL_RESULT, EvalConfig
from resnet_train.config.data import EvalData
from resnet_train.config.layout import check_source, count_unreadable, files_for_test
from resnet_train.config.run_dir import name_of_members
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import PROTOCOLS
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import pick_device
from resnet_train.engine.distributed import (
    is_main,
    local_rank_zero_first,
    on_rank_zero,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from resnet_train.errors import UserError
from resnet_train.files import check_replaceable, expand, write_result
from resnet_train.models.compile import compile_network
from resnet_train.terminal import say
from resnet_train.weights.source import load


def evaluate_checkpoint(args: EvalConfig) -> None:
    """The command `resnet-eval`: the error of a checkpoint or of an ensemble, as JSON and one line.

    With the protocol of training it gives the same count as training did.
    """
    device = pick_device(args.device)
    with process_group(device, args.timeout):
        _evaluate(args, device)


@dataclass
class Member:
    """A checkpoint to evaluate, alone or in an ensemble."""

    path: Path
    config: Config
    state: dict[str, Any]

    @property
    def trained(self) -> bool:
        """Whether its seed and iterations are those of a training: another program's weights do not say."""
        return self.config.recipe != "imported" or self.state["iteration"] > 0

    @property
    def title(self) -> str:
        """The net and, where known, of which run and when."""
        run = f"seed {self.config.seed}, iteration {self.state['iteration']}" if self.trained else "imported"
        return f"{self.config.net} ({run})"

    def describe(self) -> dict[str, Any]:
        """The entries of a result file that name the checkpoint."""
        unknown: dict[str, Any] = {} if self.trained else dict.fromkeys(("seed", "iteration", "iterations"))
        return checkpoint.describe(self.path, self.config.net, self.config, self.state) | unknown


def _evaluate(args: EvalConfig, device: torch.device) -> None:
    members = [_load_member(expand(name), args) for name in args.checkpoint]
    config = members[0].config
    raise_on_all_ranks(lambda: _check_members(members, args))
    dataset = local_rank_zero_first(lambda: open_dataset(config))
    raise_on_all_ranks(lambda: _check_parts(dataset, args))
    if is_main():
        _note_other_data(members, dataset, args)
    out = expand(args.out) if args.out else _default_out(members, dataset, args)
    raise_on_all_ranks(lambda: check_replaceable(out, EVAL_RESULT))
    batch_answers: list[Tensor] | None = [] if args.details else None
    if args.details:
        raise_on_all_ranks(lambda: check_places(out))
    counts, precision, compiled = _count_members(members, dataset, args, device, batch_answers)
    answer_rows = None if batch_answers is None else in_order(batch_answers, dataset.sizes[args.split])
    alone, unreadable = len(members) == 1, len(dataset.unreadable.get("test" if args.split == "test" else "train", ()))
    unreadable += dataset.sizes[args.split] - counts.seen  # of photographs, known only as they are read
    result = {
        **(members[0].describe() if alone else {"net": f"ensemble of {len(members)}"}),
        **({} if alone else {"members": [member.describe() for member in members]}),
        "data": dataset.label,
        "digest": dataset.digest if dataset.sizes["train"] else None,  # it is of both parts
        "split": args.split,
        "protocol": PROTOCOLS.get(args.protocol, dataset.protocol),
        "image_size": config.data.size,
        "batch_norm": f"averages over {args.precise_bn} training batches" if args.precise_bn else "moving averages",
        "wrong": counts.wrong,
        "seen": counts.seen,
        **({"unreadable": unreadable} if unreadable else {}),
        "error": counts.error,
        **({"wrong5": counts.wrong5, "error5": counts.error5} if dataset.top5 else {}),
        "loss": counts.loss,
        "precision": precision,
        "compile": compiled,
        "device": str(device),
    }
    if not is_main():
        return
    title = " + ".join(member.title for member in members)
    write_result(out, result)
    say(
        f"{title} on {dataset.label} {args.split}, {result['protocol']}"
        + (f", batch norm over {args.precise_bn} batches" if args.precise_bn else "")
        + f": {counts.wrong} of {counts.seen} wrong, error {counts.error:.2f} %"
        + (f", top-5 {counts.error5:.2f} %" if dataset.top5 else "")
        + "".join(f"; {words}" for words in (count_unreadable(unreadable), str(out)) if words)
    )
    if answer_rows is not None:  # last: if it fails, the result is already written
        say(f"what it gets wrong: {write_details(out, title, result, answer_rows, dataset)}")


def _load_member(path: Path, args: EvalConfig) -> Member:
    state = on_rank_zero(lambda: load(path))
    return Member(
        path, raise_on_all_ranks(lambda: with_data(config_from_checkpoint(state["config"]), args.data)), state
    )


def _check_members(members: list[Member], args: EvalConfig) -> None:
    """Raises UserError for an ensemble whose members are not evaluated on the same images, or of other classes."""
    first = members[0]
    for key in ("name", "root", "family", "size", *(["validation"] if args.split != "test" else [])):
        for other in members[1:]:
            here, there = getattr(first.config.data, key), getattr(other.config.data, key)
            if here != there:
                raise UserError(
                    f"checkpoint: {first.path} has data.{key}={here} and {other.path} data.{key}={there}; an ensemble"
                    " looks at the same images"
                )
    for other in members[1:]:
        if first.state["classes"] != other.state["classes"]:
            raise UserError(
                f"checkpoint: {first.path} and {other.path} have different classes; an ensemble's"
                " nets have the same, in the same order"
            )
    if args.protocol != "center" and first.config.data.family == "cifar":
        raise UserError(f"protocol={args.protocol}: is for ImageNet nets; nets for CIFAR see each image once: center")


def _check_parts(dataset: MemoryDataset | StreamingDataset, args: EvalConfig) -> None:
    check_split(dataset, args.split)
    if args.precise_bn and not dataset.sizes["train"]:
        alone = f"{dataset.label} has a test part alone"
        raise UserError(f"precise_bn={args.precise_bn}: needs training images, and {alone}")


def _note_other_data(members: list[Member], dataset: MemoryDataset | StreamingDataset, args: EvalConfig) -> None:
    """Say that the images are not those of the training, and that of an undivided tree only a fifth is tested."""
    digests = {member.state["digest"] for member in members} - {""}  # imported weights have none
    whole = dataset.sizes["train"] > 0  # a digest is of both parts
    if whole and digests - {dataset.digest} and args.data.name == "same":
        say("note: these are not the images that the checkpoint was trained on")
    data, sizes = members[0].config.data, dataset.sizes
    if args.data != EvalData("same", None) and args.split == "test" and files_for_test(data.name, data.root):
        taken = f"{sizes['test']} of {sum(sizes.values())} images"
        say(f"note: {data.root} has no train/ and test/: the fifth that training would hold out is tested, {taken}")


def _count_members(
    members: list[Member],
    dataset: MemoryDataset | StreamingDataset,
    args: EvalConfig,
    device: torch.device,
    answer_rows: list[Tensor] | None,
) -> tuple[Count, str, bool]:
    """The errors of all members as an ensemble, their precision, and whether all were compiled."""
    sums: list[tuple[Tensor, Tensor]] = []
    precisions, compiled, size = set(), True, dataset.sizes[args.split]
    # One for all, since their scores are added batch by batch.
    batch_size = min(pick_eval_batch(member.config, device) for member in members)
    skip = members[0].config.data.broken == "skip"
    fixed = args.protocol != "multiscale"  # else shapes vary, and nothing is chosen or compiled for each
    torch.backends.cudnn.benchmark = fixed
    for member in members:
        loading = member.path, member.config, member.state, dataset.classes, device
        restore = functools.partial(load_model, *loading, precise_bn=args.precise_bn > 0)
        model, mean, precision, was_compiled = raise_on_all_ranks(restore)
        precisions.add(precision)
        if args.precise_bn:
            images = member.state["measure"]["bn_images"]
            average_batch_norm(model, mean, member.config, images, dataset, args.precise_bn, precision)
        blocks = trained_in_blocks(member.state, model, member.config)
        compiled &= bool(was_compiled) and fixed and compile_network(model, device, blocks=blocks)
        share = (args.split, mean, device, batch_size, rank(), world_size())
        if len(members) == 1 and args.protocol == "center":
            batches = dataset.eval_batches(*share)
            return count_errors(model, batches, precision, size, answer_rows, skip=skip), precision, compiled
        outcomes = probabilities(model, dataset.eval_views(args.protocol, *share), precision)
        if not sums:
            sums = [(scores.cpu(), labels.cpu()) for scores, labels in outcomes]
        else:
            sums = [(total + scores.cpu(), labels) for (total, labels), (scores, _) in zip(sums, outcomes, strict=True)]
    means = (((scores / len(members)).log(), labels) for scores, labels in sums)
    counts = count(means, size, torch.device("cpu"), answer_rows, skip=skip)
    return counts, " and ".join(sorted(precisions)), compiled


def _default_out(members: list[Member], dataset: MemoryDataset | StreamingDataset, args: EvalConfig) -> Path:
    """The default `out`: beside the first checkpoint, named after what is evaluated."""
    first = members[0]
    words = [name_of_members([member.path for member in members])]
    words += [] if dataset.digest == first.state["digest"] else [f"{dataset.label}-{dataset.digest[:6]}"]
    words += [] if args.protocol == "center" else [args.protocol]
    words += [f"precise-bn-{args.precise_bn}"] if args.precise_bn else []
    return first.path.with_name("-".join([*words, args.split]) + ".json")


def with_data(config: Config, eval_data: EvalData) -> Config:
    """The checkpoint's configuration with the data of the command line, if given."""
    data = config.data
    if eval_data.name != "same":
        data = dataclasses.replace(data, name=eval_data.name, root=None)
    if eval_data.root is not None:
        data = dataclasses.replace(data, root=eval_data.root)
    try:
        check_source(data.name, data.root, train=False)
    except UserError as error:
        if data.root != config.data.root:
            raise
        raise UserError(f"{error}; the net was trained on these data: data.root= says where they lie here") from error
    return dataclasses.replace(config, data=data)

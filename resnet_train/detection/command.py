"""The command `resnet-detect test`: the average precision of a checkpoint, or of several together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_train.config.boxes import name_elsewhere
from resnet_train.config.detection import (
    TEST_RESULT,
    DetectConfig,
    DetectTestConfig,
    config_from_checkpoint,
    with_test_data,
)
from resnet_train.config.run_dir import name_of_members, plain_word
from resnet_train.config.schema import format_value
from resnet_train.detection.annotations import Examples
from resnet_train.detection.build import build_like_checkpoint
from resnet_train.detection.ensemble import Ensemble
from resnet_train.detection.evaluate import check_shape, evaluate
from resnet_train.detection.metrics import in_words
from resnet_train.detection.model import Detector
from resnet_train.detection.multiscale import longest
from resnet_train.detection.refine import VOTERS
from resnet_train.detection.run import read_test
from resnet_train.detection.train import PROTOCOL
from resnet_train.engine import checkpoint
from resnet_train.engine.boxes import fault_lines, restore
from resnet_train.engine.compute import pick_device
from resnet_train.engine.distributed import is_main, on_rank_zero, process_group, raise_on_all_ranks
from resnet_train.engine.limits import most_workers
from resnet_train.errors import UserError
from resnet_train.files import check_replaceable, expand, write_result
from resnet_train.terminal import say


@dataclass
class Member:
    """A checkpoint to be tested, alone or in an ensemble."""

    path: Path
    config: DetectConfig
    state: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            **checkpoint.describe(self.path, self.config.net, self.config, self.state),
            "min_size": self.config.min_size,
            "max_size": self.config.max_size,
            "proposals": self.config.proposals,
        }


def evaluate_checkpoints(args: DetectTestConfig) -> None:
    """Print and write the average precision of one checkpoint, or of several as an ensemble. Raises UserError.

    With nothing switched on, the figures that training logged, from the file and the pictures alone.
    """
    device = pick_device(args.device)
    with process_group(device, args.timeout):
        _evaluate(args, device)


def _evaluate(args: DetectTestConfig, device: torch.device) -> None:
    members = [_member(expand(name), args) for name in args.checkpoint]
    first, one = members[0], len(members) == 1
    raise_on_all_ranks(lambda: _check_members(members, args.scales))
    examples = raise_on_all_ranks(lambda: _read(members, args.scales or []))
    models, precisions = zip(*raise_on_all_ranks(lambda: [_restore(member, device) for member in members]), strict=True)
    out = expand(args.out) if args.out else _default_out(members, args)
    raise_on_all_ranks(lambda: check_replaceable(out, TEST_RESULT))
    start = time.perf_counter()
    measured, _ = evaluate(
        Ensemble(models, precisions, refine=args.refine, scales=args.scales or ()),
        examples.test,
        classes=examples.classes,
        category_ids=examples.category_ids,
        precision="fp32",  # around each member's own
        device=device,
        workers=min(first.config.data.workers, most_workers()),
        skip=first.config.data.broken == "skip",
    )
    result = {
        **(first.describe() if one else {"net": f"ensemble of {len(members)}"}),
        **({} if one else {"members": [member.describe() for member in members]}),
        "data": first.config.data_label,
        "root": str(expand(first.config.data.root or "").resolve()),
        "list": first.config.data.test,
        "images": len(examples.test) - measured.get("skipped", 0),
        "boxes": sum(len(example.boxes) for example in examples.test),
        "faults": examples.faults,
        "protocol": _protocol(args, len(members)),
        "refine": args.refine,
        "scales": args.scales,
        **measured,
        "precision": " and ".join(sorted(set(precisions))),
        "device": str(device),
        "seconds": time.perf_counter() - start,
    }
    if is_main():
        write_result(out, result)
        say(_line(members, examples, result, out))
        if first.config.data.test in first.config.data.train:
            say(f"note: data.test={first.config.data.test} is a list that the detector was trained on")
        for line in fault_lines(examples):
            say(f"note: {line}")


def _member(path: Path, args: DetectTestConfig) -> Member:
    state = on_rank_zero(lambda: checkpoint.load_without_momentum(path, kind="detector"))
    config = raise_on_all_ranks(lambda: with_test_data(config_from_checkpoint(state["config"]), args.data))
    return Member(path, config, state)


def _check_members(members: list[Member], scales: list[int] | None) -> None:
    """Refuse an ensemble whose members are not of the same classes and pictures. Raises UserError."""
    first = members[0]
    if first.config.masks and scales:
        raise UserError(f"scales={format_value(scales)}: {first.path} finds masks, which is for one scale; remove it")

    def known(member: Member) -> dict[str, Any]:
        data, config = member.config.data, member.config
        same = {"classes": member.state["classes"], "masks": config.masks}
        same |= {"pyramid": config.pyramid} if config.masks else {}  # its masks have other sizes
        return {**same, "data.root": data.root, "data.test": data.test}

    for other in members[1:]:
        for key, here in known(first).items():
            if here != (there := known(other)[key]):
                raise UserError(
                    f"checkpoint: {first.path} has {key}={format_value(here)} and {other.path}"
                    f" {key}={format_value(there)}; an ensemble has the same in all its members"
                )


def _read(members: list[Member], scales: list[int]) -> Examples:
    """The pictures, once each member is seen to be able to look at them. Raises UserError."""
    first = members[0]
    examples = read_test(first.config, first.state["classes"])
    for least, most in {(member.config.min_size, member.config.max_size) for member in members}:
        for size in sorted({least, *scales}):
            for example in examples.test:
                shape = example.height, example.width
                check_shape(str(example.path), shape, size, longest(size, least, most))
    return examples


def _restore(member: Member, device: torch.device) -> tuple[Detector, str]:
    """The detector and the precision that it was trained in. Raises UserError."""
    model, _ = build_like_checkpoint(member.config, member.state)
    return restore(model, member.state, device)


def _protocol(args: DetectTestConfig, count: int) -> str:
    """How the images are looked at, in words."""
    words = [PROTOCOL]
    words += [f"{count} detectors on the union of their proposals, averaged"] if count > 1 else []
    listed = ", ".join(map(str, args.scales or []))
    words += [f"regions at two of the scales {listed}, where their area is nearest to 224x224"] if args.scales else []
    words += [f"boxes refined once, votes from an overlap of {VOTERS}"] if args.refine else []
    return "; ".join(words)


def _default_out(members: list[Member], args: DetectTestConfig) -> Path:
    """Beside the first checkpoint, named after what was measured."""
    first = members[0]
    words = [name_of_members([member.path for member in members])]
    words += name_elsewhere(first.config, config_from_checkpoint(first.state["config"]))
    words += ["refine"] if args.refine else []
    words += ["scales", *map(str, args.scales)] if args.scales else []
    return first.path.with_name("-".join([*words, plain_word(first.config.data.test)]) + ".json")


def _line(members: list[Member], examples: Examples, result: dict[str, Any], out: Path) -> str:
    what = " + ".join(f"{m.config.net} (seed {m.config.seed}, iteration {m.state['iteration']})" for m in members)
    figures = in_words(result, members[0].config.data.name)
    return (
        f"{what} on {result['data']} {result['list']}, {result['protocol']}: {figures}, on {result['images']} images;"
        f" {out}"
    )

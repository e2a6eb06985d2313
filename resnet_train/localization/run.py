"""The command `resnet-localize`: from a configuration to a trained RPN or R-CNN."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.config.localization import LocalizeConfig
from resnet_train.data.sampler import generator
from resnet_train.detection.build import precision_of
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import pick_precision, sgd, to_device
from resnet_train.engine.distributed import all_reduce_sum, is_main, raise_on_all_ranks, rank, world_size
from resnet_train.engine.run import check_compute, run
from resnet_train.errors import UserError
from resnet_train.localization.build import KIND, build_like_checkpoint, build_new, load_trained
from resnet_train.localization.find import Trained, dense_sides, look, propose
from resnet_train.localization.loader import whole_images
from resnet_train.localization.train import LOSSES, Data, LocalizationTask
from resnet_train.localization.tree import Localized, Photos, read_tree
from resnet_train.terminal import say


def localize(config: LocalizeConfig, directory: Path) -> int:
    """Train in `directory`, resuming a run that was cut there. The exit code and errors of `engine.run.run`."""
    return run(config, directory, command="resnet-localize", open_data=open_data, build=build, kind=KIND)


def open_data(config: LocalizeConfig) -> Data:
    """The images and boxes that the configuration names, and for R-CNN what the RPN proposes. Raises UserError."""
    device = raise_on_all_ranks(lambda: check_compute(config.batch_size, config.device, config.precision))
    photos = raise_on_all_ranks(lambda: read_tree(Path(config.data.root or ""), broken=config.data.broken))
    if config.stage == "rpn":
        return Data(photos, photos.digest)
    rpn, digest = raise_on_all_ranks(lambda: _load_rpn(Path(config.rpn or ""), photos, device))
    if is_main():
        say(f"proposals of the RPN for {len(photos.train)} training images")
    mine = raise_on_all_ranks(lambda: _proposals(config, rpn, photos.train, device))
    return Data(photos, digest, rpn, all_reduce_sum(mine))


def _load_rpn(path: Path, photos: Localized, device: torch.device) -> tuple[Trained, str]:
    """The RPN in a checkpoint, and the digest of the images together with its weights. Raises UserError."""
    state = checkpoint.load(path, kind=KIND)
    rpn, _, _ = load_trained(path, state, "rpn", device)
    check_classes(f"rpn={path}", state["classes"], photos.classes)
    digest = hashlib.sha256(photos.digest.encode())
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return rpn, digest.hexdigest()


def check_classes(name: str, theirs: list[str], ours: list[str], what: str = "the data") -> None:
    """Refuse a checkpoint of other classes than those of `what`. Raises UserError."""
    if theirs != ours:
        odd = min(set(theirs) ^ set(ours), default="the same in another order")
        raise UserError(f"{name}: has other classes than {what}, such as {odd}")


def _proposals(config: LocalizeConfig, rpn: Trained, photos: Photos, device: torch.device) -> Tensor:
    """The likeliest regions of the true class in this process's part of the images: (images, n, 4), else zeros.

    In the whole image at the scales of the dense test: of one scale alone, R-CNN would not see parts of objects, which
    the larger ones propose. Where there are fewer than n, or an
    image is broken and skipped, the rest is NaN. Raises UserError for one that is broken otherwise.
    """
    found = torch.zeros(len(photos), config.proposals, 4)
    mine = range(rank(), len(photos), world_size())
    found[mine.start :: world_size()] = torch.nan
    data, skip = config.data, config.data.broken == "skip"
    for example, image in whole_images(photos, mine, workers=data.workers, skip=skip, device=device):
        label = torch.tensor([int(example.labels[0]) - 1], device=device)
        boxes, scores = look(rpn, image, label, dense_sides(rpn.crop, None))
        regions = propose(boxes[0], scores[0], config.proposals, image.shape[1:])
        found[example.image_id - 1, : len(regions)] = regions.cpu()
    return found


def build(
    config: LocalizeConfig, data: Data, device: torch.device, state: dict[str, Any] | None = None
) -> LocalizationTask:
    """The localizer and its optimiser, from a checkpoint's `state`, if given, else as they begin. Raises UserError."""
    precision = pick_precision(config.precision, device)
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    if state is not None:
        model, around = build_like_checkpoint(config, state)
        with checkpoint.checkpoint_errors(state["path"]):
            precision = precision_of(state)
    else:
        model, around = build_new(config, len(data.photos.classes))
    model = to_device(model, device, precision)
    learnt = {"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": config.weight_decay}
    task = LocalizationTask(
        config=config,
        device=device,
        precision=precision,
        data=data,
        around=around,
        model=model,
        net=model,
        optimizer=sgd([learnt], lr=config.lr, momentum=config.momentum, precision=precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        losses=torch.zeros(world_size(), len(LOSSES), dtype=torch.float64, device=device),
    )
    if state is not None:
        with checkpoint.checkpoint_errors(state["path"]):
            task.load(state)
    return task

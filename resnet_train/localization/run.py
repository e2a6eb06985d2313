"""The command `resnet-localize`: from a configuration to a trained RPN or R-CNN."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resnet_train.config.localization import LocalizeConfig
from resnet_train.data.cache import cache_folder, keep
from resnet_train.data.sampler import generator
from resnet_train.engine import checkpoint
from resnet_train.engine.boxes import begin
from resnet_train.engine.distributed import all_reduce_sum, is_main, raise_on_all_ranks, rank, world_size
from resnet_train.engine.run import check_compute, run
from resnet_train.errors import UserError
from resnet_train.localization.build import KIND, build_like_checkpoint, build_new, load_predictor
from resnet_train.localization.loader import whole_images
from resnet_train.localization.predict import Predictor, dense_sides, propose, score_anchors
from resnet_train.localization.train import LOSSES, Data, LocalizationTask
from resnet_train.localization.tree import Localized, Photos, check_classes, read_tree
from resnet_train.terminal import say
from resnet_train.weights.source import read_source

ROUND = 4096  # images between two synchronisations of the processes, as waiting for longer would time out


def localize(config: LocalizeConfig, directory: Path) -> int:
    """Train in `directory`, or resume the run there. Exit code and errors as in `engine.run.run`."""
    last = directory / "checkpoints" / "last.pt"

    def opened(config: LocalizeConfig) -> Data:
        return open_data(config, begun=config.resume == "auto" and last.exists())

    return run(config, directory, command="resnet-localize", open_data=opened, build=build, kind=KIND)


def open_data(config: LocalizeConfig, *, begun: bool = False) -> Data:
    """The images and boxes that the configuration names, and for R-CNN what the RPN proposes.

    `begun`: whether a checkpoint exists, so that `init_from` is not needed. Raises UserError.
    """
    device = raise_on_all_ranks(lambda: check_compute(config.batch_size, config.device, config.precision))
    photos = raise_on_all_ranks(lambda: read_tree(Path(config.data.root or ""), broken=config.data.broken))
    if config.stage == "rpn":
        return Data(**vars(photos))
    rpn, digest = raise_on_all_ranks(lambda: _load_rpn(Path(config.rpn or ""), photos, device))
    if not begun:  # an error should appear before hours of work
        raise_on_all_ranks(lambda: read_source(Path(config.init_from)))
    proposals = _proposals(config, rpn, photos.train, digest, device)
    return Data(**vars(photos) | {"digest": digest}, rpn=rpn, proposals=proposals)


def _load_rpn(path: Path, photos: Localized, device: torch.device) -> tuple[Predictor, str]:
    """The RPN in a checkpoint, and the digest of the images together with its weights. Raises UserError."""
    state = checkpoint.load(path, kind=KIND)
    rpn, _, _ = load_predictor(state, "rpn", device)
    check_classes(f"rpn={path}", state["classes"], photos.classes)
    digest = hashlib.sha256(photos.digest.encode())
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return rpn, digest.hexdigest()


def _proposals(config: LocalizeConfig, rpn: Predictor, photos: Photos, digest: str, device: torch.device) -> Tensor:
    """The likeliest regions of the true class in each image, (images, n, 4), from the cache folder or computed.

    They are cached so that a resumed run trains on the same ones, as their order depends on the number of threads. They
    come from the whole image at the scales of the dense test: the larger scales propose parts of objects, which R-CNN
    must see. If an image has fewer than n, or is broken and skipped, the rest is NaN. Raises UserError for a broken
    image that is not skipped.
    """
    shape = len(photos), config.proposals, 4
    key = f"{digest} {config.proposals} {rpn.crop} {rpn.anchors} {rpn.precision}"
    path = cache_folder() / "proposals" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    cached = _read_proposals(path, shape) if is_main() else None
    proposals = torch.zeros(shape) if cached is None else cached
    if int(all_reduce_sum(torch.tensor(int(cached is not None)))):
        return all_reduce_sum(proposals)
    if is_main():
        say(f"proposals of the RPN for {len(photos)} training images")
    with tqdm(total=len(photos), desc="proposals", leave=False, disable=None if is_main() else True) as bar:
        for start in range(0, len(photos), ROUND):
            part = range(start, min(start + ROUND, len(photos)))
            raise_on_all_ranks(functools.partial(_propose_in, config, rpn, photos, part, device, proposals))
            bar.update(len(part))
    proposals = all_reduce_sum(proposals)
    if is_main() and proposals[:, 0].isfinite().all():  # an unreadable image may be repaired later
        keep(path, proposals)
    return proposals


def _read_proposals(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The cached proposals; None if there are none of this shape."""
    with contextlib.suppress(UserError):
        proposals = checkpoint.read(path)
        if isinstance(proposals, Tensor) and proposals.shape == shape and proposals.dtype == torch.float32:
            return proposals
    return None


def _propose_in(
    config: LocalizeConfig, rpn: Predictor, photos: Photos, part: range, device: torch.device, proposals: Tensor
) -> None:
    """Write to `proposals` the RPN's proposals for this process's share of the images in `part`."""
    share, skip = part[rank() :: world_size()], config.data.broken == "skip"
    proposals[share.start : share.stop : world_size()] = torch.nan
    for example, image in whole_images(photos, share, workers=config.data.workers, skip=skip, device=device):
        label = torch.tensor([int(example.labels[0]) - 1], device=device)
        boxes, scores = score_anchors(rpn, image, label, dense_sides(rpn.crop, None))
        regions = propose(boxes[0], scores[0], config.proposals, image.shape[1:])
        proposals[example.image_id - 1, : len(regions)] = regions.cpu()


def build(
    config: LocalizeConfig, data: Data, device: torch.device, state: dict[str, Any] | None = None
) -> LocalizationTask:
    """Build the localizer and its optimiser, new or from the `state` of a checkpoint. Raises UserError."""
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    if state is None:
        model, backbone = build_new(config, len(data.classes))
    else:
        model, backbone = build_like_checkpoint(config, state)
    return begin(LocalizationTask, config, model, device, state, LOSSES, data=data, backbone=backbone)

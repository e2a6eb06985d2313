"""Training batches: which crops, anchors and regions is a function of seed, iteration and place in the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

from resnet_train.data.crops import resized_part, scaled_box
from resnet_train.data.decode import ImageError
from resnet_train.data.sampler import batch_indices, generator
from resnet_train.data.views import skip_broken
from resnet_train.detection.annotations import Example, load
from resnet_train.detection.loader import loaded, mirrored, tell_skipped, test_images
from resnet_train.localization.model import CODERS, warp
from resnet_train.localization.tree import Photos

ANCHORS = 8  # of an image, half of them positive where there are as many
MATCH = Matcher(0.7, 0.3, allow_low_quality_matches=True)  # Faster R-CNN's overlaps for positive and negative
OVERLAP = 0.5  # of a region with an object, from which on it is positive
LEFT = 0.25  # the part of a box that a crop must hold for it to be learnt
SHORTER = (256, 480)  # what an image's shorter side is brought to for crops of 224


class Item(NamedTuple):
    """An image of a batch: (S, S, 3) uint8, its class from 0, and what is learnt at P places of it."""

    image: Tensor
    label: int
    places: Tensor  # (P,) int64: anchors
    target: dict[str, Tensor]  # as `loss_parts` takes it: (P,) and (P, 4)


class Batch(NamedTuple):
    """Items as tensors with one dimension more, and the lines about images that could not be read."""

    images: Tensor
    labels: Tensor
    places: Tensor
    target: dict[str, Tensor]
    broken: list[str]


class Crops:
    """What the RPN learns from: random crops, and some anchors of each."""

    def __init__(self, anchors: Tensor, size: int, flip: bool) -> None:
        """`anchors`: (P, 4), of a crop of `size`."""
        self.anchors, self.size, self.flip = anchors, size, flip

    def item(self, example: Example, _: int, __: int, draw: torch.Generator) -> Item:
        """A crop of an image. Raises UserError."""
        low, high = (round(side * self.size / 224) for side in SHORTER)
        side, place = int(torch.randint(low, high + 1, (), generator=draw)), torch.rand(2, generator=draw).tolist()
        flip = bool(torch.rand((), generator=draw) < 0.5) and self.flip
        top, left, edge, _ = scaled_box(example.height, example.width, size=self.size, side=side, place=place)
        image = resized_part(load(example).permute(1, 2, 0), (top, left, edge, edge), self.size)
        boxes = (example.boxes - torch.tensor([left, top, left, top])) * (self.size / edge)
        whole, inside = box_area(boxes), clip_boxes_to_image(boxes, (self.size, self.size))
        boxes = inside[box_area(inside) >= LEFT * whole]
        if flip:
            image, boxes = image.flip(1), mirrored(boxes, self.size)
        return Item(image, int(example.labels[0]) - 1, *sample(boxes, self.anchors, draw))


def sample(boxes: Tensor, anchors: Tensor, draw: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Eight anchors and what is learnt of them: four positive ones and four negative ones.

    As in Faster R-CNN an anchor is positive at an overlap of 0.7 or more with a box, and where none has more with that
    box, and negative below 0.3 with all. Where fewer than four are positive, as many are negative, so that both stay
    equally many; where none is, four.
    """
    matched = torch.full((len(anchors),), MATCH.BELOW_LOW_THRESHOLD)
    if len(boxes):
        overlap = box_iou(boxes, anchors)
        matched = torch.where(overlap.amax(0) > 0, MATCH(overlap), matched)  # the best of no overlap is none
    order = torch.randperm(len(anchors), generator=draw)
    positive = order[matched[order] >= 0][: ANCHORS // 2]
    negative = order[matched[order] == MATCH.BELOW_LOW_THRESHOLD][: len(positive) or ANCHORS // 2]
    chosen = torch.cat([positive, negative])
    places = torch.zeros(ANCHORS, dtype=torch.int64)
    places[: len(chosen)] = chosen
    ranks = torch.arange(ANCHORS)
    moves = torch.zeros(ANCHORS, 4)
    moves[: len(positive)] = CODERS["rpn"].encode_single(boxes[matched[positive]], anchors[positive])
    return places, {"valid": ranks < len(chosen), "positive": ranks < len(positive), "moves": moves}


class Regions:
    """What R-CNN learns from: regions that the RPN has proposed, each cut out of its image and warped."""

    def __init__(self, proposals: Tensor, size: int, flip: bool) -> None:
        """`proposals`: (images, n, 4); where an image has fewer than n, the rest is NaN."""
        self.proposals, self.size, self.flip = proposals, size, flip

    def item(self, example: Example, index: int, place: int, draw: torch.Generator) -> Item:
        """A region of an image: at even places of the batch a positive one, at odd ones a negative one, if there is."""
        regions = self.proposals[index]
        regions = regions[regions.isfinite().all(1)]
        if not len(regions):
            raise ImageError(f"{example.path}: could not be read when regions were proposed")
        overlap, best = box_iou(regions, example.boxes).max(1)
        positive = overlap >= OVERLAP
        wanted = torch.nonzero(positive == (place % 2 == 0))[:, 0]
        among = wanted if len(wanted) else torch.arange(len(regions))
        chosen = among[torch.randint(len(among), (1,), generator=draw)]
        image, region, box = load(example), regions[chosen], example.boxes[best[chosen]]
        if bool(torch.rand((), generator=draw) < 0.5) and self.flip:
            image, region, box = image.flip(2), mirrored(region, example.width), mirrored(box, example.width)
        target = {"valid": torch.ones(1, dtype=torch.bool), "positive": positive[chosen]}
        target["moves"] = CODERS["rcnn"].encode_single(box, region)
        label = int(example.labels[0]) - 1
        return Item(warp(image, region, self.size)[0], label, torch.zeros(1, dtype=torch.int64), target)


class _Training(Dataset[Batch]):
    """This process's share of the batch of each iteration."""

    def __init__(
        self, photos: Photos, kind: Crops | Regions, seed: int, batch_size: int, skip: bool, rank: int, world: int
    ) -> None:
        self.photos, self.kind, self.seed, self.batch_size = photos, kind, seed, batch_size
        self.skip, self.rank, self.world = skip, rank, world

    def __getitem__(self, iteration: int) -> Batch:
        indices = batch_indices(self.seed, iteration, self.batch_size, len(self.photos)).tolist()
        seeds = torch.randint(2**62, (self.batch_size,), generator=generator(self.seed, "crops", iteration)).tolist()
        items, lines = [], list[str]()
        for place in range(self.rank, self.batch_size, self.world):
            read = functools.partial(self._read, place=place, seed=seeds[place])
            item, broken = skip_broken(read, indices[place], len(self.photos), skip=self.skip)
            items.append(item)
            lines += broken.splitlines()
        images, labels, places, targets = zip(*items, strict=True)
        target = {name: torch.stack([one[name] for one in targets]) for name in targets[0]}
        return Batch(torch.stack(images), torch.tensor(labels), torch.stack(places), target, lines)

    def _read(self, index: int, place: int, seed: int) -> Item:
        """What is learnt of an image at a place of a batch."""
        return self.kind.item(self.photos[index], index, place, torch.Generator().manual_seed(seed))


def whole_images(
    photos: Photos, indices: range, *, workers: int, skip: bool, device: torch.device
) -> Iterator[tuple[Example, Tensor]]:
    """The images at `indices`, (3, H, W) uint8 on `device`, in order.

    A broken one stops all with its name or, with `skip`, is told of and left out. Raises UserError.
    """
    part = photos.part(indices)
    for example, image in zip(part, test_images(part, workers=workers, device=device, skip=skip), strict=True):
        if isinstance(image, str):
            tell_skipped([image])
        else:
            yield example, image


def training_batches(
    photos: Photos,
    kind: Crops | Regions,
    *,
    seed: int,
    batch_size: int,
    iterations: range,
    workers: int,
    skip: bool,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """This process's share of the batches of `iterations`, on `device`.

    A broken image stops all with its name or, with `skip`, the next one stands in. Raises UserError.
    """
    data = _Training(photos, kind, seed, batch_size, skip, rank, world)
    for images, labels, places, target, broken in loaded(data, iterations, workers, device):
        on_device = [value.to(device, non_blocking=True) for value in (images, labels, places)]
        moved = {name: value.to(device, non_blocking=True) for name, value in target.items()}
        yield Batch(on_device[0], on_device[1], on_device[2], moved, broken)

"""The images of each batch, and the generators of random numbers for augmentation.

Both are functions of the seed, the iteration and the index in the batch, so that resumed runs and runs on another
number of processes see the same images.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, count: int) -> torch.Generator:
    """A CPU generator seeded by its arguments only."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{count}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


WINDOW = 16  # shards whose images are shuffled together


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int, blocks: tuple[int, ...] = ()) -> Tensor:
    """The order of the training images in the given pass: (size,) int64.

    If images are stored in shards, whose sizes are `blocks`, the shards are taken in random order and the images are
    shuffled within windows of several shards, so that reads are local.
    """
    rng = generator(seed, "order", epoch)
    if not blocks:
        return torch.randperm(size, generator=rng)
    shards = torch.arange(size).split(list(blocks))
    order = torch.randperm(len(shards), generator=rng).tolist()
    windows = [torch.cat([shards[n] for n in order[start : start + WINDOW]]) for start in range(0, len(shards), WINDOW)]
    return torch.cat([window[torch.randperm(len(window), generator=rng)] for window in windows])


def batch_indices(seed: int, iteration: int, batch_size: int, size: int, blocks: tuple[int, ...] = ()) -> Tensor:
    """The images of one batch: (batch_size,) int64. `blocks` as in `permutation`.

    Batches are cut from an endless sequence of permutations and may span two of them, so that every batch is full and
    every image is used once per permutation: 64,000 batches of 128 are 163.84 passes over 50,000 images.
    """
    parts, position, missing = [], iteration * batch_size, batch_size
    while missing:
        epoch, offset = divmod(position, size)
        part = permutation(seed, epoch, size, blocks)[offset : offset + missing]
        parts.append(part)
        position, missing = position + len(part), missing - len(part)
    return torch.cat(parts)


def held_out(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The indices of the training part and of the `count` images held out, the same for every seed."""
    order = torch.randperm(size, generator=generator(0, "held out", size))
    return order[count:].sort().values, order[:count].sort().values

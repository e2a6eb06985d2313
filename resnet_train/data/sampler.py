"""Which images make up a batch, and the random numbers that change them.

All of it is a function of the seed, the iteration and the place in the batch: a resumed run and one on another number
of processes see the same images.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, count: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{count}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


WINDOW = 16  # shards whose images are shuffled together


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int, blocks: tuple[int, ...] = ()) -> Tensor:
    """The order of the training images in the given pass: (size,) int64.

    Where images lie together in shards, of so many as `blocks` says, the shards are taken in random order and the
    images shuffled within windows of several shards, so that what is read lies close together.
    """
    draw = generator(seed, "order", epoch)
    if not blocks:
        return torch.randperm(size, generator=draw)
    shards = torch.arange(size).split(list(blocks))
    order = torch.randperm(len(shards), generator=draw).tolist()
    windows = [torch.cat([shards[n] for n in order[start : start + WINDOW]]) for start in range(0, len(shards), WINDOW)]
    return torch.cat([window[torch.randperm(len(window), generator=draw)] for window in windows])


def batch_indices(seed: int, iteration: int, batch_size: int, size: int, blocks: tuple[int, ...] = ()) -> Tensor:
    """The images of one batch: (batch_size,) int64. `blocks` as in `permutation`.

    Batches are cut from an endless sequence of permutations and may straddle passes, so that every batch is full and
    every image comes once per permutation: 64,000 batches of 128 are 163.84 passes over 50,000 images.
    """
    parts, place, missing = [], iteration * batch_size, batch_size
    while missing:
        epoch, offset = divmod(place, size)
        part = permutation(seed, epoch, size, blocks)[offset : offset + missing]
        parts.append(part)
        place, missing = place + len(part), missing - len(part)
    return torch.cat(parts)


def held_out(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The indices of the training part and of the `count` images held out, by a permutation that no seed changes."""
    order = torch.randperm(size, generator=generator(0, "held out", size))
    return order[count:].sort().values, order[:count].sort().values

"""Which anchors and regions of an image the losses look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from resnet_train.data.sampler import generator


class RegionSampler(BalancedPositiveNegativeSampler):
    """torchvision's, drawn for each image from a seed of its own, so that other images of a process have no say.

    Without `seeds` all are drawn from torch's state, as they come. `positive`: of the regions sampled last, image by
    image, whether each has an object.
    """

    seeds: Sequence[int] = ()
    positive: Tensor

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each image, whose boxes have labels (n,), masks (n,) of the positive and of the negative ones."""
        positive, negative = [], []
        for place, labels in enumerate(matched_idxs):
            if self.seeds:
                torch.manual_seed(self.seeds[place])
            (with_object,), (without,) = super().__call__([labels])
            positive.append(with_object)
            negative.append(without)
        sampled = [(one | other).bool() for one, other in zip(positive, negative, strict=True)]
        self.positive = torch.cat([one[taken].bool() for one, taken in zip(positive, sampled, strict=True)])
        return positive, negative


def seeds(seed: int, purpose: str, iteration: int, places: range) -> list[int]:
    """A seed for each of the images at `places` of a batch, whichever process has them."""
    return [generator(seed, f"{purpose} of image {place}", iteration).initial_seed() for place in places]

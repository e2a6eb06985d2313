"""Augmentation of a whole batch at once, on the device that holds it. Images are uint8, NHWC."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # channel averages, in 0 to 255
IMAGENET_STD = (0.229, 0.224, 0.225)  # in units of the full range, as fb.resnet.torch and torchvision have both
GREY = (0.299, 0.587, 0.114)  # what red, green and blue give to grey
# Krizhevsky et al. 2012, "[21]": principal components of ImageNet's RGB values in 0 to 1 (columns: eigenvectors).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def mean_image(images: Tensor) -> Tensor:
    """The per-pixel mean of (N, H, W, 3) uint8 images: (H, W, 3) float32, in 0 to 255."""
    return (images.sum(0, dtype=torch.int64).double() / len(images)).float()


def normalise(images: Tensor, mean: Tensor, std: Tensor | None = None) -> Tensor:
    """(N, H, W, 3) minus `mean`, in units of the full range: (N, 3, H, W) float32, channels last; float64 as the mean.

    A mean image of another size than theirs gives its channel averages. Divided by `std` (1, 3, 1, 1), if given.

    Section 4.2 subtracts the mean and divides by no standard deviation; 1/255 is a unit, not a statistic.
    """
    if mean.shape[-3:-1] not in (images.shape[1:3], (1, 1)):
        mean = mean.mean((0, 1))
    found = images.to(torch.promote_types(mean.dtype, torch.float32)).sub_(mean).mul_(1 / 255).permute(0, 3, 1, 2)
    return found if std is None else found / std.to(found)


def draw_crops(generator: torch.Generator, count: int, pad: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random offsets from 0 to 2 `pad`, both included, and flips, for `count` images: three (count,) tensors."""
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator).bool()
    return tops, lefts, flips if flip else torch.zeros_like(flips)


def pad_and_mirror(images: Tensor, pad: int) -> Tensor:
    """Images (N, H, W, C) with `pad` zeros on each side, as they are and mirrored: (2, N, H + 2 pad, W + 2 pad, C)."""
    count, height, width, channels = images.shape
    padded = images.new_zeros(2, count, height + 2 * pad, width + 2 * pad, channels)
    inside = padded[:, :, pad : pad + height, pad : pad + width]
    inside[0], inside[1] = images, images.flip(2)
    return padded


def crop_and_normalise(
    images: Tensor, padded_mean: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, pad: int
) -> Tensor:
    """Subtract the mean, pad `pad` zeros on each side, crop to the old size at the offsets, flip.

    (N, H, W, 3) uint8 to (N, 3, H, W) float32, channels last. The zeros come after the mean: padded image minus
    padded mean is the padded difference, so both are cropped alike and one subtraction does for all. `padded_mean` is
    `pad_and_mirror` of the mean image, made once.
    """
    count, height, width, channels = images.shape
    down, across = height + 2 * pad, width + 2 * pad
    lefts = torch.where(flips, 2 * pad - lefts, lefts)  # the offset in the mirrored image
    rows = (tops[:, None] + torch.arange(height, device=images.device)) * across + lefts[:, None]

    def crop(padded: Tensor, which: Tensor) -> Tensor:
        """The crop of the image `which` of `padded` for each place.

        A crop is `height` rows, each of which lies in one piece in memory. `unfold` shows the padded images as all the
        rows that begin at some pixel, without a copy, and `index_select` copies those of the crops.
        """
        runs = padded.flatten().unfold(0, width * channels, channels)
        begins = which[:, None] * (down * across) + rows
        return runs.index_select(0, begins.flatten()).view(count, height, width, channels)

    which = torch.arange(count, device=images.device) + count * flips
    return normalise(crop(pad_and_mirror(images, pad), which), crop(padded_mean, flips.long()))


def flip_some(images: Tensor, flips: Tensor) -> Tensor:
    """(N, H, W, 3) with those mirrored where `flips` (N,) is true."""
    places = torch.arange(len(images), device=images.device)
    return torch.cat([images, images.flip(2)]).index_select(0, places + len(images) * flips)


def colour_noise(images: Tensor, alphas: Tensor) -> Tensor:
    """Add the principal components of colour, weighted by `alphas` (N, 3) times their eigenvalues (section 3.4).

    Images are (N, 3, H, W) in units of the full range, on any device; each gets one colour shift for all its pixels.
    `alphas` are on the CPU, so that nothing but the shifts travels and nothing waits.
    """
    parts = (alphas * torch.tensor(EIGENVALUES))[:, :, None] * torch.tensor(EIGENVECTORS).T
    shifts = parts[:, 0] + parts[:, 1] + parts[:, 2]  # a matrix product rounds otherwise for other numbers of images
    return images + shifts.to(images.device, non_blocking=True)[:, :, None, None]


def draw_jitter(generator: torch.Generator, count: int, strength: float) -> tuple[Tensor, Tensor]:
    """The order of brightness (0), contrast (1) and saturation (2) for each image, and the factors: (count, 3) each."""
    order = torch.rand(count, 3, generator=generator).argsort(1)
    return order, 1 + strength * (2 * torch.rand(count, 3, generator=generator) - 1)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """fb.resnet.torch's colour jitter: images (N, H, W, 3), in 0 to 255 and not clipped, in float32.

    Each is blended with black, with its mean grey and with its own grey, in the `order` and by the `factors` (N, 3)
    that `draw_jitter` gives for it.
    """
    images = images.float()
    for step in range(3):
        which, factor = order[:, step, None, None, None], factors[:, step, None, None, None]
        red, green, blue = images.unbind(3)
        grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[..., None]
        target = torch.where(which == 1, grey.mean((1, 2), keepdim=True), torch.where(which == 2, grey, 0.0))
        images = images * factor + target * (1 - factor)
    return images

"""Augmentation of whole batches, on their device. Images are uint8, NHWC."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # channel averages, in 0 to 255
IMAGENET_STD = (0.229, 0.224, 0.225)  # in 0 to 1; both as in fb.resnet.torch and torchvision
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue
# Krizhevsky et al. 2012, "[21]": principal components of ImageNet's RGB values in 0 to 1 (columns: eigenvectors).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def mean_image(images: Tensor) -> Tensor:
    """The per-pixel mean of (N, H, W, 3) uint8 images: (H, W, 3) float32, in 0 to 255."""
    return (images.sum(0, dtype=torch.int64).double() / len(images)).float()


def normalise(images: Tensor, mean: Tensor, std: Tensor | None = None) -> Tensor:
    """(N, H, W, 3) minus `mean`, scaled by 1/255: (N, 3, H, W) float32, or float64 if `mean` is; channels last.

    A mean image of another size is replaced by its channel averages. Divided by `std` (1, 3, 1, 1), if given.

    Section 4.2 subtracts the mean but does not divide by a standard deviation; 1/255 is only a change of units.
    """
    if mean.shape[-3:-1] not in (images.shape[1:3], (1, 1)):
        mean = mean.mean((0, 1))
    scaled = images.to(torch.promote_types(mean.dtype, torch.float32)).sub_(mean).mul_(1 / 255).permute(0, 3, 1, 2)
    return scaled if std is None else scaled / std.to(scaled)


def draw_crops(generator: torch.Generator, count: int, pad: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random offsets from 0 to 2 `pad`, inclusive, and flips for `count` images: three (count,) tensors."""
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator).bool()
    return tops, lefts, flips if flip else torch.zeros_like(flips)


def pad_and_mirror(images: Tensor, pad: int) -> Tensor:
    """Images (N, H, W, C) padded with `pad` zeros, unchanged and mirrored: (2, N, H + 2 pad, W + 2 pad, C)."""
    count, height, width, channels = images.shape
    padded = images.new_zeros(2, count, height + 2 * pad, width + 2 * pad, channels)
    interior = padded[:, :, pad : pad + height, pad : pad + width]
    interior[0], interior[1] = images, images.flip(2)
    return padded


def crop_and_normalise(
    images: Tensor, padded_mean: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, pad: int
) -> Tensor:
    """Subtract the mean, pad with `pad` zeros on each side, crop to the original size at the offsets, flip.

    (N, H, W, 3) uint8 to (N, 3, H, W) float32, channels last. The mean is subtracted before padding; as padded image
    minus padded mean is the padded difference, both are cropped alike and then subtracted. `padded_mean` is
    `pad_and_mirror` of the mean image.
    """
    count, height, width, channels = images.shape
    down, across = height + 2 * pad, width + 2 * pad
    lefts = torch.where(flips, 2 * pad - lefts, lefts)  # the offset in the mirrored image
    rows = (tops[:, None] + torch.arange(height, device=images.device)) * across + lefts[:, None]

    def crop(padded: Tensor, which: Tensor) -> Tensor:
        """For each place in the batch, the crop of the image `which` of `padded`.

        A crop is `height` rows, each contiguous in memory. `unfold` is a view of the padded images as the rows that
        begin at each pixel, and `index_select` copies the rows of the crops.
        """
        runs = padded.flatten().unfold(0, width * channels, channels)
        begins = which[:, None] * (down * across) + rows
        return runs.index_select(0, begins.flatten()).view(count, height, width, channels)

    which = torch.arange(count, device=images.device) + count * flips
    return normalise(crop(pad_and_mirror(images, pad), which), crop(padded_mean, flips.long()))


def flip_some(images: Tensor, flips: Tensor) -> Tensor:
    """Images (N, H, W, 3), mirrored where `flips` (N,) is true."""
    positions = torch.arange(len(images), device=images.device)
    return torch.cat([images, images.flip(2)]).index_select(0, positions + len(images) * flips)


def colour_noise(images: Tensor, alphas: Tensor) -> Tensor:
    """Add the principal components of colour, weighted by `alphas` (N, 3) times their eigenvalues (section 3.4).

    Images are (N, 3, H, W) in units of the full range, on any device; each gets one colour shift for all its pixels.
    `alphas` are on the CPU: only the shifts are copied to the device, and nothing waits for it.
    """
    parts = (alphas * torch.tensor(EIGENVALUES))[:, :, None] * torch.tensor(EIGENVECTORS).T
    shifts = parts[:, 0] + parts[:, 1] + parts[:, 2]  # the rounding of a matrix product depends on N
    return images + shifts.to(images.device, non_blocking=True)[:, :, None, None]


def draw_jitter(generator: torch.Generator, count: int, strength: float) -> tuple[Tensor, Tensor]:
    """The order of brightness (0), contrast (1) and saturation (2) for each image, and the factors: (count, 3) each."""
    order = torch.rand(count, 3, generator=generator).argsort(1)
    return order, 1 + strength * (2 * torch.rand(count, 3, generator=generator) - 1)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """fb.resnet.torch's colour jitter of images (N, H, W, 3) in 0 to 255: float32, not clipped.

    Each image is blended with black, with its mean grey and with its grey version, in the `order` and by the `factors`
    (N, 3) of `draw_jitter`.
    """
    images = images.float()
    for step in range(3):
        which, factor = order[:, step, None, None, None], factors[:, step, None, None, None]
        red, green, blue = images.unbind(3)
        grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[..., None]
        target = torch.where(which == 1, grey.mean((1, 2), keepdim=True), torch.where(which == 2, grey, 0.0))
        images = images * factor + target * (1 - factor)
    return images

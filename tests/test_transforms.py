"""Batched augmentation against the definition for one image, written out."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from resnet_train.data.augment import (
    EIGENVALUES,
    EIGENVECTORS,
    colour_jitter,
    colour_noise,
    crop_and_normalise,
    draw_crops,
    draw_jitter,
    flip_some,
    mean_image,
    normalise,
    pad_and_mirror,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, height=32, width=32):
    return torch.randint(0, 256, (count, height, width, 3), generator=seeded(count), dtype=torch.uint8)


def mean_of(height=32, width=32):
    """A mean image that no pixel of a batch equals."""
    return torch.rand(height, width, 3, generator=seeded(1)) * 200 + 20.25


def one_by_one(batch, mean, tops, lefts, flips, pad):
    """Section 4.2 for each image: minus the mean, zeros around it, crop, flip."""
    done = []
    for image, top, left, flip in zip(batch, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True):
        padded = TF.pad(((image.float() - mean) / 255).permute(2, 0, 1), [pad, pad, pad, pad])
        crop = TF.crop(padded, top, left, *image.shape[:2])
        done.append(TF.horizontal_flip(crop) if flip else crop)
    return torch.stack(done)


def every_view(pad):
    """All offsets with and without flip: three tensors."""
    views = torch.tensor(list(itertools.product(range(2 * pad + 1), range(2 * pad + 1), (0, 1))))
    return views[:, 0], views[:, 1], views[:, 2].bool()


@pytest.mark.parametrize(
    ("height", "width", "pad"), [(32, 32, 4), (20, 20, 0), (20, 20, 3), (9, 14, 2), (15, 8, 1), (8, 8, 16)]
)
def test_every_crop_is_the_definition_for_one_image(height, width, pad):
    tops, lefts, flips = every_view(pad)
    assert len(tops) == 2 * (2 * pad + 1) ** 2
    batch, mean = images(len(tops), height, width), mean_of(height, width)
    found = crop_and_normalise(batch, pad_and_mirror(mean[None], pad), tops, lefts, flips, pad)
    assert found.shape == (len(tops), 3, height, width)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(batch, mean, tops, lefts, flips, pad), rtol=1e-6, atol=1e-7)


def test_margins_are_exactly_zero_and_nothing_else_is():
    tops, lefts, flips = every_view(4)
    found = crop_and_normalise(images(len(tops)), pad_and_mirror(mean_of()[None], 4), tops, lefts, flips, 4)
    for view, top, left, flip in zip(found, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[max(0, 4 - top) : 36 - top, max(0, 4 - left) : 36 - left] = True
        inside = inside.flip(1) if flip else inside
        assert torch.equal(view != 0, inside.expand(3, -1, -1))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_output_is_channels_last(count):
    batch, zeros = images(count), torch.zeros(count, dtype=torch.int64)
    for found in (
        crop_and_normalise(batch, pad_and_mirror(mean_of()[None], 4), zeros, zeros, zeros.bool(), 4),
        normalise(batch, mean_of()),
        colour_noise(normalise(batch, mean_of()), torch.randn(count, 3, generator=seeded())),
    ):
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_middle_crop_is_normalise():
    middle = torch.full((5,), 4)
    found = crop_and_normalise(images(5), pad_and_mirror(mean_of()[None], 4), middle, middle, torch.zeros(5).bool(), 4)
    assert torch.equal(found, normalise(images(5), mean_of()))


def test_normalise_is_minus_the_mean_over_255():
    batch, mean = images(3, 5, 7), mean_of(5, 7)
    reference = ((batch.double() - mean.double()) / 255).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(normalise(batch, mean), reference, rtol=1e-6, atol=1e-7)
    channels = mean[:1, :1]
    reference = ((batch.double() - channels.double()) / 255).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(normalise(batch, channels), reference, rtol=1e-6, atol=1e-7)


def test_no_argument_is_changed():
    batch, mean, (tops, lefts, flips) = images(4), mean_of(), draw_crops(seeded(), 4, 4, True)
    alphas, floats = torch.ones(4, 3), normalise(batch, mean)
    arguments = (batch, mean, tops, lefts, flips, alphas, floats)
    before = [argument.clone() for argument in arguments]
    crop_and_normalise(batch, pad_and_mirror(mean[None], 4), tops, lefts, flips, 4)
    normalise(batch, mean)
    flip_some(batch, flips)
    colour_noise(floats, alphas)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


def test_draws_cover_all_offsets_and_both_flips_evenly():
    """200 of each of the 162 views are expected; five standard deviations are 71."""
    tops, lefts, flips = draw_crops(seeded(), 162 * 200, 4, True)
    counts = torch.bincount(tops * 18 + lefts * 2 + flips)
    assert len(counts) == 162
    assert counts.min() > 129
    assert counts.max() < 271


def test_every_second_image_is_flipped():
    """Of 100,000; five standard deviations are 791. In every batch anew."""
    draw = seeded()
    flips = torch.cat([draw_crops(draw, 100, 4, True)[2] for _ in range(1000)])
    assert abs(int(flips.sum()) - 50_000) < 791


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_draws_without_flip(pad):
    """No flips, and the same offsets as with them."""
    tops, lefts, flips = draw_crops(seeded(), 1000, pad, False)
    assert flips.dtype == torch.bool
    assert not flips.any()
    assert sorted(set(tops.tolist())) == sorted(set(lefts.tolist())) == list(range(2 * pad + 1))
    with_flips = draw_crops(seeded(), 1000, pad, True)
    assert torch.equal(tops, with_flips[0])
    assert torch.equal(lefts, with_flips[1])
    assert with_flips[2].any()


def test_mean_image_is_the_double_precision_mean():
    batch = images(1000, 6, 5)
    assert torch.equal(mean_image(batch), batch.double().mean(0).float())
    assert mean_image(batch).shape == (6, 5, 3)


def test_mean_image_of_many_bright_pixels_is_exact():
    """100,000 times 255 is more than float32 or a small integer can add one by one."""
    assert torch.equal(mean_image(torch.full((100_000, 1, 1, 3), 255, dtype=torch.uint8)), torch.full((1, 1, 3), 255.0))


def test_flip_some():
    batch, flips = images(5, 4, 6), torch.tensor([True, False, True, False, False])
    reference = [image[:, range(5, -1, -1)] if flip else image for image, flip in zip(batch, flips, strict=True)]
    assert torch.equal(flip_some(batch, flips), torch.stack(reference))
    assert not torch.equal(flip_some(batch, flips), batch)


def test_colour_noise_is_the_sum_over_components():
    """Krizhevsky et al. 2012: to each pixel [p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T."""
    batch, alphas = torch.rand(4, 3, 5, 6, generator=seeded()), torch.randn(4, 3, generator=seeded(1)) * 0.1
    reference = batch.double()
    for image in range(4):
        for channel in range(3):
            for component in range(3):
                reference[image, channel] += (
                    EIGENVECTORS[channel][component] * alphas[image, component].double() * EIGENVALUES[component]
                )
    torch.testing.assert_close(colour_noise(batch, alphas), reference.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(colour_noise(batch, torch.zeros(4, 3)), batch)


def test_the_principal_components_are_orthonormal_and_the_first_is_brightness():
    vectors = torch.tensor(EIGENVECTORS)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=1e-3)
    assert len(set(vectors[:, 0].sign().tolist())) == 1
    assert EIGENVALUES == (0.2175, 0.0188, 0.0045)  # as fb.resnet.torch has them


def test_a_mean_image_of_another_size_gives_its_channel_averages():
    batch, mean = images(3, 20, 31), mean_of()
    assert torch.equal(normalise(batch, mean), normalise(batch, mean.mean((0, 1), keepdim=True)))


def jittered(image, order, factors):
    """fb.resnet.torch's ColorJitter of one (H, W, 3) image: brightness, contrast and saturation in `order`."""
    for which, factor in zip(order.tolist(), factors.tolist(), strict=True):
        grey = image[..., 0] * 0.299 + image[..., 1] * 0.587 + image[..., 2] * 0.114
        target = [torch.zeros_like(image), torch.full_like(image, grey.mean()), grey[..., None].expand_as(image)][which]
        image = image * factor + target * (1 - factor)
    return image


def test_colour_jitter_is_that_of_each_image_alone():
    batch = images(12, 9, 7)
    order, factors = draw_jitter(seeded(), 12, 0.4)
    assert len({tuple(row) for row in order.tolist()}) > 3
    found = colour_jitter(batch, order, factors)
    expected = torch.stack([jittered(*one) for one in zip(batch.double(), order, factors.double(), strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_jitter_draws_all_orders_and_factors_of_the_whole_range():
    order, factors = draw_jitter(seeded(), 4000, 0.4)
    counts = torch.tensor([tuple(row) in itertools.permutations(range(3)) for row in order.tolist()])
    assert counts.all()
    rows, how_often = order.unique(dim=0, return_counts=True)
    assert len(rows) == 6
    assert how_often.min() > 550
    assert 0.6 <= factors.min() < 0.601 < 1.399 < factors.max() <= 1.4
    assert draw_jitter(seeded(), 9, 0)[1].unique().tolist() == [1]

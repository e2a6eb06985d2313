"""The order of images is a function of (seed, iteration), and every image comes once per pass."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_train.data.sampler import WINDOW, batch_indices, generator, held_out, permutation

SIZES = st.integers(1, 60)
BATCHES = st.integers(1, 150)  # also larger than the set
SEEDS = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(seed=SEEDS, size=SIZES, batch_size=BATCHES)
def test_batches_are_cut_from_an_endless_row_of_permutations(seed, size, batch_size):
    """Every batch is full, and every stretch of `size` images from the start is all of them."""
    count = 3 * size // batch_size + 2
    batches = [batch_indices(seed, iteration, batch_size, size) for iteration in range(count)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    row = torch.cat(batches)
    passes = row[: len(row) // size * size].view(-1, size)
    assert len(passes) >= 3
    assert torch.equal(passes.sort(1).values, torch.arange(size).expand(len(passes), -1))
    for epoch, order in enumerate(passes):
        assert torch.equal(order, permutation(seed, epoch, size))
    rest = row[len(passes) * size :]
    assert torch.equal(rest, permutation(seed, len(passes), size)[: len(rest)])


@settings(deadline=None)
@given(seed=SEEDS, size=SIZES, batch_size=BATCHES, order=st.permutations(range(8)))
def test_a_batch_does_not_depend_on_the_calls_before(seed, size, batch_size, order):
    in_order = [batch_indices(seed, iteration, batch_size, size) for iteration in range(8)]
    for iteration in order:
        torch.rand(1)
        batch_indices(seed + 1, iteration, batch_size, size)
        assert torch.equal(batch_indices(seed, iteration, batch_size, size), in_order[iteration])


def test_a_changed_batch_does_not_change_the_next_call():
    """The permutations are kept between calls; batches are copies."""
    for batch_size, iteration in ((10, 0), (100, 0), (7, 14)):
        batch = batch_indices(0, iteration, batch_size, 100)
        before = batch.clone()
        batch.fill_(-1)
        assert torch.equal(batch_indices(0, iteration, batch_size, 100), before)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    first, state = batch_indices(3, 5, 8, 40), torch.get_rng_state()
    torch.manual_seed(2)
    permutation.cache_clear()
    assert torch.equal(batch_indices(3, 5, 8, 40), first)
    torch.manual_seed(1)
    held_out(40, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_orders_are_even():
    """Each image is as often first: 100 times of 2,000 are expected, five standard deviations are 49."""
    firsts = torch.tensor([int(permutation(seed, epoch, 20)[0]) for seed in range(2) for epoch in range(1000)])
    counts = firsts.bincount(minlength=20)
    assert counts.min() > 51
    assert counts.max() < 149


def test_the_paper_s_64000_batches_are_163_84_passes():
    """The last batch ends at place 42,000 of pass 163; batch 390 takes 80 images of pass 0 and 48 of pass 1."""
    assert 64_000 * 128 == 163 * 50_000 + 42_000
    assert torch.equal(batch_indices(0, 63_999, 128, 50_000), permutation(0, 163, 50_000)[41_872:42_000])
    straddling = torch.cat([permutation(0, 0, 50_000)[49_920:], permutation(0, 1, 50_000)[:48]])
    assert torch.equal(batch_indices(0, 390, 128, 50_000), straddling)


def test_shards_come_in_another_order_in_each_pass_and_for_each_seed():
    """The first window is no fixed part of the shards, and every shard comes first as often as another."""
    blocks = (3,) * 40
    first = WINDOW * 3  # images of the first window
    windows = {
        (seed, epoch): frozenset((permutation(seed, epoch, 120, blocks)[:first] // 3).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(set(windows.values())) == 400
    counts = torch.tensor([shard for window in windows.values() for shard in window]).bincount(minlength=40)
    # 160 of each are expected; five standard deviations are 49
    assert counts.min() > 111
    assert counts.max() < 209


def test_a_batch_larger_than_the_set_holds_whole_passes():
    batch = batch_indices(0, 0, 25, 10)
    assert [batch[:10].unique().numel(), batch[10:20].unique().numel(), batch[20:].unique().numel()] == [10, 10, 5]
    assert batch.bincount().sum() == 25


def test_a_generator_depends_on_all_its_arguments():
    draws = [
        torch.rand(4, generator=generator(seed, purpose, count)).tolist()
        for seed in (0, 1, 11, 2**63 - 1)
        for purpose in ("order", "augment")
        for count in (0, 1, 11, 10**9)
    ]
    assert len({tuple(draw) for draw in draws}) == 32
    assert torch.rand(4, generator=generator(0, "order", 0)).tolist() == draws[0]


def test_the_order_is_what_it_was():
    """Written down once: another order is another run for the same seed."""
    assert permutation(0, 0, 10).tolist() == [2, 1, 6, 3, 7, 0, 4, 9, 8, 5]
    assert held_out(10, 3)[1].tolist() == [0, 1, 5]


@settings(deadline=None)
@given(size=st.integers(1, 500), share=st.floats(0, 1))
def test_held_out_is_fixed_disjoint_and_complete(size, share):
    count = int(share * size)
    kept, held = held_out(size, count)
    assert (len(kept), len(held)) == (size - count, count)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(size))
    for part in (kept, held):
        assert torch.equal(part, part.sort().values)
    torch.manual_seed(size)
    assert all(torch.equal(now, then) for now, then in zip(held_out(size, count), (kept, held), strict=True))


def test_held_out_images_come_from_everywhere():
    """Class folders are sorted by class: of each tenth 500 are expected; five standard deviations are 106."""
    counts = (held_out(50_000, 5_000)[1] // 5_000).bincount(minlength=10)
    assert counts.min() > 394
    assert counts.max() < 606


def test_fewer_held_out_are_a_part_of_more():
    """The permutation depends on the size of the set only."""
    few, more = held_out(100, 10)[1].tolist(), held_out(100, 30)[1].tolist()
    assert set(few) < set(more)

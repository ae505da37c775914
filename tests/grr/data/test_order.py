"""The order of an epoch: its laws for any groups, the largest number of batches, and statistics of the order."""

import math
import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grr.data.order import BlockEpochs, Epochs, Groups, check_negatives, epoch_order, num_batches
from grr.data.order.permutation import num_rounds, permute, scramble, unpermute

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)  # of the groups
batch_sizes = st.integers(1, 12)


def groups_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Returns groups of these sizes in random order, with random numbers as names."""
    rng = np.random.default_rng(seed)
    names = rng.choice(10**12, len(sizes), replace=False)
    return rng.permutation(np.repeat(names, sizes))


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_no_batch_holds_two_of_a_group_and_no_sample_comes_twice(sizes, batch_size, seed, epoch):
    assume(batch_size <= len(sizes))
    groups = groups_of(sizes, seed)
    order = epoch_order(groups, seed=seed, epoch=epoch, batch_size=batch_size)
    assert order.dtype == np.int64
    assert order.shape == (num_batches(groups, batch_size=batch_size), batch_size)
    assert len(np.unique(order)) == order.size
    assert set(order.flat) <= set(range(len(groups)))
    assert all(len(set(row)) == batch_size for row in groups[order].tolist())


@given(sizes=sizes, batch_size=batch_sizes)
def test_an_epoch_has_as_many_batches_as_possible(sizes, batch_size):
    """Compare with the greedy algorithm that takes the largest remaining groups, which is optimal."""
    assume(batch_size <= len(sizes))
    remaining, batches = sorted(sizes, reverse=True), 0
    while sum(size > 0 for size in remaining) >= batch_size:
        remaining = sorted([size - 1 for size in remaining[:batch_size]] + remaining[batch_size:], reverse=True)
        batches += 1
    assert num_batches(groups_of(sizes), batch_size=batch_size) == batches >= 1


@given(sizes=sizes, batch_size=batch_sizes, epoch=st.integers(0, 9))
def test_less_than_a_batch_is_left_out_unless_a_group_is_too_large(sizes, batch_size, epoch):
    assume(batch_size <= len(sizes) and max(sizes) <= sum(sizes) // batch_size)
    order = epoch_order(groups_of(sizes), seed=0, epoch=epoch, batch_size=batch_size)
    assert sum(sizes) - order.size == sum(sizes) % batch_size


def test_of_distinct_samples_only_the_last_partial_batch_is_left_out():
    assert epoch_order(np.arange(107) * 3, seed=1, epoch=2, batch_size=10).shape == (10, 10)


@pytest.mark.parametrize("sizes", [[1] * 60, [5] * 12], ids=["distinct", "five captions an image"])
def test_the_order_is_that_of_its_seed_and_epoch(sizes):
    groups = groups_of(sizes)
    one, same, other_epoch, other_seed = (
        epoch_order(groups, seed=seed, epoch=epoch, batch_size=6) for seed, epoch in ((3, 1), (3, 1), (3, 2), (4, 1))
    )
    assert (one == same).all()
    assert (one != other_epoch).any()
    assert (one != other_seed).any()
    assert (other_epoch != other_seed).any()


@pytest.mark.parametrize("sizes", [[1] * 11, [2, 2, 1, 1, 1], [4, 2, 2, 2]])
def test_every_sample_occurs_at_every_position_equally_often(sizes):
    """In 1,000 epochs, samples of groups of equal size occur equally often in each batch and column."""
    groups = groups_of(sizes)
    orders = np.stack([epoch_order(groups, seed=0, epoch=epoch, batch_size=3) for epoch in range(1_000)])
    frequency = np.stack([(orders == sample).mean(0) for sample in range(len(groups))])  # [n, batches, 3]
    size = np.array([(groups == group).sum() for group in groups])
    for s in np.unique(size):
        of_size = frequency[size == s]
        assert np.abs(of_size - of_size.mean()).max() < 5 * (of_size.mean() / 1_000) ** 0.5


def test_batches_share_images_as_often_as_by_chance():
    """5 captions of each of 2,000 images in 100 batches of 100: two batches share 100 * 100 / 2,000 = 5 on average.

    If captions were assigned to batches in turn, neighbouring batches would share 80. The variance is slightly below
    chance, because no batch holds two captions of an image: a batch has one sample of each strip of 20 images.
    """
    groups = np.repeat(np.arange(2_000), 5)
    order = epoch_order(groups, seed=0, epoch=0, batch_size=100)
    held = np.zeros((100, 2_000), dtype=np.int64)
    np.put_along_axis(held, groups[order], 1, axis=1)
    shared = (held @ held.T)[np.triu_indices(100, 1)]
    assert 0.7 < shared.var() / (5 * 0.95) < 1.15
    assert shared.max() < 20


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**40), draw=st.data())
def test_a_batch_needs_no_other_batch(sizes, batch_size, seed, draw):
    """Single batches, in any order and of several epochs in turns, are rows of the whole order."""
    assume(batch_size <= len(sizes))
    groups = groups_of(sizes, seed)
    epochs = Epochs(Groups(groups), seed=seed, batch_size=batch_size)
    wanted = st.tuples(st.integers(0, 2), st.integers(0, epochs.num_batches - 1))
    for epoch, k in draw.draw(st.lists(wanted, min_size=1, max_size=5)):
        whole = epoch_order(groups, seed=seed, epoch=epoch, batch_size=batch_size)
        assert (epochs.batch(epoch, k) == whole[k]).all()
        assert (epochs.batches(epoch, k, k + 3) == whole[k : k + 3]).all()


@pytest.mark.parametrize("captions", [1, 5])
def test_the_order_takes_no_memory_for_samples_that_are_not_in_the_batch(captions):
    """A million pairs whose images have equally many captions: 8 MB in each array of them."""
    groups = np.arange(1_000_000) // captions
    tracemalloc.start()
    epochs = Epochs(Groups(groups), seed=0, batch_size=768)
    built, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    epochs.batch(3, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert built < 100_000
    assert peak < 1_000_000


def test_of_images_with_unequal_captions_eight_bytes_an_image_are_kept_and_one_an_epoch():
    groups = groups_of([1, 2] * 200_000)
    groups.sort()
    tracemalloc.start()
    epochs = Epochs(Groups(groups), seed=0, batch_size=768)
    built, _ = tracemalloc.get_traced_memory()
    epochs.batch(3, 5)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert built < 8.2 * 400_000
    assert after - built < 1.2 * 400_000


# Permutations


@given(n=st.integers(1, 3_000), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_a_key_selects_a_permutation_and_unpermute_inverts_it(n, keys):
    x, keys = np.arange(n, dtype=np.uint64), np.array(keys, dtype=np.uint64)[:, None]
    images = permute(x, n, keys)
    assert (np.sort(images, axis=1) == x).all()
    assert (unpermute(images, n, keys) == x).all()


def permuted(x: int, n: int, key: int) -> int:
    """The permutation in integers of Python."""

    def scrambled(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    height = math.ceil(math.sqrt(n))
    width = 2 * math.ceil(n / (2 * height))
    while True:
        row, column = divmod(x, width)
        for number in range(num_rounds(n)):
            round_key = (key + number * 2**48) % 2**64
            if number % 2:
                column = (column + (scrambled(round_key ^ row) // 2**32) * width // 2**32) % width
            else:
                row = (row + (scrambled(round_key ^ column) // 2**32) * height // 2**32) % height
        x = row * width + column
        if x < n:
            return x


@given(n=st.integers(1, 10**9), key=st.integers(0, 2**64 - 1), draw=st.data())
def test_the_permutation_is_that_of_exact_integers(n, key, draw):
    x = draw.draw(st.integers(0, n - 1))
    assert int(permute(np.array([x]), n, np.array([key], dtype=np.uint64))[0]) == permuted(x, n, key)


def chi_square(observed: np.ndarray, expected: float) -> float:
    """Returns by how many standard deviations a chi-square statistic exceeds its mean."""
    freedom = observed.size - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_few_numbers_is_equally_likely(n):
    keys = scramble(np.arange(40 * math.factorial(n), dtype=np.uint64))
    images = permute(np.arange(n), n, keys[:, None])
    counts = np.array([(images == np.array(p, dtype=np.uint64)).all(1).sum() for p in permutations(range(n))])
    assert chi_square(counts, 40) < 5


def test_the_place_of_a_sample_depends_neither_on_its_number_nor_on_its_place_in_the_epoch_before():
    """100,000 samples: counts of 20 ranges of one by 20 ranges of the other; also of places of neighbours."""
    n, ranges = 100_000, 20
    places = np.empty((3, n), dtype=np.int64)
    for epoch in range(3):
        places[epoch, epoch_order(np.arange(n), seed=1, epoch=epoch, batch_size=100).ravel()] = np.arange(n)

    def joint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.bincount(x * ranges // n * ranges + y * ranges // n, minlength=ranges**2)

    number = np.arange(n)
    for x, y in ((number, places[0]), (places[0], places[1]), (places[1], places[2])):
        assert abs(chi_square(joint(x, y), n / ranges**2)) < 6
    neighbours = joint(places[0][:-1], places[0][1:])
    assert abs(chi_square(neighbours, n / ranges**2)) < 6


def test_neighbours_share_a_batch_as_often_as_by_chance():
    """Of 100,000 samples in batches of 100, 99 of the 99,999 neighbours share a batch on average: 990 in ten epochs."""
    n, together = 100_000, 0
    for epoch in range(10):
        batch = np.empty(n, dtype=np.int64)
        order = epoch_order(np.arange(n), seed=2, epoch=epoch, batch_size=100)
        batch[order.ravel()] = np.repeat(np.arange(len(order)), 100)
        together += int((batch[1:] == batch[:-1]).sum())
    assert abs(together - 990) < 5 * math.sqrt(990)


def test_a_large_set_is_ordered():
    """120,000 images of 3 to 7 captions, about the size of COCO."""
    groups = groups_of(list(np.random.default_rng(0).integers(3, 8, 120_000)))
    order = epoch_order(groups, seed=0, epoch=0, batch_size=768)
    assert order.shape == (len(groups) // 768, 768)
    assert (np.diff(np.sort(groups[order], axis=1), axis=1) > 0).all()


def test_a_batch_larger_than_the_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=5 for 4 images; lower batch_size"):
        epoch_order(np.array([1, 1, 2, 3, 4, 4]), seed=0, epoch=0, batch_size=5)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "negatives", "name"),
    [
        (1, 1, "global", "run.batch_size"),
        (1, 1, "local", "run.micro_batch_size"),
        (8, 1, "local", "run.micro_batch_size"),
        (8, 1, "global", None),
        (2, 2, "local", None),
    ],
)
def test_a_pair_without_a_negative_is_refused(batch_size, micro_batch_size, negatives, name):
    if name is None:
        check_negatives(batch_size, micro_batch_size, negatives)
    else:
        with pytest.raises(ValueError, match=f"{name} must be at least 2 with loss.negatives={negatives}, got 1"):
            check_negatives(batch_size, micro_batch_size, negatives)


# Blocks


@given(
    sizes=st.lists(st.integers(1, 3), min_size=30, max_size=120),
    batch_size=st.integers(1, 4),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
)
def test_blocks_keep_the_laws_of_an_order_and_the_samples_of_a_window_are_those_of_its_blocks(
    sizes, batch_size, block, seed, epoch
):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    epochs = BlockEpochs(groups, seed=seed, batch_size=batch_size, block=block)
    order = epochs.batches(epoch)
    assert order.shape == (len(groups) // batch_size, batch_size) == (epochs.num_batches, batch_size)
    assert len(np.unique(order)) == order.size
    assert set(order.flat) <= set(range(len(groups)))
    assert all(len(set(row)) == batch_size for row in groups[order].tolist())
    k = seed % epochs.num_batches
    assert (BlockEpochs(groups, seed=seed, batch_size=batch_size, block=block).batch(epoch, k) == order[k]).all()
    window = order[: epochs.window] if epochs.num_batches >= 2 * epochs.window else order
    if len(window) < len(order):
        assert len(set((window // block).flat)) <= window.size // block + 3


def test_a_sample_is_equally_likely_in_any_batch_and_left_out_of_blocks():
    """600 epochs of 91 samples in batches of 12, in windows of 2, 2 and 3: each is in each of 7 in a 12/91 of them."""
    epochs = BlockEpochs(np.arange(91), seed=0, batch_size=12, block=2)
    assert (epochs.window, epochs.num_batches) == (2, 7)
    counts = np.zeros((91, 7))
    for epoch in range(600):
        counts[epochs.batches(epoch), np.arange(7)[:, None]] += 1
    mean = 600 * 12 / 91
    assert np.abs(counts - mean).max() < 5.5 * mean**0.5
    left_out = 600 - counts.sum(1)
    assert np.abs(left_out - 600 * 7 / 91).max() < 5.5 * (600 * 7 / 91) ** 0.5


def test_an_image_with_more_captions_than_a_window_has_batches_is_refused():
    with pytest.raises(ValueError, match=r"loader.block=1 .* as 16 blocks have batches, 4, got 5; raise loader.block"):
        BlockEpochs(np.repeat(np.arange(40), 5), seed=0, batch_size=4, block=1)

"""The keyed permutation of a range: one to one, the same everywhere, and as good as a random one."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from datamodules.webdataset.bijection import ROUNDS, make_key, permute

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def permute_slowly(value: int, size: int, key: int) -> int:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for turn in range(1, ROUNDS + 1):
            left, right = right, left ^ (mix(mix((key + turn * GOLDEN) & MASK) ^ right) & mask)
        value = (left << half) | right
        if value < size:
            return value ^ (key >> 63) if value < 2 <= size else value


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097, 30_011])
def test_every_element_of_a_range_comes_exactly_once(size: int) -> None:
    for seed in range(3):
        assert sorted(permute(np.arange(size), size, make_key(seed))) == list(range(size))


def test_large_ranges_are_permuted_within_bounds_and_without_collisions() -> None:
    size = 427_000_000
    values = np.random.default_rng(0).choice(size, 20_000, replace=False)
    found = permute(values, size, make_key(7))
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == len(values)


def test_it_is_the_network_that_the_module_describes() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(1, 10**6, 200)
    values = random.integers(0, sizes)
    keys = random.integers(0, MASK, 200, dtype=np.uint64, endpoint=True)
    expected = [permute_slowly(*map(int, row)) for row in zip(values, sizes, keys, strict=True)]
    assert permute(values, sizes, keys).tolist() == expected


def test_elements_with_keys_of_their_own_go_where_each_key_alone_sends_them() -> None:
    sizes, keys = np.array([5, 9, 1000]), make_key(1, np.arange(3))
    together = permute(np.array([4, 0, 999]), sizes, keys)
    alone = [permute(np.array([4, 0, 999])[[i]], int(sizes[i]), keys[[i]])[0] for i in range(3)]
    assert together.tolist() == alone


def test_checkpoints_of_earlier_versions_keep_their_order() -> None:
    # Stored when the order was first defined: another result would silently reorder resumed runs.
    assert permute(np.arange(10), 10, make_key(0)).tolist() == [7, 4, 0, 2, 6, 1, 5, 8, 9, 3]
    assert make_key(1, 2, 3).tolist() == [15020427595393229491]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_permutations_of_a_small_range_are_equally_likely(size: int) -> None:
    number, expected = math.factorial(size), 100
    values, keys = np.arange(size), make_key(0, np.arange(number * expected))
    found = permute(np.tile(values, len(keys)), size, np.repeat(keys, size)).reshape(-1, size)
    counts = Counter(map(tuple, found.tolist()))
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    # The mean is the number less one, the variance twice that; five standard deviations.
    assert chi_square < number - 1 + 5 * (2 * (number - 1)) ** 0.5


def test_fixed_points_are_as_rare_as_in_random_permutations() -> None:
    size, draws = 1000, 400
    values, keys = np.tile(np.arange(size), draws), np.repeat(make_key(1, np.arange(draws)), size)
    fixed = (permute(values, size, keys) == values).reshape(draws, size).sum(1)
    # Poisson with mean and variance 1; five standard errors of the mean, and of the variance (sqrt(3 / draws)).
    assert fixed.mean() == pytest.approx(1, abs=5 / draws**0.5)
    assert fixed.var() == pytest.approx(1, abs=5 * (3 / draws) ** 0.5)


@pytest.mark.parametrize("size", [1000, 80_000])
def test_neighbours_end_up_unrelated(size: int) -> None:
    for seed in range(5):
        order = permute(np.arange(size), size, make_key(seed))
        for first, second in ((np.arange(size), order), (order[:-1], order[1:]), (order[:-2], order[2:])):
            # The standard error of a correlation of unrelated numbers is 1 / sqrt(size); five of them.
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / size**0.5


def test_neighbouring_keys_name_unrelated_permutations() -> None:
    size = 2000
    orders = [permute(np.arange(size), size, make_key(3, 5, key)) for key in range(20)]
    same = [int((one == other).sum()) for one, other in itertools.combinations(orders, 2)]
    # Poisson with mean 1 over 190 pairs; five standard errors.
    assert np.mean(same) == pytest.approx(1, abs=5 / len(same) ** 0.5)


def test_each_word_and_its_place_decide_the_key() -> None:
    words = [(0,), (0, 0), (1,), (0, 1), (1, 0), (1, 1), (2**63, 0), (0, 2**63)]
    assert len({int(make_key(*each)[0]) for each in words}) == len(words)

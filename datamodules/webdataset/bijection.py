"""A keyed permutation of a range that is computed element by element: nothing of the range is ever stored.

A balanced Feistel network permutes the numbers of 2k bits, the smallest such that covers the range; results outside it
are permuted again until they fall inside (cycle walking; Black and Rogaway, CT-RSA 2002). At most four numbers of the
network stand for one of the range, so that takes few turns. The round function is SplitMix64's finalizer. All that
such a network makes are even permutations, so half of the keys exchange 0 and 1 in the end.

Shapes: n elements.
"""

import numpy as np

from datamodules.batch import Array
from datamodules.webdataset.records import mix_array

# With fewer than eight, ranges of a few elements, the hardest case, are visibly not permuted evenly.
ROUNDS = 10
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def make_key(*words: int | Array) -> Array:
    """Return `(n,)` uint64 keys that all words decide: numbers of 64 bits and `(n,)` arrays, not negative.

    They are `(1,)` where no word is an array.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        bits = np.uint64(word) if isinstance(word, int) else word.astype(np.uint64)
        state = mix_array((state ^ bits) + np.uint64(_STEP))
    return state


def permute(values: Array, size: int | Array, key: Array) -> Array:
    """Return where the permutation of `range(size)` that `key` names sends `values`.

    Args:
        values: `(n,)` integers in [0, size).
        size: Of the range, at least 1 and below 2 ** 53; a number or `(n,)`.
        key: `(n,)` or `(1,)` uint64; each names a permutation.

    Returns:
        `(n,)` int64 in [0, size).
    """
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), values.shape)
    # Of a float's two parts the exponent is the number of bits.
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    key = np.broadcast_to(key, values.shape)
    keys = [mix_array(key + np.uint64(turn * _STEP & _MASK)) for turn in range(1, ROUNDS + 1)]
    result = _network(values.astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        again = _network(result[outside], half[outside], [turn[outside] for turn in keys])
        result[outside] = again
        outside = outside[again >= size[outside]]
    result ^= (key >> np.uint64(63)) & (result < 2) & (size > 1)
    return result.astype(np.int64)


def _network(values: Array, half: Array, keys: list[Array]) -> Array:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix_array(key ^ right) & mask)
    joined: Array = (left << half) | right
    return joined

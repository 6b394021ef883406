"""What the parts of the shard reader hand to each other: samples as bytes, what is wrong with one, random numbers.

Shapes: n numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from datamodules.batch import Array
from datamodules.sampling import SAMPLE

# What can be wrong with a sample.
Cause = Literal[
    "archive",  # the tar around it is broken
    "name",  # its name is not UTF-8, not relative, or climbs out of its folder
    "duplicate",  # its key came before in the same shard
    "parts",  # it lacks a part that the batch needs
    "text",  # its text is not UTF-8, empty, or not of the form that the batch needs
    "label",  # its label is not a number, or out of range
    "size",  # too many bytes or pixels, known before decoding
    "decode",  # its image is truncated, of another format, or broken
    "changed",  # the shard is not the one that was indexed
    "transport",  # its shard could not be read after all retries
]
CAUSES: tuple[Cause, ...] = get_args(Cause)

_MASK = (1 << 64) - 1


class BadSample(ValueError):  # noqa: N818 - not an error of the run: the sample is replaced
    """A sample that cannot be used, and why."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause, str(self))


@dataclass(frozen=True, slots=True)
class RawSample:
    """The files of one sample, not decoded.

    Args:
        key: Their common name in the shard, without extensions.
        parts: Content by extension: what follows the first dot of the file name, in lower case.
    """

    key: str
    parts: Mapping[str, memoryview]


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers that (seed, source, epoch, position) decide, and nothing else.

    Args:
        seed: Of the run.
        source: Number of the data source.
        epoch: Of the source.
        position: In that epoch.
    """

    seed: int
    source: int
    epoch: int
    position: int

    def sequence(self) -> np.random.SeedSequence:
        """Return a seed for any generator."""
        return np.random.SeedSequence((SAMPLE, self.seed, self.source, self.epoch, self.position))

    def uniform(self, n: int) -> Array:
        """Return `(n,)` float64 in [0, 1); the same at each call.

        A counter through SplitMix64's finalizer (Steele et al., OOPSLA 2014): a generator of NumPy would take longer to
        seed than the crop that it decides.
        """
        state = 0
        for word in (self.seed, self.source, self.epoch, self.position):
            state = mix((state ^ word) & _MASK)
        counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(state)
        numbers: Array = (mix_array(counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers


def mix(word: int) -> int:
    """Return SplitMix64's finalizer of a step after `word`, a 64-bit number."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def mix_array(words: Array) -> Array:
    """Return SplitMix64's finalizer of each of `(n,)` uint64, without the step."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = words ^ (words >> np.uint64(31))
    return mixed

"""In which order an epoch takes the samples: shuffled, balanced by class, grouped by the images' orientation.

An order that shows an image more than once counts on: `i + k * S` is image i for the k-th time after the first. So each
time has a seed of its own, and the image is cropped and flipped differently.

Shapes: S images of the data set, L labels of all of them, E samples of an epoch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from datamodules.batch import Array


class Order(Protocol):
    """What `datamodules.sampling.TrainSampler` asks. One instance serves all epochs and stays as it is."""

    def __len__(self) -> int:
        """Return E, the samples of an epoch, the same in every epoch."""

    def describe(self, global_batch: int) -> str:
        """Name all that decides the order beside seed, epoch and E: part of the checkpoint. Empty: shuffled."""

    def indices(self, random: np.random.Generator, global_batch: int) -> Array:
        """Return the `(E,)` int64 indices of one epoch; `random` is all that differs between epochs."""


class Shuffled:
    """Each image once.

    Args:
        size: S.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def describe(self, global_batch: int) -> str:
        return ""

    def indices(self, random: np.random.Generator, global_batch: int) -> Array:
        return random.permutation(self._size)


class Repeated:
    """Each image as often as stated, shuffled.

    Args:
        repeats: `(S,)` integers.
        name: What decided the repeats.
    """

    def __init__(self, repeats: Array, name: str) -> None:
        self._indices = _counted_on(np.repeat(np.arange(len(repeats)), repeats), len(repeats))
        self._name = name

    def __len__(self) -> int:
        return len(self._indices)

    def describe(self, global_batch: int) -> str:
        return self._name

    def indices(self, random: np.random.Generator, global_batch: int) -> Array:
        return random.permutation(self._indices)


class ByClass:
    """Every class equally often: the classes take turns, and each gives its own images in turn, shuffled.

    An epoch has S samples; images of rare classes come several times, and those without a label never.

    Args:
        labels: `(L,)` class of each label.
        starts: `(S + 1,)`: image i has `labels[starts[i]:starts[i + 1]]`, each class once.
    """

    def __init__(self, labels: Array, starts: Array) -> None:
        self._size = len(starts) - 1
        images = np.repeat(np.arange(self._size), np.diff(starts))[np.argsort(labels, kind="stable")]
        classes, counts = np.unique(labels, return_counts=True)
        self._images = np.split(images, np.cumsum(counts)[:-1]) if len(classes) else []

    def __len__(self) -> int:
        return self._size if self._images else 0

    def describe(self, global_batch: int) -> str:
        return "every class equally often"

    def indices(self, random: np.random.Generator, global_batch: int) -> Array:
        turns = _cycle(np.arange(len(self._images)), len(self), random)
        counts = np.bincount(turns, minlength=len(self._images))
        chosen = [_cycle(images, count, random) for images, count in zip(self._images, counts, strict=True)]
        indices = np.empty(len(self), dtype=np.int64)
        # The n-th turn of a class takes the n-th image that it gives.
        indices[np.argsort(turns, kind="stable")] = np.concatenate(chosen) if chosen else indices
        return _counted_on(indices, self._size)


class Grouped:
    """Another order, rearranged so that global batches hold images of one group where possible.

    Images of one orientation pad each other little. Each group is cut into whole global batches, the rests of the
    groups make mixed ones, and all batches are shuffled. What does not fill a global batch is the end of the other
    order and stays there, so that no group misses more epochs than another.

    Args:
        order: What an epoch has.
        groups: `(S,)` group of each image.
    """

    def __init__(self, order: Order, groups: Array) -> None:
        self._order, self._groups = order, groups

    def __len__(self) -> int:
        return len(self._order)

    def describe(self, global_batch: int) -> str:
        inner = self._order.describe(global_batch)
        return f"{inner or 'shuffled'}, grouped into batches of {global_batch}"

    def indices(self, random: np.random.Generator, global_batch: int) -> Array:
        order = self._order.indices(random, global_batch)
        num_batches = len(order) // global_batch
        if num_batches == 0:
            return order
        order, last = np.split(order, [num_batches * global_batch])
        groups = self._groups[order % len(self._groups)]
        whole, rest = [], []
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            count = len(places) // global_batch * global_batch
            whole.append(places[:count])
            rest.append(places[count:])
        batches = np.concatenate([*whole, *rest]).reshape(num_batches, global_batch)
        arranged: Array = np.concatenate([order[random.permutation(batches).reshape(-1)], last])
        return arranged


class Balance(ABC):
    """How classes of few images are shown more often than a plain epoch would; chosen in YAML by `class_path`."""

    @abstractmethod
    def order(self, labels: Array, starts: Array) -> Order:
        """Return the order of images i with the classes `labels[starts[i]:starts[i + 1]]`, each class once."""


@dataclass(frozen=True, kw_only=True)
class RepeatFactor(Balance):
    """Repeat the images of rare classes (LVIS, arXiv:1908.03195, section 5.1; fractions are rounded up).

    A class in a share f of the images has the factor `max(1, sqrt(threshold / f))`, an image the largest factor of its
    classes, and an epoch each image `ceil(factor)` times.

    Args:
        threshold: Share of the images below which a class is rare.

    Raises:
        ValueError: `threshold` outside (0, 1].
    """

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"RepeatFactor: threshold={self.threshold}, expected a share in (0, 1].")

    def order(self, labels: Array, starts: Array) -> Order:
        size = len(starts) - 1
        share = np.bincount(labels) / max(size, 1)
        factors = np.ones(size)
        images = np.repeat(np.arange(size), np.diff(starts))
        np.maximum.at(factors, images, np.sqrt(self.threshold / share[labels]))
        return Repeated(np.ceil(factors).astype(np.int64), f"repeated below a share of {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class ClassAware(Balance):
    """Draw every class equally often, whatever its number of images; an epoch has as many images as the data set."""

    def order(self, labels: Array, starts: Array) -> Order:
        return ByClass(labels, starts)


def _counted_on(images: Array, size: int) -> Array:
    """Add `k * size` to each image that stands in `images`, `(E,)`, for the k-th time after the first."""
    places = np.argsort(images, kind="stable")
    _, first, counts = np.unique(images[places], return_index=True, return_counts=True)
    times = np.empty_like(images)
    times[places] = np.arange(len(images)) - np.repeat(first, counts)
    counted: Array = images + times * size
    return counted


def _cycle(values: Array, length: int, random: np.random.Generator) -> Array:
    """Return `length` of `values`, one shuffled round after the other."""
    if length == 0:
        return values[:0]
    rounds = random.permuted(np.tile(values, (-(-length // len(values)), 1)), axis=1)
    cycle: Array = rounds.reshape(-1)[:length]
    return cycle

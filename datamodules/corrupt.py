"""Unreadable training images: replaced the same way in every run, counted, and bounded."""

import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from datamodules.sampling import REPLACEMENT
from datamodules.sources import UNREADABLE

# So many unreadable images in a row are no accident at any share worth training with.
MAX_ATTEMPTS = 10
NUM_NAMED = 3


class CorruptImagesError(RuntimeError):
    """More images are unreadable than the datamodule allows."""


class NamedImages(Protocol):
    """What is needed of a source."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the RGB image. Any error that `UNREADABLE` lists marks it as corrupt."""

    def name(self, index: int) -> str:
        """Return where the image came from."""


class ReplacedImages:
    """Read images of a source, another one in the place of each that is unreadable.

    (seed, epoch, index) choose the replacement, so that it is the same for any number of workers and ranks and after a
    resume.

    Args:
        source: The images.
        seed: Of the replacements.
        max_corrupt_share: Share of the source's images that may be unreadable.
    """

    def __init__(self, source: NamedImages, *, seed: int, max_corrupt_share: float) -> None:
        self.source, self.seed, self.max_corrupt_share = source, seed, max_corrupt_share
        # One byte an image, shared with the worker processes. Writing 1 twice is harmless, so no lock is needed.
        self._corrupt = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def read(self, epoch: int, index: int) -> tuple[int, Image.Image]:
        """Return the image at `index`, or its replacement, with the index that it has in the source.

        Raises:
            CorruptImagesError: Past `max_corrupt_share`, or `MAX_ATTEMPTS` unreadable images in a row.
        """
        for candidate in self._candidates(epoch, index):
            try:
                return candidate, self.source.read(candidate)
            except UNREADABLE as error:
                self._record(candidate, error)
        raise CorruptImagesError(
            f"{MAX_ATTEMPTS} images in a row are unreadable, the first is {self.source.name(index)}. "
            "Check the path, the mount and the format. " + self._account()
        )

    def names(self) -> list[str]:
        """Return the names of the unreadable images found so far by this process and its workers."""
        return [self.source.name(int(index)) for index in self._corrupt.nonzero().flatten()]

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        other = np.random.default_rng((REPLACEMENT, self.seed, epoch, index))
        yield from (int(number) for number in other.integers(len(self.source), size=MAX_ATTEMPTS - 1))

    def _record(self, index: int, error: Exception) -> None:
        if self._corrupt[index]:
            return
        self._corrupt[index] = 1
        count = int(self._corrupt.count_nonzero())
        if count > self.max_corrupt_share * len(self.source):
            raise CorruptImagesError(
                self._account() + f" At most max_corrupt_share={self.max_corrupt_share} may be: repair or remove them, "
                "or raise it."
            ) from error
        if count <= NUM_NAMED:
            warnings.warn(
                f"{self.source.name(index)} is unreadable ({error}) and another image takes its place. All such images "
                "are counted; the total is reported at the end.",
                stacklevel=2,
            )

    def _account(self) -> str:
        named = ", ".join(self.names()[:NUM_NAMED])
        return f"{int(self._corrupt.count_nonzero())} of {len(self.source)} images are unreadable ({named}, ...)."

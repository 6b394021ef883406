"""What a segmentation data set is to the rest of this package: images by index, and the class of each of their pixels.

Shapes: H W size of the original image.
"""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from datamodules.batch import Array

# Of pixels that count neither in the loss nor in the metrics.
IGNORE = 255

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes by label: position 0 is label 0."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]  # RGB in [0, 255]
    # The first so many are in the data, the others are outputs of a model that it has no use for. None: all are.
    num_used: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def extended(self, num_classes: int) -> "Classes":
        """Return so many classes, the further ones called `unused_19` and so on."""
        names = tuple(f"unused_{label}" for label in range(len(self), num_classes))
        palette = self.palette + generated_palette(num_classes)[len(self) :]
        return Classes(self.names + names, palette, len(self) if names else None)


class SegmentationSource(Protocol):
    """Annotated images by index, before any transform. Worker processes share it, so it is arrays and bytes inside."""

    @property
    def classes(self) -> Classes:
        """The classes by label."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the RGB image. An error of `sources.UNREADABLE` marks it as corrupt."""

    def mask(self, index: int) -> Array:
        """Return the label of each pixel, `(H, W)` uint8 in [0, num_classes) or `IGNORE`.

        Raises:
            ValueError: It cannot be read, or means nothing: no corrupt file, but a mistake in the data or its settings.
        """

    def image_id(self, index: int) -> str:
        """Return what results are listed under; no two images of a source share it."""

    def name(self, index: int) -> str:
        """Return where the image came from, for messages and predictions."""


def generated_palette(num_classes: int) -> tuple[Colour, ...]:
    """Return different colours for up to 255 classes: PASCAL VOC's colour map without its black.

    Bits 0, 3 and 6 of the class's number are the highest bits of red, 1, 4 and 7 those of green, 2 and 5 those of blue.
    """
    return tuple((_spread(number), _spread(number >> 1), _spread(number >> 2)) for number in range(1, num_classes + 1))


def _spread(number: int) -> int:
    """Make bits 0, 3 and 6 the bits 7, 6 and 5."""
    return (number & 1) << 7 | (number >> 3 & 1) << 6 | (number >> 6 & 1) << 5

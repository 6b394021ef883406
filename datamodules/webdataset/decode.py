"""From an image file in memory to RGB: libjpeg-turbo for plain JPEG, PIL for all else.

The EXIF orientation is not applied, as in `datamodules.sources`. Shapes: H W size of the decoded image.
"""

import io
import math

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.sources import UNREADABLE, to_rgb
from datamodules.webdataset.records import BadSample

# PIL warns of larger images: a small file can decode to gigabytes.
MAX_PIXELS = 89_478_485
# What is opened: formats of photographs that are found under the names of images. PIL knows more, of which one runs a
# program (EPS), and others hold images of another size than their header says (ICO, ICNS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "PPM", "TIFF")
# Of a JPEG. Encoders write about ten, but thousands fit into a small file, and each costs a pass over all pixels.
MAX_SCANS = 500
# Scales at which libjpeg-turbo is faster than in full; at those between, it is slower.
FACTORS = (8, 4, 2)
_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
# Colour spaces that libjpeg-turbo turns into the RGB that PIL gives.
_PLAIN = ("YCbCr", "Gray", "RGB")


class EncodedImage:
    """An image file in memory, whose header is read.

    Args:
        data: The file.
        max_pixels: Larger images are bad.

    Raises:
        BadSample: It is no image, or too large.
    """

    def __init__(self, data: memoryview | bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        self._data, self._image = data, None
        if (size := _plain_jpeg_size(data)) is None:
            self._image = open_image(data)
            size = self._image.height, self._image.width
        self.height, self.width = size
        if self.height * self.width > max_pixels:
            raise BadSample("size", f"{self.height} x {self.width} pixels, at most {max_pixels} may be")
        if bytes(data[:3]) == _JPEG and (scans := bytes(data).count(_SCAN)) > MAX_SCANS:
            raise BadSample("size", f"{scans} scans, at most {MAX_SCANS} may be")

    def factor(self, min_size: tuple[int, int]) -> int:
        """Return how many times smaller the image can be decoded, so that `min_size`, height and width, is left.

        It is 1, and for JPEG also 2, 4 or 8.
        """
        if self._image is not None:
            return 1
        fits = (f for f in FACTORS if self.height // f >= min_size[0] and self.width // f >= min_size[1])
        return next(fits, 1)

    def decode(self, factor: int = 1) -> Array:
        """Return `(H, W, 3)` uint8.

        Args:
            factor: One that `factor` gave; H and W are the image's sides divided by it, rounded up.

        Raises:
            BadSample: It is truncated or broken.
        """
        if self._image is None:
            import simplejpeg

            try:
                return np.asarray(
                    simplejpeg.decode_jpeg(
                        self._data,
                        min_height=math.ceil(self.height / factor),
                        min_width=math.ceil(self.width / factor),
                        min_factor=factor,
                    )
                )
            except ValueError:
                # Some of what it refuses is harmless, as bytes after the end. PIL decides, as elsewhere.
                self._image = open_image(self._data)
        try:
            return np.array(to_rgb(self._image).reduce(factor))
        except UNREADABLE as error:
            raise BadSample("decode", str(error)) from error


def decode(data: memoryview | bytes, *, max_pixels: int = MAX_PIXELS, min_size: tuple[int, int] | None = None) -> Array:
    """Return an image as `(H, W, 3)` uint8, a JPEG perhaps smaller if `min_size` suffices: see `EncodedImage`."""
    image = EncodedImage(data, max_pixels=max_pixels)
    return image.decode(1 if min_size is None else image.factor(min_size))


def _plain_jpeg_size(data: memoryview | bytes) -> tuple[int, int] | None:
    if bytes(data[:3]) != _JPEG:
        return None
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(height), int(width)) if colors in _PLAIN else None


def open_image(data: memoryview | bytes) -> Image.Image:
    """Return an image whose header is read.

    Raises:
        BadSample: It is no image, or absurdly large.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("size", str(error)) from error
    except UNREADABLE as error:
        raise BadSample("decode", str(error)) from error

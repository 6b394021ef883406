"""Images in memory become RGB as PIL has it; what cannot be decoded is a bad sample with its cause."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.sources import to_rgb
from datamodules.webdataset.decode import EncodedImage, decode
from datamodules.webdataset.records import BadSample


def photo(height: int = 120, width: int = 161) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / (7 + k) + y / (11 - k) + k) for k in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def encode(image: Image.Image, form: str, **options: Any) -> memoryview:
    file = io.BytesIO()
    image.save(file, form, **options)
    return memoryview(file.getvalue())


CASES = {
    "jpeg": encode(photo(), "JPEG", quality=90),
    "progressive": encode(photo(), "JPEG", progressive=True),
    "grey jpeg": encode(photo().convert("L"), "JPEG"),
    "cmyk jpeg": encode(photo().convert("CMYK"), "JPEG"),
    "png": encode(photo(), "PNG"),
    "alpha png": encode(photo().convert("RGBA"), "PNG"),
    "palette png": encode(photo().quantize(16), "PNG"),
    "16-bit png": encode(Image.fromarray((np.arange(120 * 161).reshape(120, 161) * 3).astype(np.uint16)), "PNG"),
    "webp": encode(photo(), "WEBP"),
    "bmp": encode(photo(), "BMP"),
    "animated webp": encode(photo(), "WEBP", save_all=True, append_images=[photo().rotate(90)], lossless=True),
}


@pytest.mark.parametrize("case", CASES)
def test_an_image_is_decoded_to_the_pixels_of_pil(case: str) -> None:
    expected = np.asarray(to_rgb(Image.open(io.BytesIO(CASES[case]))))
    found = decode(CASES[case])
    assert (found.shape, found.dtype) == (expected.shape, np.uint8)
    # Two builds of libjpeg-turbo run the same exact arithmetic.
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("least", "size"),
    [((376, 504), (376, 504)), ((188, 252), (188, 252)), ((189, 10), (376, 504)), ((50, 100), (94, 126)),
     ((1, 1), (47, 63))],
)  # fmt: skip
def test_a_jpeg_is_decoded_at_the_smallest_power_of_two_that_suffices(
    least: tuple[int, int], size: tuple[int, int]
) -> None:
    image = photo(376, 504)
    found = decode(encode(image, "JPEG", quality=95), min_size=least)
    assert found.shape == (*size, 3)
    small = np.asarray(image.resize(size[::-1], Image.Resampling.BOX)).astype(float)
    # A scaled inverse DCT is a block mean but for rounding, compression and the half-size chroma.
    assert np.abs(found - small).mean() < 4


def test_the_size_is_known_before_decoding_and_too_many_pixels_are_refused() -> None:
    for data in CASES.values():
        image = EncodedImage(data, max_pixels=120 * 161)
        assert (image.height, image.width) == (120, 161)
        with pytest.raises(BadSample, match="120 x 161") as caught:
            EncodedImage(data, max_pixels=120 * 161 - 1)
        assert caught.value.cause == "size"


def test_a_file_that_pil_itself_takes_for_a_bomb_has_the_cause_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample) as caught:
        decode(CASES["png"])
    assert caught.value.cause == "size"


@pytest.mark.parametrize("case", ["jpeg", "progressive", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_truncated_file_is_a_bad_sample(case: str, share: float) -> None:
    with pytest.raises(BadSample) as caught:
        decode(CASES[case][: int(share * len(CASES[case]))])
    assert caught.value.cause == "decode"


def test_bytes_that_are_no_image_are_a_bad_sample() -> None:
    for data in (b"<html>404</html>", b"\xff\xd8\xff" + bytes(100)):
        with pytest.raises(BadSample) as caught:
            decode(memoryview(data))
        assert caught.value.cause == "decode"


def test_a_jpeg_of_odd_size_that_only_pil_takes_is_as_small_as_any_other() -> None:
    good = encode(photo(121, 163), "JPEG")
    found = decode(memoryview(bytes(good[:-2]) + bytes(50) + b"\xff\xd9"), min_size=(60, 80))
    expected = decode(good, min_size=(60, 80))
    assert found.shape == expected.shape == (61, 82, 3)
    assert np.abs(found.astype(int) - expected).mean() < 4  # see above


def test_bytes_before_the_end_marker_that_libjpeg_only_warns_of_do_not_make_an_image_bad() -> None:
    data = bytes(CASES["jpeg"])
    found = decode(memoryview(data[:-2] + bytes(50) + data[-2:]))
    np.testing.assert_array_equal(found, decode(CASES["jpeg"]))

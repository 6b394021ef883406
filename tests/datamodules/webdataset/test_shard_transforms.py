"""The fast crops have timm's distribution and PIL's pixels, and depend on the draw alone."""

import io
import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.webdataset.crops import NUM_NUMBERS, random_crop
from datamodules.webdataset.records import BadSample, Draw
from datamodules.webdataset.transforms import (
    Albumentations,
    FastEval,
    FastTrain,
    ImageTransform,
    PilTransform,
    TwoViews,
)
from datamodules.webdataset.writers import View

SIZE = 48


def photo(height: int, width: int, stretch: int = 1) -> Image.Image:
    y, x = np.mgrid[:height, :width] / stretch
    waves = [127 + 100 * np.sin(x / (7 + k) + y / (11 - k) + k) for k in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def encode(image: Image.Image, form: str = "PNG") -> memoryview:
    file = io.BytesIO()
    image.save(file, form, quality=95)
    return memoryview(file.getvalue())


def run(transform: ImageTransform, data: memoryview, position: int = 0) -> tuple[Tensor, list[View]]:
    writer = pickle.loads(pickle.dumps(transform.build(SIZE)))  # as a spawned worker gets it
    batch = torch.zeros(3, SIZE, SIZE, 3, dtype=writer.dtype).permute(0, 3, 1, 2)
    views = writer.write(data, Draw(1, 0, 0, position), [batch[1 + view] for view in range(writer.num_views)])
    assert not batch[0].any()
    return batch[1 : 1 + writer.num_views], views


def pixels_of(image: Image.Image, view: View, mode: InterpolationMode) -> Tensor:
    top, left, height, width = (
        round(share * side)
        for share, side in zip(view[:4], (image.height, image.width) * 2, strict=True)
    )  # fmt: skip
    crop = F.resized_crop(image, top, left, height, width, [SIZE, SIZE], mode)
    return F.pil_to_tensor(F.hflip(crop) if view[4] else crop)


@pytest.mark.parametrize(("height", "width"), [(100, 133), (300, 90), (20, 500)])
def test_crops_have_the_distribution_of_timm(height: int, width: int) -> None:
    scale, ratio, count = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    random.seed(0)
    image = Image.new("RGB", (width, height))
    expected = [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]
    found = [
        random_crop(Draw(0, 0, 0, n).uniform(NUM_NUMBERS).tolist(), height, width, scale=scale, ratio=ratio, flip=0.3)
        for n in range(count)
    ]
    for ours, theirs in zip(np.array([crop[:4] for crop in found]).T, np.array(expected).T, strict=True):
        # Two samples of one distribution differ so much once in ten thousand.
        assert ks_2samp(ours, theirs).pvalue > 1e-4
    areas = [[h * w for _, _, h, w in crops] for crops in ([crop[:4] for crop in found], expected)]
    assert ks_2samp(*areas).pvalue > 1e-4
    # Four standard deviations of a share of 0.3 in 4000.
    assert abs(np.mean([crop.flip for crop in found]) - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_crops_of_tiny_and_thin_images_lie_inside_and_are_not_empty(height: int, width: int) -> None:
    for n in range(200):
        crop = random_crop(
            Draw(0, 0, 0, n).uniform(NUM_NUMBERS).tolist(), height, width, scale=(0.08, 1), ratio=(0.75, 4 / 3), flip=0
        )
        assert min(crop.height, crop.width) >= 1
        assert min(crop.top, crop.left) >= 0
        assert crop.top + crop.height <= height
        assert crop.left + crop.width <= width


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_has_the_pixels_of_pils_antialiased_resize(interpolation: str) -> None:
    image = photo(90, 131)
    flips = set()
    for position in range(20):
        rows, [view] = run(FastTrain(interpolation=interpolation), encode(image), position)  # type: ignore[arg-type]
        expected = pixels_of(image, view, InterpolationMode(interpolation))
        # Both round fixed-point sums to 8 bits twice, in either order of the axes.
        assert (rows[0].int() - expected.int()).abs().max() <= 2
        flips.add(view[4])
    assert flips == {0.0, 1.0}


def test_a_crop_of_a_large_jpeg_decoded_smaller_looks_the_same() -> None:
    data = encode(photo(701, 931, stretch=8), "JPEG")
    decoded = Image.open(io.BytesIO(data))
    for position in range(10):
        rows, [view] = run(FastTrain(scale=(0.3, 1.0)), data, position)
        expected = pixels_of(decoded, view, InterpolationMode.BICUBIC)
        # A block mean blurs a little more than the bicubic kernel. A shift by one pixel of the batch makes 4 and more.
        assert (rows[0].float() - expected.float()).abs().mean() < 2
        assert (rows[0].float() - expected.roll(1, dims=2).float()).abs().mean() > 4


def test_two_views_are_two_independent_crops_of_the_image_that_their_geometry_tells() -> None:
    image = photo(90, 131)
    rows, views = run(TwoViews(), encode(image), 3)
    assert len(views) == 2
    assert views[0] != views[1]
    for row, view in zip(rows, views, strict=True):
        expected = pixels_of(image, view, InterpolationMode.BICUBIC)
        assert (row.int() - expected.int()).abs().max() <= 2  # see above
    # The first view is that of `FastTrain`.
    assert run(FastTrain(), encode(image), 3)[1] == views[:1]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (20, 30), (48, 48)])
def test_evaluation_has_torchvisions_resize_and_centre(crop_pct: float, height: int, width: int) -> None:
    image = photo(height, width)
    rows, [view] = run(FastEval(crop_pct=crop_pct), encode(image))
    resized = F.resize(image, [round(SIZE / crop_pct)], InterpolationMode.BICUBIC)
    expected = F.pil_to_tensor(F.center_crop(resized, [SIZE, SIZE]))
    assert (rows[0].int() - expected.int()).abs().max() <= 2  # see above
    assert view[4] == 0
    assert view[2] == pytest.approx(SIZE / resized.height)


def test_the_pipelines_of_image_folders_give_the_same_floats_on_shards() -> None:
    image = photo(90, 131)
    for settings in (EvalTransform(), TrainTransform()):
        rows, _ = run(PilTransform(transform=settings), encode(image), 5)
        seed = Draw(1, 0, 0, 5).sequence()
        torch.testing.assert_close(rows[0], settings.build(SIZE)(image, seed), rtol=0, atol=0)


def test_an_image_that_a_padding_pipeline_cannot_take_is_a_bad_sample() -> None:
    with pytest.raises(BadSample) as caught:
        run(PilTransform(transform=EvalTransform(fit="pad")), encode(photo(60, 60)))
    assert caught.value.cause == "size"


def test_a_pipeline_of_albumentations_runs_from_its_dict_and_from_its_file(tmp_path: object) -> None:
    steps = A.Compose([A.RandomResizedCrop((SIZE, SIZE)), A.ColorJitter(p=1.0)])
    path = f"{tmp_path}/steps.json"
    A.save(steps, path)
    data = encode(photo(90, 131))
    first, _ = run(Albumentations(transform=A.to_dict(steps)), data, 1)
    again, _ = run(Albumentations(transform=path), data, 1)  # type: ignore[arg-type]  # jsonargparse makes paths of it
    other, _ = run(Albumentations(transform=A.to_dict(steps)), data, 2)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_pipeline_that_leaves_another_size_is_refused_before_training() -> None:
    steps = A.to_dict(A.Compose([A.HorizontalFlip()]))
    with pytest.raises(ValueError, match="End it with a crop or a resize"):
        Albumentations(transform=steps).build(SIZE)


def test_a_broken_image_is_a_bad_sample_for_every_transform() -> None:
    steps = A.to_dict(A.Compose([A.Resize(SIZE, SIZE)]))
    for transform in (
        FastTrain(), FastEval(), TwoViews(), PilTransform(transform=EvalTransform()), Albumentations(transform=steps)
    ):  # fmt: skip
        with pytest.raises(BadSample) as caught:
            run(transform, encode(photo(90, 131))[:2000])
        assert caught.value.cause == "decode"


def test_settings_out_of_range_are_refused() -> None:
    for make in (
        lambda: FastTrain(flip=1.5), lambda: FastTrain(scale=(0.5, 1.2)), lambda: TwoViews(ratio=(2.0, 1.0)),
        lambda: FastEval(crop_pct=0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            make()

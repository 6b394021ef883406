import pickle

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from datamodules.segmentation.distortion import distort
from datamodules.segmentation.pipeline import MAX_CROPS, EvalPipeline, TrainPipeline, draw_crop
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform

PLAIN = {"distortion": False, "flip": 0.0, "ratio": (1.0, 1.0), "cat_max_ratio": 1.0}


def seed(number):
    return np.random.SeedSequence(number)


def picture(height, width, number=0):
    coarse = np.random.default_rng(number).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def labels(height, width, number=0):
    coarse = np.random.default_rng((number, 1)).integers(0, 5, (height // 5 + 1, width // 5 + 1), dtype=np.uint8)
    mask = np.kron(coarse, np.ones((5, 5), np.uint8))[:height, :width]
    mask[mask == 4] = 255
    return mask


def normal(pixels):
    scaled = (pixels.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return torch.from_numpy(scaled.transpose(2, 0, 1))


def same(tensor, pixels):
    # float32 against float64: a few units in the last place of numbers below 3.
    return (tensor.double() - normal(pixels)).abs().max() < 1e-6


class TestTrain:
    def test_the_whole_image_is_resized_and_padded_with_zeros_and_255(self):
        image, mask = picture(60, 90), labels(60, 90)
        pipeline = SegmentationTrainTransform(short_side=40, long_side=70, crop=(64, 80), **PLAIN).build()
        sample = pipeline(image, mask, seed(0))
        # min(40 / 60, 70 / 90) = 2 / 3
        expected = cv2.resize(np.asarray(image), (60, 40), interpolation=cv2.INTER_LINEAR)
        assert same(sample["image"][:, :40, :60], expected)
        nearest = cv2.resize(mask, (60, 40), interpolation=cv2.INTER_NEAREST)
        assert sample["mask"][:40, :60].tolist() == nearest.tolist()
        assert sample["image"].shape == (3, 64, 80)
        assert sample["image"].dtype == torch.float32
        assert sample["mask"].dtype == torch.uint8
        assert not sample["image"][:, 40:].any()
        assert not sample["image"][:, :, 60:].any()
        assert (sample["mask"][40:] == 255).all()
        assert (sample["mask"][:, 60:] == 255).all()

    def test_a_sample_is_a_part_of_the_resized_image_flipped_or_not(self):
        image, mask = picture(60, 90), labels(60, 90)
        pipeline = SegmentationTrainTransform(
            short_side=60, long_side=90, crop=(32, 40), **{**PLAIN, "flip": 0.5}
        ).build()
        pixels, kinds = np.asarray(image), set()
        for number in range(12):
            sample = pipeline(image, mask, seed(number))
            places = [
                (top, left, flip)
                for flip in (False, True)
                for top in range(29)
                for left in range(51)
                if np.array_equal(window(mask, top, left, flip), sample["mask"].numpy())
                and same(sample["image"], window(pixels, top, left, flip))
            ]
            assert len(places) == 1
            kinds.add(places[0])
        assert len(kinds) == 12
        assert {flip for *_, flip in kinds} == {False, True}

    def test_the_ratio_covers_its_range(self):
        image, mask = picture(50, 80), np.ones((50, 80), np.uint8)
        pipeline = SegmentationTrainTransform(
            short_side=50, long_side=80, crop=(200, 200), **{**PLAIN, "ratio": (0.5, 2.0)}
        ).build()
        heights = [int((pipeline(image, mask, seed(number))["mask"] == 1).any(1).sum()) for number in range(200)]
        # 200 draws from [25, 100): each end is missed by 4 with probability exp(-10).
        assert 25 <= min(heights) < 29
        assert 95 < max(heights) <= 100
        assert abs(np.mean(heights) - 62.5) < 6

    def test_the_longer_side_has_its_limit(self):
        pipeline = SegmentationTrainTransform(short_side=64, long_side=96, crop=(64, 96), **PLAIN).build()
        sample = pipeline(picture(30, 120), np.zeros((30, 120), np.uint8), seed(0))
        assert (sample["mask"] == 0).sum() == 24 * 96

    def test_it_depends_on_the_seed_alone(self):
        image, mask = picture(60, 90), labels(60, 90)
        pipeline = SegmentationTrainTransform(short_side=60, long_side=90, crop=(48, 48)).build()
        first = pipeline(image, mask, seed(3))
        np.random.default_rng(0).random(9)
        again = pickle.loads(pickle.dumps(pipeline))(image, mask, seed(3))
        other = pipeline(image, mask, seed(4))
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["mask"], again["mask"])
        assert not torch.equal(first["image"], other["image"])
        assert isinstance(pipeline, TrainPipeline)

    def test_the_input_is_left_as_it_was(self):
        image, mask = picture(60, 90), labels(60, 90)
        before = np.asarray(image).copy(), mask.copy()
        SegmentationTrainTransform(short_side=60, long_side=90, crop=(48, 48)).build()(image, mask, seed(1))
        assert np.array_equal(np.asarray(image), before[0])
        assert np.array_equal(mask, before[1])


def window(array, top, left, flip):
    part = array[top : top + 32, left : left + 40]
    return part[:, ::-1] if flip else part


def is_varied(mask, limit):
    values, counts = np.unique(mask, return_counts=True)
    counts = counts[values != 255]
    return len(counts) > 1 and counts.max() / counts.sum() < limit


class TestCatMaxRatio:
    # A tenth of the image is of class 1, a tenth is ignored: few crops show both classes well.
    MASK = np.zeros((40, 200), np.uint8)
    MASK[:, 90:110] = 1
    MASK[:, 120:140] = 255

    def test_the_first_varied_crop_of_ten_is_taken_else_the_eleventh(self):
        outcomes = set()
        for number in range(60):
            draws, found = np.random.default_rng(number), None
            for attempt in range(MAX_CROPS + 1):
                top, left = int(draws.integers(40 - 20 + 1)), int(draws.integers(200 - 30 + 1))
                found = (left, top, left + 30, top + 20)
                if attempt < MAX_CROPS and is_varied(self.MASK[top : top + 20, left : left + 30], 0.75):
                    break
            outcomes.add(attempt)
            assert draw_crop(self.MASK, (20, 30), 0.75, np.random.default_rng(number)) == found
        assert outcomes >= {0, 1, MAX_CROPS}

    def test_crops_of_one_class_become_rare(self):
        crops = [draw_crop(self.MASK, (20, 30), 0.75, np.random.default_rng(number)) for number in range(100)]
        free = [draw_crop(self.MASK, (20, 30), 1.0, np.random.default_rng(number)) for number in range(100)]
        varied, by_chance = (
            sum(is_varied(self.MASK[top:bottom, left:right], 0.75) for left, top, right, bottom in some)
            for some in (crops, free)
        )
        # By chance p is about 0.2, in ten attempts 1 - 0.8 ** 10 = 0.89; five standard deviations of 100 draws.
        assert by_chance < 45
        assert varied > 70

    def test_an_image_that_is_ignored_everywhere_still_gives_a_crop(self):
        assert draw_crop(np.full((20, 20), 255, np.uint8), (20, 20), 0.75, np.random.default_rng(0)) == (0, 0, 20, 20)


class Replay:
    """Gives the numbers that it was made with, in turn."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def integers(self, *_):
        return self.numbers.pop(0)

    uniform = integers


def scaled(values, factor=1.0, offset=0.0):
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def hsv_changed(pixels, channel, change):
    # From BGR, as mmseg has it.
    hsv = cv2.cvtColor(pixels[..., ::-1].copy(), cv2.COLOR_BGR2HSV)
    hsv[..., channel] = change(hsv[..., channel])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[..., ::-1]


class TestDistortion:
    PIXELS = np.asarray(picture(40, 50, number=5))

    @pytest.mark.parametrize("offset", [-31.7, 12.3])
    def test_brightness(self, offset):
        changed = distort(self.PIXELS, Replay(1, offset, 1, 0, 0, 0))
        assert np.array_equal(changed, scaled(self.PIXELS, offset=offset))

    @pytest.mark.parametrize("draws", [(0, 1, 1, 1.37, 0, 0), (0, 0, 0, 0, 1, 1.37)])
    def test_contrast_alone(self, draws):
        replay = Replay(*draws)
        assert np.array_equal(distort(self.PIXELS, replay), scaled(self.PIXELS, 1.37))
        assert replay.numbers == []

    def test_saturation(self):
        changed = distort(self.PIXELS, Replay(0, 1, 0, 1, 0.61, 0))
        assert np.array_equal(changed, hsv_changed(self.PIXELS, 1, lambda values: scaled(values, 0.61)))

    @pytest.mark.parametrize("shift", [-18, 17])
    def test_hue_turns_around(self, shift):
        changed = distort(self.PIXELS, Replay(0, 1, 0, 0, 1, shift))
        assert np.array_equal(changed, hsv_changed(self.PIXELS, 0, lambda values: (values.astype(int) + shift) % 180))

    @pytest.mark.parametrize("contrast_second", [True, False])
    def test_all_in_order(self, contrast_second):
        middle = (1, 1.2, 1, -9)
        draws = (1, 20.5, 1, 1, 0.8, *middle) if contrast_second else (1, 20.5, 0, *middle, 1, 0.8)
        expected = scaled(self.PIXELS, offset=20.5)
        if contrast_second:
            expected = scaled(expected, 0.8)
        expected = hsv_changed(expected, 1, lambda values: scaled(values, 1.2))
        expected = hsv_changed(expected, 0, lambda values: (values.astype(int) - 9) % 180)
        if not contrast_second:
            expected = scaled(expected, 0.8)
        assert np.array_equal(distort(self.PIXELS, Replay(*draws)), expected)

    def test_one_in_sixteen_stays_as_it_is(self):
        unchanged = sum(
            np.array_equal(distort(self.PIXELS, np.random.default_rng(number)), self.PIXELS) for number in range(400)
        )
        # 400 / 16 = 25, five standard deviations are 24; hue and saturation of some are too small to see.
        assert 2 <= unchanged <= 49


class TestEval:
    def test_the_image_is_resized_twice(self):
        image = picture(60, 90)
        views = SegmentationEvalTransform(short_side=40, long_side=200).build()(image)
        once = cv2.resize(np.asarray(image), (60, 40), interpolation=cv2.INTER_LINEAR)
        assert len(views) == 1
        assert same(views[0]["image"], cv2.resize(once, (64, 64), interpolation=cv2.INTER_LINEAR))
        (plain,) = SegmentationEvalTransform(short_side=40, long_side=200, multiple=None).build()(image)
        assert same(plain["image"], once)

    @pytest.mark.parametrize(
        ("size", "limits", "multiple", "expected"),
        [
            ((1024, 2048), (1024, 2048), 32, (1024, 2048)),  # Cityscapes
            ((512, 683), (512, 2048), None, (512, 683)),  # ADE20K
            ((512, 683), (512, 2048), 32, (512, 704)),
            ((480, 640), (480, 640), 32, (480, 640)),  # NYU Depth
            ((375, 500), (520, 4096), 32, (544, 704)),  # PASCAL Context: 693.33 rounds to 693
            ((100, 900), (512, 2048), None, (228, 2048)),  # the longer side decides: 227.56
        ],
    )
    def test_sizes_are_the_authors(self, size, limits, multiple, expected):
        transform = SegmentationEvalTransform(short_side=limits[0], long_side=limits[1], multiple=multiple)
        (view,) = transform.build()(Image.new("RGB", size[::-1]))
        assert tuple(view["image"].shape[1:]) == expected

    def test_views_are_scales_and_flips_the_plain_one_first(self):
        image = picture(60, 90)
        transform = SegmentationEvalTransform(
            short_side=60, long_side=90, multiple=10, extra_scales=(0.5, 1.5), extra_flip=True
        )
        views = transform.build()(image)
        assert isinstance(transform.build(), EvalPipeline)
        sizes = [tuple(view["image"].shape[1:]) for view in views]
        assert sizes == [(60, 90), (60, 90), (30, 50), (30, 50), (90, 140), (90, 140)]
        assert [view["flipped"] for view in views] == [False, True] * 3
        assert same(views[0]["image"], np.asarray(image))
        for straight, flipped in zip(views[::2], views[1::2], strict=True):
            assert torch.equal(straight["image"].flip(-1), flipped["image"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SegmentationTrainTransform, {"short_side": 0}, r"short_side=0, expected positive"),
        (SegmentationTrainTransform, {"crop": (0, 5)}, r"crop=0, expected positive"),
        (SegmentationTrainTransform, {"ratio": (2.0, 1.0)}, r"ratio=\(2.0, 1.0\), expected \(low, high\)"),
        (SegmentationTrainTransform, {"cat_max_ratio": 0.0}, r"cat_max_ratio=0.0, expected a share"),
        (SegmentationTrainTransform, {"flip": 1.5}, r"flip=1.5, expected a probability"),
        (SegmentationTrainTransform, {"std": (1.0, 0.0, 1.0)}, r"std=.*, expected three positive"),
        (SegmentationEvalTransform, {"long_side": -1}, r"long_side=-1, expected positive"),
        (SegmentationEvalTransform, {"multiple": -32}, r"multiple=-32, expected positive"),
        (SegmentationEvalTransform, {"extra_scales": (1.5, 0.0)}, r"extra_scales=\(1.5, 0.0\), expected positive"),
        (SegmentationEvalTransform, {"std": (-1.0, 1.0, 1.0)}, r"std=.*, expected three positive"),
    ],
)
def test_wrong_settings_are_errors(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)

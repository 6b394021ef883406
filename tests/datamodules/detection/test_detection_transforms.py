import pickle
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from pycocotools import mask as coco_mask

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from datamodules.detection.data import DetectionData
from datamodules.detection.pipeline import Plan, apply_plan, apply_to_masks, draw_plan, normalised
from datamodules.detection.records import Objects
from datamodules.detection.transforms import (
    MULTI_SCALE,
    TRAIN_1X,
    TRAIN_3X,
    TRAIN_DINO,
    TRAIN_LARGE,
    DetectionEvalTransform,
    DetectionTrainTransform,
    PixelChange,
    RandomCrop,
    resized,
)
from datamodules.orders import Balance, ClassAware, RepeatFactor


def photo(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_CUBIC)


def rectangles(height, width, count, seed=0):
    """`count` whole-pixel rectangles inside an image: their boxes, and their masks as run lengths."""
    random = np.random.default_rng(seed)
    x = np.sort(random.choice(np.arange(0, width + 1, 4), (count, 2)), axis=1)
    y = np.sort(random.choice(np.arange(0, height + 1, 4), (count, 2)), axis=1)
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1] + 4, y[:, 1] + 4], axis=1).clip(0, [width, height] * 2)
    boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - 4)
    masks = []
    for left, top, right, bottom in boxes:
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        mask[top:bottom, left:right] = 1
        masks.append(coco_mask.encode(mask))
    return boxes.astype(np.float64), masks


def objects_of(boxes, masks=None, crowd=()):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    marked = np.isin(np.arange(len(boxes)), list(crowd))
    labels = np.arange(len(boxes), dtype=np.int64)
    return Objects(np.concatenate([boxes[:, :2], sides], 1), labels, sides.prod(1), marked, masks)


def seeded(*words):
    return np.random.SeedSequence(words)


def extent(mask):
    """Box of the pixels that are set, xyxy."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


STILL = {"flip": 0.0, "short_sides": (100,), "long_side": 200}


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        # Of mmcv's `rescale_size`. A rule that cuts the fraction off would give 1066 for the first.
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((333, 1000), (800, 1333), (444, 1333)),
        ((1080, 1920), (800, 1333), (750, 1333)),
        ((480, 640), (1000, 2000), (1000, 1333)),
        ((800, 1333), (800, 1333), (800, 1333)),
        ((1, 5000), (800, 1333), (1, 1333)),
    ],
)
def test_sizes_are_rounded_as_mmdet_does(size, limits, expected):
    assert resized(*size, *limits) == expected


@pytest.mark.parametrize("size", [(60, 80), (81, 64), (150, 200), (128, 31)])
def test_evaluation_has_the_pixels_of_opencvs_bilinear_resize(size):
    pixels = photo(*size)
    height, width = resized(*size, 100, 140)
    expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    (view,) = DetectionEvalTransform(short_side=100, long_side=140).build()(Image.fromarray(pixels))
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.equal(view["image"], (torch.from_numpy(expected).permute(2, 0, 1) / 255 - mean) / std)
    assert view["image"].is_contiguous()
    assert view["flipped"] is False


def test_test_time_augmentation_has_every_size_plain_and_flipped_and_the_plain_one_first():
    image = Image.fromarray(photo(60, 80))
    transform = DetectionEvalTransform(short_side=90, long_side=200, extra_sizes=((120, 150),), extra_flip=True)
    views = transform.build()(image)
    assert [(*view["image"].shape[1:], view["flipped"]) for view in views] == [
        (90, 120, False),
        (90, 120, True),
        (113, 150, False),
        (113, 150, True),
    ]
    for plain, flipped in (views[:2], views[2:]):
        assert torch.equal(flipped["image"], plain["image"].flip(2))
    (alone,) = DetectionEvalTransform(short_side=90, long_side=200).build()(image)
    assert torch.equal(alone["image"], views[0]["image"])


@pytest.mark.parametrize("transform", [TRAIN_3X, TRAIN_DINO, TRAIN_LARGE, TRAIN_1X], ids=["3x", "dino", "large", "1x"])
def test_boxes_stay_tight_around_their_masks_whatever_is_drawn(transform):
    height, width, cropped = 120, 160, 0
    # Sizes at a fifth, for speed.
    small = DetectionTrainTransform(
        short_sides=tuple(side // 5 for side in transform.short_sides),
        long_side=transform.long_side // 5,
        choose=transform.choose,
        crop=transform.crop
        and RandomCrop(short_sides=(80, 100, 120), sides=(77, 120), keep_empty=transform.crop.keep_empty),
        min_box_size=2.0,
    )
    pipeline = small.build(masks=True)
    for number in range(40):
        boxes, masks = rectangles(height, width, 6, seed=number)
        sample = pipeline(Image.fromarray(photo(height, width)), objects_of(boxes, masks), seeded(number))
        assert sample["boxes"].dtype == torch.float32
        assert sample["labels"].dtype == torch.int64
        assert sample["masks"].dtype == torch.uint8
        assert sample["masks"].shape == (len(sample["boxes"]), *sample["image"].shape[1:])
        assert len(sample["labels"]) == len(sample["boxes"])
        cropped += len(sample["boxes"]) < 6
        shape = sample["image"].shape[1:]
        # Where objects were cut, the image was resized twice, and either time a nearest pixel may be one off. A pixel
        # of the first resize is as large as the second makes it.
        tolerance = 1 + max(shape) / 77 if small.crop else 1 + max(shape) / width
        for box, mask in zip(sample["boxes"].tolist(), sample["masks"].numpy(), strict=True):
            assert set(np.unique(mask)) == {0, 1}
            assert np.abs(np.array(extent(mask)) - box).max() <= tolerance
            assert min(box) >= 0
            assert box[2] <= shape[1]
            assert box[3] <= shape[0]
            assert min(box[2] - box[0], box[3] - box[1]) >= 2.0 - 1e-3
    assert (cropped > 0) == (small.crop is not None)


def test_a_crop_and_a_flip_move_boxes_and_masks_as_arithmetic_says():
    pixels = photo(100, 200)
    boxes = np.array([[20, 10, 80, 50], [150, 60, 190, 100], [0, 0, 200, 100]], dtype=np.float64)
    masks = []
    for left, top, right, bottom in boxes.astype(int):
        mask = np.zeros((100, 200), dtype=np.uint8, order="F")
        mask[top:bottom, left:right] = 1
        masks.append(coco_mask.encode(mask))
    plan = Plan((160, 240), True, before_crop=(50, 100), crop=(20, 5, 80, 45))
    changed, moved, kept = apply_plan(plan, pixels, boxes, min_box_size=1.0)
    assert changed.shape == (160, 240, 3)
    expected = cv2.resize(pixels, (100, 50))[5:45, 20:80]
    np.testing.assert_array_equal(changed, cv2.resize(expected, (240, 160))[:, ::-1])
    # Half the size, 20 and 5 off, cut to 60 x 40, four times the size, mirrored in 240: the first box runs from 10 to
    # 40, from -10 to 20, from 0 to 80, from 160 to 240. The second, from 75 to 95, stays from 55 to 60.
    assert kept.tolist() == [0, 1, 2]
    np.testing.assert_allclose(moved, [[160, 0, 240, 80], [0, 100, 20, 160], [0, 0, 240, 160]], atol=1e-4)
    for mask, box in zip(apply_to_masks(plan, masks), moved, strict=True):
        np.testing.assert_allclose(extent(mask), box, atol=1e-4)


def test_masks_have_the_pixels_of_opencvs_nearest_neighbour():
    blob = (cv2.GaussianBlur(photo(90, 120)[..., 0], (9, 9), 0) > 127).astype(np.uint8)
    (changed,) = apply_to_masks(Plan((143, 191), flip=True), [coco_mask.encode(np.asfortranarray(blob))])
    expected = cv2.resize(blob, (191, 143), interpolation=cv2.INTER_NEAREST)[:, ::-1]
    np.testing.assert_array_equal(changed, expected)


def test_objects_cut_off_take_their_labels_and_masks_with_them():
    boxes, masks = [[0, 0, 20, 20], [50, 40, 90, 80], [10, 10, 90, 90], [99.5, 0, 100, 30]], []
    for left, top, right, bottom in np.array(boxes).round().astype(int):
        mask = np.zeros((100, 100), dtype=np.uint8, order="F")
        mask[top:bottom, left:right] = 1
        masks.append(coco_mask.encode(mask))
    plan = Plan((50, 50), before_crop=(100, 100), crop=(50, 0, 100, 50))
    _, moved, kept = apply_plan(plan, photo(100, 100), np.array(boxes), min_box_size=1.0)
    assert kept.tolist() == [1, 2]
    np.testing.assert_allclose(moved, [[0, 40, 40, 50], [0, 10, 40, 50]], atol=1e-4)
    assert apply_to_masks(plan, [masks[index] for index in kept]).sum((1, 2)).tolist() == [400, 1600]


def test_boxes_over_the_border_and_without_extent_are_cut_or_dropped_and_are_no_error():
    boxes = [[-0.01, 0, 50.01, 40], [90, 90, 100.01, 100.01], [10, 10, 10, 30], [120, 10, 130, 20], [-5, -5, 200, 200]]
    sample = DetectionTrainTransform(**STILL).build(masks=False)(
        Image.fromarray(photo(100, 100)), objects_of(boxes), seeded(0)
    )
    assert sample["labels"].tolist() == [0, 1, 4]
    expected = torch.tensor([[0, 0, 50.01, 40], [90, 90, 100, 100], [0, 0, 100, 100]], dtype=torch.float32)
    torch.testing.assert_close(sample["boxes"], expected, rtol=0, atol=1e-4)
    assert "masks" not in sample


def test_an_image_without_objects_and_one_with_crowds_only_have_empty_targets():
    image = Image.fromarray(photo(50, 100))
    boxes, masks = rectangles(50, 100, 2)
    for objects in (objects_of([], []), objects_of(boxes, masks, crowd=[0, 1])):
        for transform in (DetectionTrainTransform(**STILL), TRAIN_DINO):
            sample = transform.build(masks=True)(image, objects, seeded(1))
            assert sample["boxes"].shape == (0, 4)
            assert sample["labels"].shape == (0,)
            assert sample["masks"].shape == (0, *sample["image"].shape[1:])
            assert [sample[key].dtype for key in ("boxes", "labels", "masks")] == [
                torch.float32,
                torch.int64,
                torch.uint8,
            ]


def test_crowds_are_left_out():
    boxes, masks = rectangles(50, 100, 3)
    sample = DetectionTrainTransform(**STILL).build(masks=True)(
        Image.fromarray(photo(50, 100)), objects_of(boxes, masks, crowd=[1]), seeded(0)
    )
    assert sample["labels"].tolist() == [0, 2]


def plans(transform, size=(480, 640), boxes=(), count=2000):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return [draw_plan(transform, *size, boxes, np.random.default_rng(number)) for number in range(count)]


def test_the_policy_of_the_detection_transformers_is_drawn_as_published():
    drawn = plans(TRAIN_3X)
    plain, cropped = [plan for plan in drawn if plan.crop is None], [plan for plan in drawn if plan.crop is not None]
    # Standard error of a fair share of 2000 is 1/90: 4 of them.
    assert abs(len(cropped) / 2000 - 0.5) < 4 / 90
    assert abs(np.mean([plan.flip for plan in drawn]) - 0.5) < 4 / 90
    assert {min(plan.size) for plan in plain} == set(MULTI_SCALE) == {480 + 32 * step for step in range(11)}
    assert {plan.before_crop for plan in cropped} == {(400, 533), (500, 667), (600, 800)}
    for plan in cropped:
        left, top, right, bottom = plan.crop
        assert 384 <= bottom - top <= min(600, plan.before_crop[0])
        assert 384 <= right - left <= min(600, plan.before_crop[1])
        assert min(left, top) >= 0
        assert right <= plan.before_crop[1]
        assert bottom <= plan.before_crop[0]
        assert plan.size in {resized(bottom - top, right - left, side, 1333) for side in MULTI_SCALE}
    assert {plan.crop[2] - plan.crop[0] for plan in cropped} >= {384, 600}  # both ends are drawn


def test_small_images_are_cropped_to_no_more_than_they_have():
    for plan in plans(TRAIN_3X, size=(100, 2000), count=200):
        if plan.crop is not None:
            # Limited by the longer side: 1333.
            assert plan.before_crop == (67, 1333)
            assert plan.crop[3] - plan.crop[1] == 67
    before = {plan.before_crop for plan in plans(TRAIN_DINO, size=(100, 1000), count=200) if plan.crop}
    assert before == {(400, 4000), (420, 4200)}


def test_the_large_range_is_uniform_over_whole_numbers():
    sides = np.array([min(plan.size) for plan in plans(TRAIN_LARGE, size=(500, 500))])
    assert sides.min() < 610
    assert sides.max() > 1790
    # Mean and standard error of the uniform distribution from 600 to 1800.
    assert abs(sides.mean() - 1200) < 4 * 1200 / 12**0.5 / 2000**0.5
    assert max(max(plan.size) for plan in plans(TRAIN_LARGE, size=(300, 900), count=100)) == 2000
    between = plans(DetectionTrainTransform(short_sides=(7, 9), choose="between"), size=(5, 5), count=200)
    assert {plan.size[0] for plan in between} == {7, 8, 9}


def test_dino_draws_crops_until_one_has_an_object_and_mask_rcnn_does_not():
    corner = [[0, 0, 30, 30]]

    def share_left(transform):
        left = [
            len(apply_plan(plan, np.zeros((480, 640, 3), np.uint8), np.array(corner, float), 1.0)[2]) > 0
            for plan in plans(transform, boxes=corner, count=60)
        ]
        return np.mean(left)

    assert share_left(TRAIN_DINO) == 1
    assert share_left(TRAIN_3X) < 0.9
    # Both throw the same coin, and where it says crop one is found.
    cropped = [
        [plan.crop is not None for plan in plans(each, boxes=corner, count=60)] for each in (TRAIN_DINO, TRAIN_3X)
    ]
    assert cropped[0] == cropped[1]
    assert any(cropped[0])
    # Where no crop can have one, the whole image is taken.
    speck = [[10, 10, 10.1, 10.1]]
    assert all(plan.crop is None for plan in plans(TRAIN_DINO, boxes=speck, count=60))


def test_a_seed_decides_the_sample():
    image, (boxes, masks) = Image.fromarray(photo(96, 128)), rectangles(96, 128, 4)
    pixels = (PixelChange(name="ColorJitter", options={"p": 1.0}), PixelChange(name="GaussNoise", options={"p": 0.5}))
    transform = DetectionTrainTransform(
        short_sides=(64, 80, 96), crop=RandomCrop(short_sides=(64, 90), sides=(50, 80)), pixels=pixels
    )
    pipeline = transform.build(masks=True)
    samples = [pipeline(image, objects_of(boxes, masks), seeded(number)) for number in range(6)]
    copy = pickle.loads(pickle.dumps(pipeline))
    for number in reversed(range(6)):
        again = copy(image, objects_of(boxes, masks), seeded(number))
        assert all(torch.equal(again[key], samples[number][key]) for key in again)
    assert any(first["image"].shape != second["image"].shape for first, second in pairwise(samples))


def test_pixel_changes_change_pixels_only_and_differ_by_seed():
    image, boxes = Image.fromarray(photo(100, 200)), rectangles(100, 200, 3)[0]
    plain = DetectionTrainTransform(**STILL).build(masks=False)
    change = PixelChange(name="RandomBrightnessContrast", options={"p": 1.0})
    changed = DetectionTrainTransform(**STILL, pixels=(change,)).build(masks=False)
    samples = [changed(image, objects_of(boxes), seeded(number)) for number in range(3)]
    expected = plain(image, objects_of(boxes), seeded(0))
    for sample in samples:
        assert torch.equal(sample["boxes"], expected["boxes"])
        assert not torch.equal(sample["image"], expected["image"])
    assert not torch.equal(samples[0]["image"], samples[1]["image"])
    for name in ("HorizontalFlip", "Compose", "NoSuchThing"):
        with pytest.raises(ValueError, match=rf"PixelChange: name='{name}'.*ColorJitter"):
            DetectionTrainTransform(pixels=(PixelChange(name=name),)).build(masks=False)


def test_normalisation_takes_the_settings():
    pixels = np.full((4, 6, 3), 51, dtype=np.uint8)
    tensor = normalised(pixels, (0.1, 0.2, 0.0), (0.1, 0.5, 2.0))
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, 0.0, 0.1]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DetectionTrainTransform(flip=1.5), r"flip=1.5.*\[0, 1\]"),
        (lambda: DetectionTrainTransform(short_sides=()), r"short_sides=\(\)"),
        (lambda: DetectionTrainTransform(short_sides=(800, 600), choose="between"), r"short_sides=.*low <= high"),
        (lambda: DetectionTrainTransform(short_sides=(600, 700, 800), choose="between"), r"\(low, high\)"),
        (lambda: DetectionTrainTransform(min_box_size=0.0), "min_box_size=0.0"),
        (lambda: DetectionTrainTransform(std=(0.0, 1.0, 1.0)), "std="),
        (lambda: RandomCrop(sides=(600, 384)), r"RandomCrop: sides="),
        (lambda: RandomCrop(probability=-0.1), "probability=-0.1"),
        (lambda: DetectionEvalTransform(short_side=0), "short_side=0, expected positive"),
        (lambda: DetectionEvalTransform(extra_sizes=((0, 5),)), "extra_sizes="),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_argument_is_reachable_from_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(DetectionData, "data", skip={"num_workers"})
    config = tmp_path / "data.yaml"
    config.write_text(
        """
data:
  num_classes: 1203
  batch_size: 1
  masks: false
  balance: {class_path: datamodules.orders.RepeatFactor, init_args: {threshold: 0.01}}
  train_transform:
    short_sides: [600, 1200]
    choose: between
    long_side: 2000
    crop: {keep_empty: false, long_side: 4200}
    pixels:
      - {name: ColorJitter, options: {p: 0.5}}
  eval_transform: {short_side: 1000, long_side: 2000, extra_sizes: [[1200, 2400]], extra_flip: true}
  predict_paths: [a.jpg, folder]
"""
    )
    parsed = parser.parse_path(config)
    datamodule = parser.instantiate(parsed).data
    assert datamodule.balance == RepeatFactor(threshold=0.01)
    assert isinstance(datamodule.balance, Balance)
    assert datamodule.train_transform.crop == RandomCrop(keep_empty=False, long_side=4200)
    assert datamodule.train_transform.short_sides == (600, 1200)
    assert datamodule.train_transform.pixels[0].options == {"p": 0.5}
    assert datamodule.eval_transform.extra_sizes == ((1200, 2400),)
    assert datamodule.group_by_aspect is True
    by_class = parser.parse_args(["--data.num_classes=601", "--data.balance=datamodules.orders.ClassAware"])
    assert parser.instantiate(by_class).data.balance == ClassAware()

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torchvision import transforms as tv

from datamodules import EvalTransform, TrainTransform
from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD


def photo(height=75, width=100, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def seeded(*words):
    return np.random.SeedSequence(words)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(75, 100), (101, 64), (48, 48), (333, 50)])
def test_evaluation_gives_the_bits_of_torchvisions_pil_transform(size, crop_pct):
    theirs = tv.Compose(
        [
            tv.Resize(round(48 / crop_pct), interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(48),
            tv.ToTensor(),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    image = photo(*size)
    assert torch.equal(EvalTransform(crop_pct=crop_pct).build(48)(image), theirs(image))


def test_training_gives_the_bits_of_timms_transform_for_the_same_global_seeds():
    # timm's create_transform is what the authors call. Without the flip, which torchvision draws from another
    # generator, both draw the same numbers.
    theirs = create_transform(
        48,
        is_training=True,
        hflip=0.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    ours = TrainTransform(flip=0.0).build(48)
    for number in range(60):
        image, seed = photo(seed=number), seeded(number)
        python, numpy, torch_, _ = (int(word) for word in seed.generate_state(4))
        random.seed(python)
        np.random.seed(numpy)  # noqa: NPY002 - timm draws from it
        torch.manual_seed(torch_)
        assert torch.equal(ours(image, seed), theirs(image))


def test_a_seed_decides_the_tensor_and_global_generators_do_not_move():
    pipeline, image = TrainTransform().build(48), photo()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = pipeline(image, seeded(3, 1, 4))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])

    random.seed(99)
    pipeline(image, seeded(5))
    assert torch.equal(pipeline(image, seeded(3, 1, 4)), first)
    assert not torch.equal(pipeline(image, seeded(3, 1, 5)), first)


def test_flips_are_fair_and_independent_of_the_crop():
    # A ramp to the right shows the flip by its slope and the crop by its mean.
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")
    pipeline = TrainTransform(rand_augment=None, erasing=0.0).build(32)
    samples = [pipeline(ramp, seeded(number))[0] for number in range(400)]
    flipped = torch.tensor([float(sample[16, 0] > sample[16, -1]) for sample in samples])
    mean = torch.stack([sample.mean() for sample in samples])
    # Standard error of a fair share and of a zero correlation is 1/40 and 1/20 with 400 samples: 4 of them.
    assert abs(flipped.mean() - 0.5) < 4 / 40
    assert abs(torch.corrcoef(torch.stack([flipped, mean]))[0, 1]) < 4 / 20


def test_erasing_replaces_a_rectangle_by_noise_with_the_stated_probability():
    grey = Image.new("RGB", (40, 40), (124, 116, 104))  # ImageNet's mean: normalised to about 0
    pipeline = TrainTransform(rand_augment=None, erasing=0.25).build(40)
    samples = torch.stack([pipeline(grey, seeded(number)) for number in range(400)])
    noisy = (samples.abs() > 0.05).flatten(1).any(1)
    assert abs(noisy.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5  # 4 standard errors
    values = samples[noisy][samples[noisy].abs() > 0.05]
    assert abs(values.std() - 1) < 0.05


def test_pad_keeps_every_pixel_and_moves_the_image_in_training_only():
    digit = photo(28, 28)
    expected = tv.functional.normalize(tv.functional.to_tensor(digit), IMAGENET_MEAN, IMAGENET_STD)
    evaluated = EvalTransform(fit="pad").build(32)(digit)
    assert torch.equal(evaluated[:, 2:30, 2:30], expected)

    train = TrainTransform(fit="pad", flip=0.0, rand_augment=None, erasing=0.0).build(32)
    places = set()
    for number in range(40):
        windows = train(digit, seeded(number)).unfold(1, 28, 1).unfold(2, 28, 1)
        equal = (windows == expected[:, None, None]).flatten(3).all(-1).all(0)
        assert equal.sum() == 1
        places.add(tuple(equal.nonzero()[0].tolist()))
    assert len(places) > 10

    with pytest.raises(ValueError, match=r"40 x 40 pixels does not fit into image_size=32.*resize"):
        EvalTransform(fit="pad").build(32)(photo(40, 40))


def test_resize_shows_the_whole_image():
    image = photo(30, 60)
    expected = tv.functional.to_tensor(image.resize((24, 24), Image.Resampling.BICUBIC))
    expected = tv.functional.normalize(expected, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(EvalTransform(fit="resize").build(24)(image), expected)
    still = TrainTransform(fit="resize", flip=0.0, rand_augment=None, erasing=0.0)
    assert torch.equal(still.build(24)(image, seeded(0)), expected)
    mirror = TrainTransform(fit="resize", flip=1.0, rand_augment=None, erasing=0.0)
    assert torch.equal(mirror.build(24)(image, seeded(0)), expected.flip(2))


def test_pipelines_survive_pickling_for_spawned_workers():
    image = photo()
    for transform in (TrainTransform(), TrainTransform(fit="resize"), EvalTransform()):
        pipeline = transform.build(32)
        copy = pickle.loads(pickle.dumps(pipeline))
        assert torch.equal(copy(image, seeded(1)), pipeline(image, seeded(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, r"flip=1.5.*\[0, 1\]"),
        ({"scale": (0.5, 0.1)}, "scale="),
        ({"rand_augment": "m9"}, "rand-m9-mstd0.5-inc1"),
        ({"std": (0.0, 1.0, 1.0)}, "std="),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**settings)


def test_randaugment_that_keeps_no_bit_is_black() -> None:
    augment = TrainTransform(fit="resize", flip=0.0, rand_augment="rand-n1-m10-inc1", erasing=0.0).build(16)
    (step,) = [step for step in augment._steps.transforms if isinstance(getattr(step, "function", None), RandAugment)]
    (posterize,) = [operation for operation in step.function.ops if operation.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    # Magnitude 10 keeps 0 of 8 bits.
    assert not np.asarray(posterize(image)).any()

import pytest
import torch
import torch.nn.functional as F

# As a module: pytest would collect a class whose name starts with Test.
from tasks.segmentation import inference
from tasks.segmentation.inference import SlidingWindow, View, best_class, class_maps, mean_probabilities


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bright(image):
    """Score each pixel by itself alone."""
    return torch.cat([image, image.square()], 1)


def blurred(image):
    """Score each pixel by its neighbours to the right: neither local nor the same for the mirror image."""
    weight = torch.tensor([0.1, 0.2, 0.7]).expand(3, 1, 1, 3)
    return F.conv2d(F.pad(image, (0, 2)), weight, groups=3)


@pytest.mark.parametrize(
    ("size", "starts"),
    [
        ((64, 96), {(0, 0)}),
        # The last window ends with the image.
        ((64, 97), {(0, 0), (0, 1)}),
        ((100, 250), {(top, left) for top in (0, 36) for left in (0, 64, 128, 154)}),
        ((40, 60), {(0, 0)}),
    ],
)
def test_windows_cover_the_image_and_end_with_it(size, starts):
    places = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij"))[None]
    seen = []

    def scorer(image):
        assert image.shape[-2:] == (min(size[0], 64), min(size[1], 96))
        seen.append(tuple(image[0, :, 0, 0].int().tolist()))
        return image

    scores = SlidingWindow(crop=(64, 96), stride=(48, 64)).scores(scorer, places)
    assert len(seen) == len(starts)
    assert set(seen) == starts
    # Means of up to four equal numbers.
    assert scores.equal(places)


def test_scores_are_averaged_where_windows_overlap():
    numbers = iter(range(1, 5))
    window = SlidingWindow(crop=(2, 2), stride=(1, 1))
    scores = window.scores(lambda image: torch.full_like(image[:, :1], next(numbers)), torch.zeros(1, 3, 3, 3))
    assert scores[0, 0].tolist() == [[1, 1.5, 2], [2, 2.5, 3], [3, 3.5, 4]]


def test_windows_equal_the_whole_image_where_pixels_are_scored_alone():
    image = random(2, 3, 50, 70)
    windows = SlidingWindow(crop=(32, 40), stride=(20, 30)).scores(bright, image)
    # Up to four equal numbers are added and divided; of three the mean is rounded.
    torch.testing.assert_close(windows, bright(image), rtol=1e-6, atol=0)


def test_scores_are_added_up_in_float32_and_keep_no_graph():
    weight = torch.ones(3, requires_grad=True)
    scores = SlidingWindow(crop=(8, 8), stride=(4, 4)).scores(
        lambda image: (image * weight[:, None, None]).bfloat16(), random(1, 3, 16, 16)
    )
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_are_added_up_where_the_window_says():
    image = random(1, 3, 50, 70)
    window = SlidingWindow(crop=(32, 32), stride=(16, 16), device="cpu")
    scores = window.scores(bright, image.cuda())
    assert scores.device.type == "cpu"
    torch.testing.assert_close(scores, bright(image), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("crop", "stride"), [((8, 8), (8, 9)), ((8, 8), (0, 8)), ((0, 8), (0, 8))])
def test_a_window_that_leaves_gaps_is_refused(crop, stride):
    with pytest.raises(ValueError, match="expected positive numbers and a stride of at most the crop"):
        SlidingWindow(crop=crop, stride=stride)


def test_the_best_class_is_that_of_the_resized_scores():
    scores = random(37, 8, 10)
    # Equal scores in one chunk of classes, and in two.
    scores[5] = scores[3] = scores[30] = 9
    scores[[2, 20], :4] = 11
    for size in ((8, 10), (21, 17), (3, 4)):
        expected = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
        found = best_class(scores, size)
        assert found.dtype == torch.int64
        assert found.equal(expected)


def test_scales_are_rounded_up_to_the_divisor_and_flips_are_mirror_images():
    image = random(1, 3, 64, 100)
    views = list(inference.TestTime(scales=(0.5, 1.0, 1.75), flip=True).views(image))
    assert [tuple(view.image.shape[-2:]) for view in views] == [(32, 64)] * 2 + [(64, 128)] * 2 + [(128, 192)] * 2
    assert [view.flipped for view in views] == [False, True] * 3
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert mirrored.image.equal(view.image.flip(-1))


def test_a_scale_that_float_numbers_cannot_hold_adds_no_pixels():
    (view,) = inference.TestTime(scales=(1.1,)).views(random(1, 3, 1600, 32))
    assert view.image.shape[-2:] == (1760, 64)


def test_one_look_at_a_fitting_image_is_the_image():
    image = random(1, 3, 64, 96)
    (view,) = inference.TestTime().views(image)
    assert view.image.equal(image)


def test_test_time_averages_probabilities_on_the_original_image():
    image, original = random(2, 3, 64, 96), (50, 70)
    expected = []
    for one in image.split(1):
        total = torch.zeros(1, 3, *original)
        for size in ((32, 64), (64, 96), (128, 160)):
            resized = F.interpolate(one, size, mode="bilinear")
            for flip in (False, True):
                scores = blurred(resized.flip(-1) if flip else resized)
                probabilities = F.interpolate(scores, original, mode="bilinear").softmax(1)
                total += probabilities.flip(-1) if flip else probabilities
        expected.append(total[0].argmax(0))
    found = class_maps(
        blurred, image, [(64, 96)] * 2, [original] * 2, test_time=inference.TestTime(scales=(0.5, 1, 1.6), flip=True)
    )
    # Sums in the same order, so that not even near ties differ.
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_sure_view_does_not_outvote_two_others():
    # By their mean scores the first class would win, 20 against 12.
    views = [View(torch.tensor(scores).view(1, 2, 1, 1)) for scores in ([20.0, 0.0], [0.0, 6.0], [0.0, 6.0])]
    mean = mean_probabilities(lambda image: image, views, (1, 1)).flatten()
    assert mean.sum().item() == pytest.approx(1)
    assert mean.argmax() == 1


@pytest.mark.parametrize("settings", [{}, {"window": SlidingWindow(crop=(32, 32), stride=(16, 16))}])
def test_padding_is_cut_off_before_resizing(settings):
    image = random(2, 3, 64, 96)
    sizes, originals = [(64, 80), (40, 96)], [(70, 90), (33, 50)]
    padded = image.clone()
    padded[0, :, :, 80:] = padded[1, :, 40:] = 100
    found = class_maps(bright, padded, sizes, originals, **settings)
    for one, (height, width), original, label in zip(image, sizes, originals, found, strict=True):
        (expected,) = class_maps(bright, one[None, :, :height, :width], [(height, width)], [original])
        assert label.shape == original
        # The mean over windows rounds.
        assert (label != expected).float().mean() < 1e-3


def test_test_time_sees_no_padding():
    image = random(1, 3, 64, 96)
    image[..., 80:] = 100
    settings = inference.TestTime(scales=(0.5, 1.0), flip=True)
    (found,) = class_maps(blurred, image, [(64, 80)], [(30, 40)], test_time=settings)
    (expected,) = class_maps(blurred, image[..., :80], [(64, 80)], [(30, 40)], test_time=settings)
    assert found.equal(expected)


@pytest.mark.parametrize("settings", [{"scales": ()}, {"scales": (1.0, 0.0)}, {"divisor": 0}])
def test_senseless_scales_are_refused(settings):
    with pytest.raises(ValueError, match=r"TestTime: scales are .* expected positive numbers"):
        inference.TestTime(**settings)

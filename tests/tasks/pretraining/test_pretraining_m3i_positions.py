import math

import pytest
import torch

from tasks.pretraining.m3i_positions import LOG_SIZE_FACTOR, grid_positions, relative_positions, sincos

# Coordinates are float32 sums of a few numbers of about 100.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def views(*crops):
    return torch.tensor(crops, dtype=torch.float32)


@pytest.mark.parametrize("flip", [0, 1])
def test_a_view_in_itself_is_the_grid(flip):
    view = views([0.2, 0.3, 0.4, 0.5, flip])
    relative = relative_positions(view, view, 3, 4)
    torch.testing.assert_close(relative[0, :, :2], grid_positions(3, 4), **CLOSE)
    assert relative[0, :, 2:].abs().max() == 0


def test_the_grid_is_row_by_row():
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_a_flip_mirrors_columns():
    plain, flipped = views([0.1, 0.1, 0.5, 0.5, 0]), views([0.1, 0.1, 0.5, 0.5, 1])
    mirrored = grid_positions(3, 4)
    mirrored[:, 1] = 3 - mirrored[:, 1]
    for pair in ((plain, flipped), (flipped, plain)):
        torch.testing.assert_close(relative_positions(*pair, 3, 4)[0, :, :2], mirrored, **CLOSE)


def test_a_quarter_of_a_view_has_positions_half_as_far_apart():
    whole, quarter = views([0, 0, 1, 1, 0]), views([0.5, 0, 0.5, 0.5, 0])
    relative = relative_positions(whole, quarter, 4, 4)[0].unflatten(0, (4, 4))
    # Its first token covers rows 2 to 2.5 and columns 0 to 0.5, counted from the edge of the first token.
    torch.testing.assert_close(relative[:, 0, 0], torch.tensor([1.75, 2.25, 2.75, 3.25]), **CLOSE)
    torch.testing.assert_close(relative[0, :, 1], torch.tensor([-0.25, 0.25, 0.75, 1.25]), **CLOSE)
    torch.testing.assert_close(relative[..., 2:], torch.full((4, 4, 2), LOG_SIZE_FACTOR * math.log(0.5)), **CLOSE)


def picture_point(view, row, column, size):
    """Where a point of the grid lies in the whole picture, by cropping and flipping step by step."""
    top, left, height, width, flip = view
    x, y = (column + 0.5) / size[1], (row + 0.5) / size[0]
    if flip:
        x = 1 - x
    return top + y * height, left + x * width


@pytest.mark.parametrize("flips", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_corresponding_points_of_two_crops_are_the_same_point_of_the_picture(flips):
    size = (5, 7)
    one, two = [0.1, 0.2, 0.6, 0.3, flips[0]], [0.3, 0.05, 0.25, 0.7, flips[1]]
    relative = relative_positions(views(one), views(two), *size)[0].unflatten(0, size)
    for row in range(size[0]):
        for column in range(size[1]):
            there = picture_point(two, row, column, size)
            # The position is one in the grid of the first view, so the first view leads it to the picture.
            here = picture_point(one, *relative[row, column, :2].tolist(), size)
            assert here == pytest.approx(there, abs=1e-5)


def test_pixels_of_two_crops_of_a_picture_agree_where_positions_do():
    # A picture whose pixels are their own coordinates, cropped at whole pixels and flipped.
    picture = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    one = picture[:, 4:20, 8:24].flip(2)
    two = picture[:, 8:24, 2:18]
    relative = relative_positions(views([4 / 32, 8 / 32, 0.5, 0.5, 1]), views([8 / 32, 2 / 32, 0.5, 0.5, 0]), 16, 16)[
        0, :, :2
    ]
    inside = ((relative > -0.5) & (relative < 15.5)).all(1)
    assert inside.sum() == 12 * 10
    row, column = relative[inside].round().long().unbind(1)
    assert torch.equal(one[:, row, column], two.flatten(1)[:, inside])


def test_sines_and_cosines_have_geometric_periods():
    values = sincos(torch.tensor([[2.0, 5.0]]), 4)
    expected = [f(x * rate) for x in (2, 5) for f in (math.sin, math.cos) for rate in (1, 0.01)]
    torch.testing.assert_close(values, torch.tensor([expected]))

import pytest
import torch

from tasks.pretraining.m3i_mixing import CELL, mix, of_partner


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_each_pixel_is_that_of_the_image_or_of_its_partner(batch, size):
    image = torch.randn(batch, 3, *size)
    mixed = mix(image, 0.5, stride=16)
    partner = torch.stack([image[row - 1] for row in range(batch)])
    torch.testing.assert_close(of_partner(image), partner, rtol=0, atol=0)
    columns = size[1] // 16
    for row in range(batch):
        patches = {"own": image[row], "partner": partner[row]}
        for name, source in patches.items():
            for token in getattr(mixed, name)[row].tolist():
                y, x = token // columns * 16, token % columns * 16
                window = slice(y, y + 16), slice(x, x + 16)
                assert torch.equal(mixed.image[row][:, *window], source[:, *window])


def test_tokens_are_shared_out_by_whole_cells():
    mixed = mix(torch.randn(4, 3, 96, 64), 0.5, stride=16)
    assert mixed.own.shape == (4, 12)
    assert mixed.partner.shape == (4, 12)
    every = torch.cat([mixed.own, mixed.partner], 1)
    assert torch.equal(every.sort(1).values, torch.arange(24).expand(4, -1))
    for row in mixed.partner:
        cells = {(token // 4 // 2, token % 4 // 2) for token in row.tolist()}
        assert len(cells) == 3  # 12 tokens in cells of 4


def test_cells_are_drawn_for_each_image_anew():
    torch.manual_seed(0)
    mixed = mix(torch.randn(8, 3, 128, 128), 0.5, stride=16)
    assert len({tuple(row.tolist()) for row in mixed.partner}) > 1


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 4 / 9), (0.01, 1 / 9), (0.99, 8 / 9), (0.3, 3 / 9)])
def test_the_share_is_of_whole_cells_and_none_goes_without(ratio, share):
    mixed = mix(torch.randn(2, 3, 3 * CELL, 3 * CELL), ratio, stride=16)
    assert mixed.share == pytest.approx(share)
    assert mixed.partner.shape[1] == 36 * share


@pytest.mark.parametrize("size", [(32, 32), (64, 80), (48, 64)])
def test_images_of_broken_cells_are_an_error(size):
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) pixels.*divisible by 32"):
        mix(torch.randn(2, 3, *size), 0.5, stride=16)

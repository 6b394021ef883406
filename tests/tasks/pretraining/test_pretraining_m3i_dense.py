import pytest
import torch

from tasks.pretraining.m3i_category import Categories
from tasks.pretraining.m3i_decoder import Decoder
from tasks.pretraining.m3i_dense import dense_loss, spread
from tasks.pretraining.m3i_positions import grid_positions
from tasks.pretraining.means import second_moment, weighted_mean


def test_the_dense_loss_is_distance_and_shared_directions():
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    weight = torch.tensor([1.0, 0.0, 1.0])
    p, t = prediction[[0, 2]].reshape(-1, 8).double(), target[[0, 2]].reshape(-1, 8).double()
    expected = 0.0
    for one, other in zip(p, t, strict=True):
        # p^T S p is the mean square of the products of p with all targets.
        expected += ((one - other) ** 2).sum() + 0.02 * sum((one @ each) ** 2 for each in t) / len(t)
    loss = dense_loss(prediction, target, weight, decorrelation=0.02)
    # Float32 sums of 80 numbers.
    torch.testing.assert_close(loss.double(), expected / len(p) / 8, rtol=1e-5, atol=0)


def test_the_dense_loss_of_nothing_is_zero_with_a_gradient():
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    loss = dense_loss(prediction, torch.randn(2, 3, 4), torch.zeros(2), decorrelation=0.02)
    loss.backward()
    assert loss == 0
    assert torch.equal(prediction.grad, torch.zeros(2, 3, 4))


def test_the_spread_is_zero_for_equal_tokens_and_ignores_what_does_not_count():
    equal = torch.randn(8).expand(3, 5, 8).clone()
    assert spread(equal, torch.ones(3)) < 1e-6
    equal[1] = torch.randn(5, 8)
    assert spread(equal, torch.tensor([1.0, 0.0, 1.0])) < 1e-6
    assert spread(equal, torch.ones(3)) > 0.1
    tokens = torch.randn(3, 5, 8)
    expected = tokens.flatten(0, 1).std(0, correction=0).mean()
    torch.testing.assert_close(spread(tokens, torch.ones(3)), expected)


def test_means_without_processes():
    value, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 1.5])
    assert weighted_mean(value, weight) == pytest.approx(6.5 / 2)
    tokens = torch.randn(3, 4)
    expected = (0.5 * tokens[0].outer(tokens[0]) + 1.5 * tokens[2].outer(tokens[2])) / 2
    torch.testing.assert_close(second_moment(tokens, weight), expected)
    assert weighted_mean(value, torch.zeros(3)) == 0


def test_categories_are_a_softmax_over_cosines_of_labelled_samples():
    torch.manual_seed(0)
    categories = Categories(3, 4)
    embedding = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    label, weight = torch.tensor([2, -1, 0]), torch.tensor([1.0, 1.0, 0.25])
    cosines = torch.nn.functional.cosine_similarity(embedding[:, None], categories.table[None], dim=-1)
    log_probability = (10 * cosines).log_softmax(-1)
    expected = -(log_probability[0, 2] + 0.25 * log_probability[2, 0]) / 1.25
    torch.testing.assert_close(categories(embedding, label, weight, torch.tensor(10.0)), expected)
    assert categories(embedding, torch.full((3,), -1), weight, torch.tensor(10.0)) == 0


def decoder():
    torch.manual_seed(0)
    return Decoder(12, dim=16, depth=2, num_heads=4)


def test_the_decoder_takes_visible_tokens_as_a_set():
    net, visible, wanted = decoder(), torch.randn(2, 6, 12), torch.randn(2, 8, 4)
    places = grid_positions(2, 3).expand(2, -1, -1)
    order = torch.randperm(6)
    prediction = net(visible, places, wanted)
    assert prediction.shape == (2, 8, 12)
    # Float32 attention over tokens in another order.
    torch.testing.assert_close(net(visible[:, order], places[:, order], wanted), prediction, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(visible[:, order], places, wanted), prediction, rtol=1e-3, atol=1e-3)


def test_the_decoder_predicts_each_token_for_its_position():
    net, visible, wanted = decoder(), torch.randn(1, 6, 12), torch.randn(1, 8, 4)
    places = grid_positions(2, 3)[None]
    order = torch.randperm(8)
    prediction = net(visible, places, wanted)
    torch.testing.assert_close(net(visible, places, wanted[:, order]), prediction[:, order], rtol=1e-4, atol=1e-5)
    assert prediction.std(1).min() > 0


def test_the_decoder_says_what_does_not_divide():
    with pytest.raises(ValueError, match="dim is 18, expected a multiple of 4 and of num_heads=4"):
        Decoder(12, dim=18, depth=1, num_heads=4)

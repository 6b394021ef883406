from functools import partial

import pytest
import torch

from internimage import ClipProjectorHead, internimage_debug
from tasks.pretraining.m3i_target import MomentumTarget, momentum_at


@pytest.fixture
def parts():
    torch.manual_seed(0)
    backbone = internimage_debug(drop_path_rate=0.5)
    return backbone, partial(ClipProjectorHead, hidden_dim=32, embed_dim=24, num_heads=4)(backbone.widths, 24)


def shift(module, by):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by


def test_the_momentum_goes_from_its_first_value_to_one_along_a_cosine():
    assert momentum_at(0, 100, 0.996) == pytest.approx(0.996)
    assert momentum_at(50, 100, 0.996) == pytest.approx(0.998)
    assert momentum_at(25, 100, 0.996) == pytest.approx(1 - 0.004 * (1 + 0.5**0.5) / 2)
    assert momentum_at(100, 100, 0.996) == 1
    assert momentum_at(101, 100, 0.996) == 1


def test_an_update_moves_every_weight_by_what_momentum_leaves(parts):
    target = MomentumTarget(*parts)
    before = {name: tensor.clone() for name, tensor in target.named_parameters()}
    for module in parts:
        shift(module, 1.0)
    target.update(*parts, 0.75)
    for name, tensor in target.named_parameters():
        torch.testing.assert_close(tensor, before[name] + 0.25, msg=name)
    assert len(before) == sum(1 for module in parts for _ in module.parameters())


def test_targets_have_no_gradient_no_stochastic_depth_and_unit_variance(parts):
    target = MomentumTarget(*parts)
    target.train()
    image = torch.randn(2, 3, 64, 96)
    tokens = target(image)
    assert tokens.shape == (2, 4 * 6, 32)
    assert not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert torch.equal(tokens, target(image))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 24), atol=1e-5, rtol=0)
    # Layer norm adds 1e-5 to a variance that is small before training.
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 24), atol=0.05, rtol=0)


def test_it_starts_from_the_weights_of_the_first_step_and_after_a_resume_from_its_own(parts):
    target = MomentumTarget(*parts)
    for module in parts:
        shift(module, 1.0)  # as if weights were loaded
    target.start(*parts)
    image = torch.randn(1, 3, 64, 64)
    for module in parts:
        module.eval()
    expected = parts[1].tokens(parts[0](image)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(target(image), torch.nn.functional.layer_norm(expected, (32,)))
    saved = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for module in parts:
        shift(module, 1.0)
    target.start(*parts)
    resumed = MomentumTarget(*parts)
    resumed.load_state_dict(saved)
    resumed.start(*parts)
    for name, tensor in saved.items():
        assert torch.equal(target.state_dict()[name], tensor), name
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_an_average_in_half_precision_is_refused(parts):
    target = MomentumTarget(*parts)
    parts[0].bfloat16()
    with pytest.raises(ValueError, match=r"backbone\.\S+ is torch\.bfloat16 .*bf16-mixed"):
        target.start(*parts)

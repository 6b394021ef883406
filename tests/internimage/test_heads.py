from functools import partial

import pytest
import torch

from internimage import Classifier, ClipProjectorHead, ConvHead, internimage_debug
from internimage.heads import AttentionPool


def features(height=4, width=6, widths=(16, 32), batch=2):
    return [torch.randn(batch, widths[0], 2 * height, 2 * width), torch.randn(batch, widths[1], height, width)]


def test_the_classifier_joins_backbone_and_head():
    model = Classifier(internimage_debug(), 7).eval()
    image = torch.randn(2, 3, 64, 64)
    logits = model(image)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, model.head.fc(model.head.embed(model.backbone(image))))


def test_a_head_is_any_factory_of_widths_and_classes():
    model = Classifier(internimage_debug(out_indices=(1, 3)), 7, partial(ConvHead, ratio=0.5, activation="ReLU"))
    assert model.head.conv.weight.shape == (64, 128, 1, 1)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_a_wrong_number_of_classes_is_named(num_classes):
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}"):
        Classifier(internimage_debug(), num_classes)


def test_the_conv_head_uses_only_the_last_feature_and_no_positions():
    head = ConvHead((16, 32), 5).eval()
    fine, coarse = features()
    order = torch.randperm(coarse.shape[2] * coarse.shape[3])
    shuffled = coarse.flatten(2)[:, :, order].unflatten(2, coarse.shape[2:])
    torch.testing.assert_close(head([fine, coarse]), head([coarse, shuffled]))
    assert head.embed([fine, coarse]).shape == (2, 48)
    assert head.norm.eps == 1e-5


def test_attention_pooling_does_not_depend_on_the_order_of_tokens():
    pool = AttentionPool(32, 12, num_heads=4).double()
    tokens = torch.randn(2, 15, 32, dtype=torch.float64)
    # Float64 rounding of sums in another order.
    torch.testing.assert_close(pool(tokens), pool(tokens[:, torch.randperm(15)]), rtol=1e-12, atol=1e-12)


def test_attention_pooling_of_equal_tokens_is_the_projected_value():
    pool = AttentionPool(32, 12, num_heads=4).double()
    token = torch.randn(2, 1, 32, dtype=torch.float64)
    expected = pool.proj(pool.v(pool.norm_v(token))).squeeze(1)
    torch.testing.assert_close(pool(token.expand(2, 9, 32)), expected, rtol=1e-12, atol=1e-12)


def test_the_clip_projector_head_joins_the_last_two_features():
    head = ClipProjectorHead((8, 16, 32), 5, hidden_dim=64, embed_dim=24, num_heads=4).eval()
    fine, coarse = features()
    unused = torch.full((2, 8, 16, 24), torch.nan)
    assert head.embed([unused, fine, coarse]).shape == (2, 24)
    logits = head([unused, fine, coarse])
    assert logits.shape == (2, 5)
    assert not torch.equal(logits, head([unused, fine + 1, coarse]))
    assert not torch.equal(logits, head([unused, fine, coarse + 1]))


def test_the_clip_projector_head_asks_for_images_divisible_by_32():
    model = Classifier(internimage_debug(), 5, partial(ClipProjectorHead, hidden_dim=64, embed_dim=24))
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"\(5, 6\) and \(3, 3\) pixels.*divisible by 32"):
        model(torch.randn(1, 3, 72, 96))


def test_the_clip_projector_head_asks_for_two_features():
    with pytest.raises(ValueError, match="gives 1 feature"):
        Classifier(internimage_debug(out_indices=(3,)), 5, ClipProjectorHead)
    with pytest.raises(ValueError, match="num_heads=3 does not divide hidden_dim=64"):
        ClipProjectorHead((16, 32), 5, hidden_dim=64, num_heads=3)

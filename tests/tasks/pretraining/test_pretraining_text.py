import pytest
import torch
from transformers import BertConfig

from tasks.pretraining import BertText, ClipText

SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "context_length": 8}


def tower(kind, **options):
    torch.manual_seed(0)
    return kind(5, **(SMALL | options)).eval()


@pytest.mark.parametrize("kind", [ClipText, BertText])
def test_what_comes_after_the_end_does_not_matter(kind):
    net = tower(kind)
    text = torch.tensor([[1, 7, 8, 2, 0, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0, 0], [1, 3, 4, 5, 6, 7, 8, 2]])
    length = torch.tensor([4, 3, 8])
    vectors = net(text, length)
    assert vectors.shape == (3, 5)
    filled = torch.where(torch.arange(8) < length[:, None], text, 29)
    # Float32 sums over masked columns may be taken in another order.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(net(filled, length), vectors, **close)
    # Nor does how far the texts of a batch are padded.
    torch.testing.assert_close(net(text[:2, :4], length[:2]), vectors[:2], **close)


@pytest.mark.parametrize("kind", [ClipText, BertText])
def test_every_token_before_the_end_matters(kind):
    net = tower(kind)
    text, length = torch.tensor([[1, 7, 8, 2, 0]]), torch.tensor([4])
    for place in range(4):
        other = text.clone()
        other[0, place] = 20
        assert (net(other, length) - net(text, length)).abs().max() > 1e-3, place
    assert (net(text, length - 1) - net(text, length)).abs().max() > 1e-3


def test_padding_token_is_trained_like_any_other():
    # 0 is a token of CLIP's vocabulary, so its row must have a gradient.
    for kind, name in ((ClipText, "token_embedding"), (BertText, "word_embeddings")):
        net = tower(kind)
        net(torch.tensor([[1, 0, 2]]), torch.tensor([3])).sum().backward()
        (row,) = (weight.grad[0] for key, weight in net.named_parameters() if key.endswith(f"{name}.weight"))
        assert row.any(), kind


def test_sizes_are_those_of_the_papers():
    with torch.device("meta"):
        clip, bert = ClipText(512), BertText(768)
    # Radford et al.: 63 M in the text transformer of ViT-B/32, and the projection.
    assert sum(p.numel() for p in clip.parameters()) == pytest.approx(63.4e6, rel=0.01)
    # Of BERT-Base everything but the pooler; another vocabulary and context length.
    base = BertConfig()
    blocks = sum(p.numel() for key, p in bert.named_parameters() if ".layer." in key)
    assert blocks == base.num_hidden_layers * (12 * base.hidden_size**2 + 13 * base.hidden_size)


def test_wrong_settings_say_what_to_do():
    with pytest.raises(ValueError, match="texts have 9 tokens, expected at most context_length=8"):
        tower(BertText)(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9]))
    for kind in (ClipText, BertText):
        with pytest.raises(ValueError, match=f"{kind.__name__}: num_heads=3 does not divide width=16"):
            tower(kind, num_heads=3)

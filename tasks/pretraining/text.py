"""Text towers: transformers built from a configuration, trained from scratch.

Shapes: B batch, L tokens of a text, D length of an embedding.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn


class TextTower(nn.Module):
    """A transformer, one of its output vectors for each text, and a projection to the embedding.

    Args:
        encoder: Module of the library transformers whose output has `last_hidden_state`.
        embed_dim: Length of the embeddings.
        width: Channels of the encoder.
        context_length: Most tokens of a text.
    """

    def __init__(self, encoder: nn.Module, embed_dim: int, width: int, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.encoder = encoder
        self.project = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.project.weight, std=width**-0.5)

    def forward(self, text: Tensor, length: Tensor) -> Tensor:
        """Map token ids `(B, L)`, of which the first `length` `(B,)` count, to vectors `(B, D)`.

        Raises:
            ValueError: L is more than the context length.
        """
        if text.shape[1] > self.context_length:
            raise ValueError(
                f"{type(self).__name__}: texts have {text.shape[1]} tokens, expected at most context_length="
                f"{self.context_length}. Set the same context_length for the tokenizer and the text tower."
            )
        return self.project(self.pool(text, length))  # type: ignore[no-any-return]

    @abstractmethod
    def pool(self, text: Tensor, length: Tensor) -> Tensor:
        """Return the encoder's vector for each text, `(B, width)`."""


class ClipText(TextTower):
    """CLIP's text encoder (arXiv:2103.00020): every token sees those before it, and the last one stands for the text.

    Args:
        embed_dim: Length of the embeddings.
        width: Channels.
        num_layers: Blocks.
        num_heads: Heads of attention; divides `width`.
        vocab_size: Different tokens; that of CLIP's tokenizer unless the data's is another.
        context_length: Most tokens of a text.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        width: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        vocab_size: int = 49408,
        context_length: int = 77,
    ) -> None:
        # Here, so that tasks without texts do not import the library.
        from transformers import CLIPTextConfig, CLIPTextModel

        _check_heads(type(self).__name__, width, num_heads)
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=context_length,
            hidden_act="gelu",
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=2,  # the library's own pooling, which is not used, then takes any text
        )
        super().__init__(CLIPTextModel(config), embed_dim, width, context_length)

    def pool(self, text: Tensor, length: Tensor) -> Tensor:
        # No mask of the padding: it comes after the last token, which does not see it.
        hidden = self.encoder(input_ids=text).last_hidden_state
        return hidden[torch.arange(len(text), device=text.device), length - 1]  # type: ignore[no-any-return]


class BertText(TextTower):
    """BERT's encoder (arXiv:1810.04805), by default of the size of BERT-Base: the first token stands for the text.

    Args:
        embed_dim: Length of the embeddings.
        width: Channels.
        num_layers: Blocks.
        num_heads: Heads of attention; divides `width`.
        vocab_size: Different tokens; that of CLIP's tokenizer unless the data's is another.
        context_length: Most tokens of a text.
        dropout: Probability, in the blocks and of attention.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        vocab_size: int = 49408,
        context_length: int = 77,
        dropout: float = 0.0,
    ) -> None:
        from transformers import BertConfig, BertModel

        _check_heads(type(self).__name__, width, num_heads)
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=context_length,
            # Of BERT-Base 0.02. Narrower blocks need more, or the first token starts as the same vector in all texts.
            initializer_range=0.02 * (768 / width) ** 0.5,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=None,  # 0 is a token like any other in CLIP's vocabulary
        )
        super().__init__(BertModel(config, add_pooling_layer=False), embed_dim, width, context_length)

    def pool(self, text: Tensor, length: Tensor) -> Tensor:
        mask = torch.arange(text.shape[1], device=text.device) < length[:, None]
        hidden = self.encoder(input_ids=text, attention_mask=mask).last_hidden_state
        return hidden[:, 0]  # type: ignore[no-any-return]


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{name}: num_heads={num_heads} does not divide width={width}.")

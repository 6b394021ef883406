"""From texts to token ids, without downloads.

Shapes: n texts, L context length.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

# Our own; more prompts of a class average out how it is put.
TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "a close view of a {}.", "a {} seen from afar.", "one {}.")
# Words whose parts the tokenizer of CLIP has in mind; it forgets none, and a crawl of the web has millions.
MAX_CACHED_WORDS = 200_000
# Characters of a token at most, on average over a text. Byte pairs take quadratic time in the length of a word, and a
# text without blanks is one: megabytes would take hours.
MAX_CHARACTERS = 100


class Tokenizer(ABC):
    """Settings of a tokenizer; what it needs is loaded by the process that first encodes."""

    context_length: int

    @abstractmethod
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids `(n, L)` int64, zero after the end, and lengths `(n,)` int64 with the tokens of start and end."""


@dataclass(frozen=True, kw_only=True)
class ClipTokenizer(Tokenizer):
    """CLIP's byte pairs, lower case, 49,408 tokens; the vocabulary comes with open_clip.

    Args:
        context_length: Tokens of a text, those of its start and end included; longer texts are cut.

    Raises:
        ValueError: Room for less than one token between start and end.
    """

    context_length: int = 77

    def __post_init__(self) -> None:
        _check_length("ClipTokenizer", self.context_length)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and lengths: see `Tokenizer`."""
        tokenizer = _clip()
        texts = [text[: MAX_CHARACTERS * self.context_length] for text in texts]
        ids = tokenizer(texts, context_length=self.context_length)
        if len(tokenizer.cache) > MAX_CACHED_WORDS:
            _forget(tokenizer)
        # The end has the highest id of all, and stands once.
        return ids, ids.argmax(dim=1) + 1


@dataclass(frozen=True, kw_only=True)
class TransformersTokenizer(Tokenizer):
    """A tokenizer that transformers can load from a folder.

    Args:
        path: The folder.
        context_length: Tokens of a text, those of its start and end included; longer texts are cut.

    Raises:
        ValueError: Room for less than one token between start and end.
    """

    path: Path
    context_length: int = 77

    def __post_init__(self) -> None:
        _check_length("TransformersTokenizer", self.context_length)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and lengths: see `Tokenizer`.

        Raises:
            FileNotFoundError: `path` is not a folder.
        """
        encoded = _transformers(Path(self.path))(texts, truncation=True, max_length=self.context_length)["input_ids"]
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, torch.tensor([len(tokens) for tokens in encoded])


def class_prompts(names: list[str], templates: list[str] | None = None) -> list[list[str]]:
    """Return the prompts of each class.

    Args:
        names: Of the classes.
        templates: Prompts with `{}` where the name goes; None takes `TEMPLATES`.

    Raises:
        ValueError: There is no template, or one without `{}`.
    """
    chosen = TEMPLATES if templates is None else templates
    if not chosen or any("{}" not in template for template in chosen):
        raise ValueError(
            f"class_prompts: templates {list(chosen)}, expected at least one, each with {{}} for the name."
        )
    return [[template.replace("{}", name) for template in chosen] for name in names]


def _check_length(owner: str, context_length: int) -> None:
    if context_length < 3:
        raise ValueError(f"{owner}: context_length={context_length}, expected at least 3: a start, a token, an end.")


@lru_cache
def _clip() -> "SimpleTokenizer":
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _forget(tokenizer: "SimpleTokenizer") -> None:
    special = [tokenizer.decoder[number] for number in tokenizer.all_special_ids]
    tokenizer.cache = {token: token for token in special}


@lru_cache
def _transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise FileNotFoundError(f"TransformersTokenizer: {path} is not a folder with a tokenizer.")
    return AutoTokenizer.from_pretrained(path, local_files_only=True)

"""Texts become the tokens of open_clip and transformers; captions and labels are found where settings say."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import tokenize
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from datamodules.webdataset import text as text_module
from datamodules.webdataset.captions import Captions
from datamodules.webdataset.labels import Labels
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.text import ClipTokenizer, TransformersTokenizer, class_prompts

TEXTS = ["a Photo of a cat", "", "caf\u00e9 \u732b &amp; 12,5 don't", "word " * 200]


def sample(**parts: bytes) -> RawSample:
    return RawSample("key", {extension: memoryview(content) for extension, content in parts.items()})


@pytest.mark.parametrize("context_length", [77, 16, 3])
def test_clip_tokens_are_those_of_open_clip_and_lengths_reach_the_end(context_length: int) -> None:
    tokenizer = pickle.loads(pickle.dumps(ClipTokenizer(context_length=context_length)))
    ids, length = tokenizer.encode(TEXTS)
    assert torch.equal(ids, tokenize(TEXTS, context_length))
    for row, end in zip(ids, length, strict=True):
        assert row[0] == 49406
        assert row[end - 1] == 49407
        assert not row[end:].any()


def test_the_cache_of_words_is_bounded_and_tokens_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_CACHED_WORDS", 20)
    tokenizer = ClipTokenizer()
    words = [f"strange{number}word" + "xyz"[number % 3] * (number + 1) for number in range(60)]
    for word in words:
        assert torch.equal(tokenizer.encode([word])[0], tokenize([word]))
    # The bound, and the words of the last call.
    assert len(text_module._clip().cache) <= 20 + 5


def test_a_tokenizer_of_transformers_is_read_from_its_folder(tmp_path: Path) -> None:
    words = RustTokenizer(WordLevel({"[PAD]": 9, "[CLS]": 1, "[SEP]": 2, "cat": 3, "dog": 4, "[UNK]": 5}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path)
    ids, length = TransformersTokenizer(path=tmp_path, context_length=4).encode(["cat dog cow dog", "dog"])
    assert ids.tolist() == [[1, 3, 4, 2], [1, 4, 2, 0]]
    assert length.tolist() == [4, 3]


def test_a_tokenizer_that_is_not_there_is_an_error_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        TransformersTokenizer(path=tmp_path / "none").encode(["a"])


def test_the_first_text_that_a_sample_has_is_its_caption() -> None:
    captions, draw = Captions(keys=("txt",), json_keys=("caption", "alt")), Draw(0, 0, 0, 0)
    fields = json.dumps({"caption": None, "alt": " from json\n"}).encode()
    assert captions.find(sample(txt=b" hello \n", json=fields), draw) == "hello"
    assert captions.find(sample(txt=b" ", json=fields), draw) == "from json"
    assert captions.find(sample(json=fields), draw) == "from json"


@pytest.mark.parametrize("parts", [{}, {"txt": b" \n"}, {"txt": b"\xff\xfe"}, {"json": b"{"}, {"json": b"[1]"},
                                   {"json": b'{"caption": 5}'}])  # fmt: skip
def test_a_sample_without_a_readable_text_is_bad(parts: dict[str, bytes]) -> None:
    with pytest.raises(BadSample) as caught:
        Captions(json_keys=("caption",)).find(sample(**parts), Draw(0, 0, 0, 0))
    assert caught.value.cause == "text"


def test_weights_decide_how_often_each_caption_is_drawn() -> None:
    captions = Captions(keys=("txt",), json_keys=("long", "none"), weights=(1.0, 3.0, 5.0))
    found = sample(txt=b"short", json=b'{"long": "long"}')
    counts = Counter(captions.find(found, Draw(7, 0, 0, position)) for position in range(2000))
    # The missing one leaves 1 to 3; five standard deviations of a share of 0.75 in 2000.
    assert set(counts) == {"short", "long"}
    assert abs(counts["long"] / 2000 - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5
    assert captions.find(found, Draw(7, 0, 0, 3)) == captions.find(found, Draw(7, 0, 0, 3))


def test_the_drawn_caption_tells_nothing_of_the_crop() -> None:
    captions, found = Captions(keys=("a", "b"), weights=(1.0, 1.0)), sample(a=b"a", b=b"b")
    draws = [Draw(7, 0, 0, position) for position in range(1000)]
    first = [draw.uniform(1)[0] for draw in draws if captions.find(found, draw) == "a"]
    # The crop's first number is uniform among those: five standard deviations of the mean of 450 and more.
    assert len(first) > 400
    assert abs(sum(first) / len(first) - 0.5) < 5 * (1 / 12 / 450) ** 0.5


def test_labels_are_read_from_text_from_json_and_through_a_map(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["n01", "n02"]')
    (tmp_path / "object.json").write_text('{"n02": 4}')
    assert Labels().find(sample(cls=b"3\n"), 4) == 3
    assert Labels().find(sample(txt=b"3"), 4) is None
    assert Labels(key="json.label").find(sample(json=b'{"label": 2}'), 4) == 2
    assert Labels(key="json.label").find(sample(json=b'{"other": 2}'), 4) is None
    assert Labels(label_map={"n02": 1}).find(sample(cls=b"n02"), 4) == 1
    assert Labels(label_map=tmp_path / "list.json").find(sample(cls=b"n02"), 4) == 1
    assert Labels(label_map=tmp_path / "object.json").find(sample(cls=b"n02"), 5) == 4


@pytest.mark.parametrize("content", [b"4", b"-1", b"x", b"", b"1.5", b"\xff"])
def test_a_label_that_is_none_or_out_of_range_is_bad(content: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        Labels().find(sample(cls=content), 4)
    assert caught.value.cause == "label"


def test_prompts_put_each_name_into_each_template() -> None:
    assert class_prompts(["cat", "{x}"], ["a {}", "{} here"]) == [["a cat", "cat here"], ["a {x}", "{x} here"]]
    assert len({len(prompts) for prompts in class_prompts(["cat", "dog"])}) == 1
    for templates in ([], ["no place"]):
        with pytest.raises(ValueError, match="expected at least one"):
            class_prompts(["cat"], templates)


def test_settings_out_of_range_are_refused() -> None:
    for make in (lambda: Captions(keys=()), lambda: Captions(weights=(1.0, 2.0)), lambda: Captions(weights=(0.0,)),
                 lambda: ClipTokenizer(context_length=2)):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|neither"):
            make()

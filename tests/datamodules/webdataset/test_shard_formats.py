"""Batches are filled row by row, with the keys, types and layout that tasks expect; bad samples leave no trace."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD, ClassificationBatch, ImageTextBatch
from datamodules.transforms import EvalTransform
from datamodules.webdataset.formats import Format, ImageLabelFormat, ImageTextFormat, image_part, normalize
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.text import ClipTokenizer
from datamodules.webdataset.transforms import FastEval, FastTrain, PilTransform, TwoViews

SIZE = 32


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((60, 50)).save(file, "PNG")
    return file.getvalue()


def sample(**parts: bytes) -> RawSample:
    return RawSample("key", {extension: memoryview(content) for extension, content in parts.items()})


def pairs(**options: object) -> ImageTextFormat:
    form = {"writer": FastEval().build(SIZE), "tokenizer": ClipTokenizer(context_length=12)}
    return ImageTextFormat(**{**form, **options})  # type: ignore[arg-type]


def labelled(**options: object) -> ImageLabelFormat:
    return ImageLabelFormat(**{"writer": FastEval().build(SIZE), "num_classes": 3, **options})  # type: ignore[arg-type]


def test_a_batch_of_pairs_has_every_key_in_its_type_and_shape() -> None:
    builder = pairs(writer=TwoViews().build(SIZE), num_classes=3).builder(2)
    builder.write(0, sample(png=photo(0), txt=b"a cat", cls=b"2"), Draw(0, 0, 0, 0), 1, "shard/a")
    builder.write(1, sample(png=photo(1), txt=b"a red dog"), Draw(0, 0, 0, 1), 0, "shard/b")
    batch = builder.finish(torch.tensor([True, True]))
    assert set(batch) == set(ImageTextBatch.__annotations__)
    for key in ("image", "other_image"):
        assert batch[key].shape == (2, 3, SIZE, SIZE)
        assert batch[key].dtype == torch.uint8
        assert batch[key].is_contiguous(memory_format=torch.channels_last)  # type: ignore[literal-required]
    assert torch.equal(batch["text"], ClipTokenizer(context_length=12).encode(["a cat", "a red dog"])[0])
    assert batch["text_length"].tolist() == [4, 5]
    assert batch["label"].tolist() == [2, -1]
    assert batch["source"].tolist() == [1, 0]
    assert batch["key"] == ["shard/a", "shard/b"]
    assert batch["view"].shape == (2, 2, 5)
    assert (batch["view"][..., 2:4] > 0).all()


def test_one_view_has_no_keys_of_a_second() -> None:
    batch = pairs().builder(1).finish(torch.tensor([False]))
    assert set(batch) == set(ImageTextBatch.__annotations__) - {"other_image", "view"}


def test_labels_are_not_read_without_classes() -> None:
    builder = pairs().builder(1)
    builder.write(0, sample(png=photo(0), txt=b"a", cls=b"not a number"), Draw(0, 0, 0, 0), 0, "")
    assert builder.finish(torch.tensor([True]))["label"].tolist() == [-1]


def test_a_batch_of_labelled_images_has_every_key() -> None:
    builder = labelled().builder(2)
    builder.write(1, sample(png=photo(0), cls=b"2"), Draw(0, 0, 0, 0), 0, "")
    batch = builder.finish(torch.tensor([False, True]))
    assert set(batch) == set(ClassificationBatch.__annotations__)
    assert batch["label"].tolist() == [0, 2]
    assert batch["label"].dtype == torch.int64
    assert batch["valid"].tolist() == [False, True]
    assert not batch["image"][0].any()
    assert batch["image"][1].any()


@pytest.mark.parametrize(
    ("form", "parts", "cause"),
    [
        (pairs(), {"txt": b"a"}, "parts"),
        (pairs(), {"png": b"broken", "txt": b"a"}, "decode"),
        (pairs(), {"png": photo(0)}, "text"),
        (pairs(num_classes=3), {"png": photo(0), "txt": b"a", "cls": b"3"}, "label"),
        (labelled(), {"png": photo(0)}, "parts"),
        (labelled(), {"cls": b"1"}, "parts"),
        (labelled(), {"png": photo(0), "cls": b"x"}, "label"),
        (labelled(), {"png": photo(0)[:200], "cls": b"1"}, "decode"),
    ],
)
def test_a_bad_sample_has_its_cause_and_leaves_the_row_to_another(
    form: Format, parts: dict[str, bytes], cause: str
) -> None:
    good, draw = sample(png=photo(3), txt=b"a bird", cls=b"1"), Draw(0, 0, 0, 0)
    used, fresh = form.builder(1), form.builder(1)
    used.write(0, sample(png=photo(4), txt=b"a much longer text than that", cls=b"2"), draw, 5, "other")
    with pytest.raises(BadSample) as caught:
        used.write(0, sample(**parts), draw, 4, "bad")
    assert caught.value.cause == cause
    for builder in (used, fresh):
        builder.write(0, good, draw, 0, "good")
    found, expected = (builder.finish(torch.tensor([True])) for builder in (used, fresh))
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_rows_that_are_not_valid_are_blank_even_if_they_were_written() -> None:
    form = pairs(num_classes=3, writer=TwoViews().build(SIZE))
    builder = form.builder(1)
    builder.write(0, sample(png=photo(0), txt=b"a cat", cls=b"2"), Draw(0, 0, 0, 0), 1, "a")
    batch = builder.finish(torch.tensor([False]))
    for key in ("image", "other_image", "text", "source", "view"):
        assert not batch[key].any()  # type: ignore[literal-required]
    assert batch["label"].tolist() == [-1]
    assert batch["text_length"].tolist() == [1]


def test_the_image_is_the_first_of_the_known_extensions() -> None:
    assert bytes(image_part(sample(txt=b"t", webp=b"w", jpg=b"j"))) == b"j"


def test_normalizing_gives_the_numbers_of_the_float_pipeline_and_keeps_channels_last() -> None:
    raw, draw = sample(png=photo(0), cls=b"1"), Draw(0, 0, 0, 0)
    batches = []
    for transform in (FastEval(), PilTransform(transform=EvalTransform())):
        builder = labelled(writer=transform.build(SIZE)).builder(1)
        builder.write(0, raw, draw, 0, "")
        batch = builder.finish(torch.tensor([True]))
        batches.append((batch, normalize(batch, IMAGENET_MEAN, IMAGENET_STD)))
    (fast, normalized), (slow, untouched) = batches
    assert fast["image"].dtype == torch.uint8
    assert untouched["image"] is slow["image"]
    assert normalized["image"].is_contiguous(memory_format=torch.channels_last)
    exact = F.normalize(fast["image"].float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalized["image"], exact, rtol=0, atol=0)
    # Two steps of 8 bits, by the smallest std: the resizes round differently.
    assert (normalized["image"] - untouched["image"]).abs().max() <= 2.01 / 255 / min(IMAGENET_STD)


class OneBatch(Dataset[ClassificationBatch]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> ClassificationBatch:
        builder = labelled(writer=FastTrain().build(SIZE)).builder(3)
        for row in range(2):
            builder.write(row, sample(png=photo(row), cls=b"1"), Draw(0, 0, index, row), 0, "")
        return builder.finish(torch.tensor([True, True, False]))


# A spawned worker imports all that this file does.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_hands_over_the_same_batch_in_shared_memory(method: str) -> None:
    loader = DataLoader(OneBatch(), batch_size=None, num_workers=1, multiprocessing_context=method)
    for index, batch in enumerate(loader):
        assert torch.equal(batch["image"], OneBatch()[index]["image"])
        assert batch["image"].is_shared()
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert not batch["image"][2].any()

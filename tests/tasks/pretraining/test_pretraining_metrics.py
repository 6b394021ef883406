import pytest
import torch
import torch.nn.functional as F

from internimage import ConvHead, internimage_debug
from tasks.pretraining import ClipText, Towers
from tasks.pretraining import retrieval as retrieval_module
from tasks.pretraining.evaluation import Evaluation
from tasks.pretraining.retrieval import Retrieval, recall
from tasks.pretraining.zero_shot import ZeroShot, encode_classes


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_is_the_share_of_sorted_answers(monkeypatch):
    monkeypatch.setattr(retrieval_module, "_CHUNK", 7)  # chunks of 7, 7, 7 and 2
    query, answer = unit(23, 4), unit(23, 4, seed=1)
    answer = F.normalize(answer + query, dim=-1)
    order = (query @ answer.T).argsort(1, descending=True)
    place = (order == torch.arange(23)[:, None]).int().argmax(1)
    values = recall(query, answer, (1, 5, 10))
    for k, value in values.items():
        assert value.item() == pytest.approx((place < k).float().mean().item(), abs=1e-6), k
    assert values[1] < values[5] < values[10]


def test_answers_that_are_alike_count_as_if_drawn():
    same = torch.zeros(20, 3)
    same[:, 0] = 1
    collapsed = recall(same, same, (1, 5, 10))
    assert [collapsed[k].item() for k in (1, 5, 10)] == pytest.approx([1 / 20, 5 / 20, 10 / 20])
    # Two of four captions are the same.
    query, answer = torch.eye(4), torch.eye(4)[[0, 1, 2, 2]]
    # Query 3 finds nothing alike: all four answers are equal to it.
    assert recall(query, answer, (1,))[1].item() == pytest.approx((1 + 1 + 1 / 2 + 1 / 4) / 4)


def test_vectors_that_are_not_numbers_find_nothing():
    broken = torch.full((20, 3), torch.nan)
    assert [value.item() for value in recall(broken, broken, (1, 5, 10)).values()] == [0, 0, 0]
    # One broken answer is not found, and is taken for a better one by all other queries.
    query = torch.eye(20)
    answer = query.clone()
    answer[3] = torch.nan
    values = recall(query, answer, (1, 5))
    assert values[1] == 0
    assert values[5].item() == pytest.approx(19 / 20)


def test_retrieval_counts_valid_pairs_once():
    image, text = unit(9, 6), unit(9, 6, seed=1)
    valid = torch.arange(9) != 4
    metric = Retrieval()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        metric.update(image[rows], text[rows], valid[rows])
    values = metric.compute()
    for k in (1, 5, 10):
        there, back = recall(image[valid], text[valid], (k,))[k], recall(text[valid], image[valid], (k,))[k]
        assert values[f"image_to_text_r{k}"] == there
        assert values[f"text_to_image_r{k}"] == back
        assert values[f"retrieval_r{k}"] == (there + back) / 2
    metric.reset()
    metric.update(image, text, torch.zeros_like(valid))
    assert metric.compute() == {}


def test_zero_shot_counts_labelled_valid_images():
    classes = torch.eye(6)
    # The most similar class is the first of each row, and so on.
    image = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 5)
    label = torch.tensor([0, 4, 5, -1, 0])
    valid = torch.tensor([True, True, True, True, False])
    metric = ZeroShot()
    metric.update(image, classes, label, valid)
    values = metric.compute()
    assert values["zero_shot_top1"].item() == pytest.approx(1 / 3)
    assert values["zero_shot_top5"].item() == pytest.approx(2 / 3)
    few = ZeroShot()
    few.update(image[:, :3], classes[:3, :3], label, valid)  # fewer than five classes
    assert few.compute()["zero_shot_top5"].item() == pytest.approx(1 / 3)


def test_classes_are_compared_in_float32_under_autocast():
    # Vectors about a common direction, as those of real encoders: bfloat16 confuses a fifth of these classes.
    shift = torch.full((64,), 0.4)
    image, classes = (F.normalize(unit(number, 64, seed=number) + shift, dim=-1) for number in (300, 400))
    label = (image @ classes.T).argmax(1)
    metric = ZeroShot()
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(image, classes, label, torch.ones(300, dtype=torch.bool))
    assert metric.compute()["zero_shot_top1"] == 1


@pytest.fixture
def towers():
    torch.manual_seed(0)
    small = {"width": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32, "context_length": 6}
    return Towers(internimage_debug(), 8, ConvHead, lambda dim: ClipText(dim, **small)).eval()


def test_vector_of_a_class_is_the_direction_of_the_mean_over_its_prompts(towers):
    ids = torch.randint(1, 32, (130, 3, 6), generator=torch.Generator().manual_seed(0))  # more than one chunk
    length = torch.full((130, 3), 6)
    vectors = encode_classes(towers, ids, length)
    assert vectors.shape == (130, 8)
    with torch.no_grad():
        for number in (0, 85, 129):
            each = towers.encode_text(ids[number], length[number])
            torch.testing.assert_close(each.norm(dim=-1), torch.ones(3))
            mean = each.mean(0)
            # Float32 of batches of another size.
            torch.testing.assert_close(vectors[number], mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_second_loader_of_a_kind_has_its_number_in_the_name(towers):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 32, 32, generator=generator)
    text = {"text": torch.randint(1, 32, (4, 6), generator=generator), "text_length": torch.full((4,), 6)}
    labels = {"label": torch.tensor([0, 1, 2, 0])}
    none = {"label": torch.full((4,), -1), "valid": torch.tensor([True, True, True, False])}
    evaluation = Evaluation(towers, (text["text"][:3, None], text["text_length"][:3, None]))
    for loader, batch in enumerate([text | none, labels, text | none, labels, text | labels]):
        evaluation.update({"image": image} | batch, loader)
    names = evaluation.compute().keys()
    assert {name for name in names if "retrieval_r1" in name and "r10" not in name} == {
        "retrieval_r1",
        "retrieval_r1/dataloader_2",
        "retrieval_r1/dataloader_4",
    }
    assert {name for name in names if "zero_shot_top1" in name} == {
        "zero_shot_top1",
        "zero_shot_top1/dataloader_3",
        "zero_shot_top1/dataloader_4",
    }
    without = Evaluation(towers, None)
    without.update({"image": image} | labels, 0)
    assert without.compute() == {}

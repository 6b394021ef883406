import io
import tarfile
import warnings
from itertools import islice

import pytest
import torch
import webdataset
from PIL import Image

from datamodules.webdataset.plain import IMAGE, as_webdataset


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """5 shards of 4 samples: images of one colour as JPEG and PNG in turn, and the number as text and as class."""
    for shard in range(5):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                stored, suffix = io.BytesIO(), ("jpeg", "png")[number % 2]
                Image.new("RGB", (8, 6), (10 * number, 0, 0)).save(stored, suffix)
                add(tar, f"{number:09}.{suffix.replace('jpeg', 'jpg')}", stored.getvalue())
                add(tar, f"{number:09}.txt", f"number {number}".encode())
                add(tar, f"{number:09}.cls", str(number).encode())
    return tmp_path


def numbers(dataset):
    return [label for _, label in dataset]


def test_samples_come_in_order_and_without_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        samples = list(as_webdataset(folder, parts=(IMAGE, "txt", "cls")))
    assert [(text, label) for _, text, label in samples] == [(f"number {n}", n) for n in range(20)]
    assert [image.size for image, _, _ in samples] == [(8, 6)] * 20
    assert samples[3][0].getpixel((0, 0)) == (30, 0, 0)


def test_without_parts_and_decoder_they_are_dicts_of_bytes(folder):
    sample = next(iter(as_webdataset(str(folder / "{00001..00002}.tar"), parts=None, decode=None)))
    assert (sample["__key__"], sample["txt"], sample["cls"]) == ("000000004", b"number 4", b"4")


def test_every_epoch_has_each_sample_once_in_a_new_order_that_the_seed_decides(folder):
    options = {"parts": (IMAGE, "cls"), "shuffle": 6}
    dataset = as_webdataset(folder, seed=3, **options)
    epochs = [numbers(dataset) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {label // 4 for label in epochs[0][:4]} != {0}  # shards are shuffled too
    again = as_webdataset(folder, seed=3, **options)
    assert [numbers(again) for _ in range(3)] == epochs
    assert numbers(as_webdataset(folder, seed=4, **options)) != epochs[0]


@pytest.mark.parametrize("num_shards", [5, 1])
def test_workers_share_the_samples_even_if_they_outnumber_the_shards(folder, num_shards):
    dataset = as_webdataset([str(folder / f"{shard:05}.tar") for shard in range(num_shards)], parts=("cls",))
    found = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(label for (label,) in found) == list(range(4 * num_shards))


def test_ranks_share_the_samples(folder, monkeypatch):
    """Without its own settings, the library refuses more than one rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shares.append(numbers(as_webdataset(folder, parts=(IMAGE, "cls"))))
        with pytest.raises(ValueError, match="explicit nodesplitter"):
            next(iter(webdataset.WebDataset(str(folder / "00000.tar"), shardshuffle=False)))
    assert sorted(shares[0] + shares[1]) == list(range(20))
    assert [len(share) for share in shares] == [12, 8]  # whole shards


def test_resampling_goes_on_for_ever_and_follows_the_seed_and_the_rank(folder, monkeypatch):
    def draw(seed):
        dataset = as_webdataset(folder, parts=("cls",), resampled=True, shuffle=5, seed=seed)
        return [label for (label,) in islice(dataset, 50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    first = draw(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert draw(1) != first
    assert len(list(as_webdataset(folder, resampled=True).with_epoch(33))) == 33


def test_the_handler_decides_about_broken_images(folder):
    shard = folder / "00002.tar"
    with tarfile.open(shard, "w") as tar:
        for number in (8, 9):
            add(tar, f"{number:09}.jpg", b"nothing" if number == 8 else _jpeg())
            add(tar, f"{number:09}.cls", str(number).encode())
    with pytest.raises(webdataset.DecodingError):
        list(as_webdataset(shard, parts=(IMAGE, "cls")))
    dataset = as_webdataset(shard, parts=(IMAGE, "cls"), handler=webdataset.ignore_and_continue)
    assert numbers(dataset) == [9]


def _jpeg():
    stored = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stored, "jpeg")
    return stored.getvalue()


def test_a_negative_buffer_is_an_error(folder):
    with pytest.raises(ValueError, match=r"shuffle=-1, expected the size of a buffer"):
        as_webdataset(folder, shuffle=-1)

"""Synthetic pairs: fixed bytes, and captions and classes that the pixels show."""

import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.webdataset.synthetic import COLOURS, GROUNDS, NUM_CAPTIONS, SyntheticPairs
from datamodules.webdataset.transforms import FastTrain

WHOLE = FastTrain(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.tar")}


def nearest(pixels: Tensor) -> list[str]:
    """Return for each pixel `(N, 3)` which of all colours it is nearest to."""
    names = {**COLOURS, **GROUNDS}
    distance = torch.cdist(pixels.float(), torch.tensor(list(names.values()), dtype=torch.float32))
    return [list(names)[place] for place in distance.argmin(1).tolist()]


def test_shards_are_written_once_with_the_same_bytes(tmp_path):
    data = SyntheticPairs(tmp_path / "one", num_samples=60, num_val_samples=10)
    data.prepare_data()
    SyntheticPairs(tmp_path / "two", num_samples=60, num_val_samples=10).prepare_data()
    first = contents(tmp_path / "one")
    assert {Path(name).name for name in first} == {"00000.tar", "00001.tar"}
    assert first == contents(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == times
    # Other numbers are other shards, in the same folder.
    SyntheticPairs(tmp_path / "one", num_samples=30, num_val_samples=10).prepare_data()
    assert len(contents(tmp_path / "one")) == 2 * len(first) - 1


def test_a_second_process_that_was_faster_is_no_error(tmp_path, monkeypatch):
    data = SyntheticPairs(tmp_path, num_samples=4, num_val_samples=4)
    write = data._write

    def overtaken() -> None:
        SyntheticPairs(tmp_path, num_samples=4, num_val_samples=4).prepare_data()
        write()

    monkeypatch.setattr(data, "_write", overtaken)
    data.prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == [data.folder.name]  # nothing unfinished


def test_caption_and_class_are_those_of_the_pixels(tmp_path):
    data = SyntheticPairs(
        tmp_path,
        num_samples=2 * NUM_CAPTIONS,
        num_val_samples=NUM_CAPTIONS,
        batch_size=2 * NUM_CAPTIONS,
        train_transform=WHOLE,
    )
    data.setup("fit")
    assert data.num_classes == len(COLOURS)
    batch = next(iter(data.train_dataloader()))
    texts = {}
    for path in (data.folder / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            texts |= {
                member.name.removesuffix(".txt"): tar.extractfile(member).read().decode()  # type: ignore[union-attr]
                for member in tar
                if member.name.endswith(".txt")
            }
    assert len(set(texts.values())) == NUM_CAPTIONS
    for image, label, key in zip(batch["image"], batch["label"].tolist(), batch["key"], strict=True):
        _, colour, _, _, ground = texts[key.rpartition("/")[2]].split()
        assert list(COLOURS)[label] == colour
        found = nearest(image.permute(1, 2, 0).flatten(0, 1))
        assert max(COLOURS, key=found.count) == colour
        assert max(GROUNDS, key=found.count) == ground


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"SyntheticPairs: num_samples=0, expected at least 1"):
        SyntheticPairs(tmp_path, num_samples=0)

"""What the batches of shards are: texts, labels, pixels, quotas, precision, evaluation."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from shard_data import Ranks, names, open_pairs
from shard_files import NAMES, sample, write_pairs
from torch import Tensor

from datamodules.webdataset.image_label import ImageLabelShards
from datamodules.webdataset.sources import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, write_pairs(folder, num_shards=6, per_shard=11)


def test_texts_labels_and_pixels_belong_to_the_key(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards
    data = open_pairs(train=Shards(urls=str(folder)), batch_size=16, class_names=NAMES)
    batch = next(iter(data.train_dataloader()))
    numbers = [int(name) for name in names(batch)]
    assert batch["label"].tolist() == [number % len(NAMES) for number in numbers]
    texts = [sample(number)["txt"].decode() for number in numbers]
    ids, length = data.tokenizer.encode(texts)
    assert batch["text"].equal(ids)
    assert batch["text_length"].equal(length)
    assert batch["image"].dtype == torch.uint8
    # Noise of 25 levels and JPEG average out over a thousand pixels.
    colours = torch.tensor([[200, 30, 30], [30, 180, 40], [40, 60, 210], [220, 210, 40]], dtype=torch.float32)
    assert (batch["image"].float().mean((2, 3)) - colours[batch["label"]]).abs().max() < 8


def test_pixels_do_not_depend_on_workers_or_ranks(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards

    def images(world: int, num_workers: int) -> dict[str, Tensor]:
        found = {}
        for rank in range(world):
            options = {"batch_size": 16 // world, "num_workers": num_workers}
            loader = open_pairs(Ranks(rank, world), train=Shards(urls=str(folder)), **options).train_dataloader()
            for batch in loader:
                found |= dict(zip(names(batch), batch["image"], strict=True))
        return found

    first, second, third = images(1, 0), images(1, 2), images(2, 0)
    assert first.keys() == second.keys() == third.keys()
    assert all(first[name].equal(second[name]) and first[name].equal(third[name]) for name in first)


def test_evaluation_counts_each_sample_once_over_all_ranks(shards: tuple[Path, list[str]]) -> None:
    folder, keys = shards
    for world in (1, 2, 3, 4):
        seen: Counter[str] = Counter()
        lengths = set()
        for rank in range(world):
            data = open_pairs(Ranks(rank, world), val=Shards(urls=str(folder)), batch_size=7)
            loader = data.val_dataloader()
            batches = list(loader)
            lengths.add(len(batches))
            for batch in batches:
                assert len(batch["image"]) == 7
                seen.update(name for name, valid in zip(names(batch), batch["valid"].tolist(), strict=True) if valid)
        assert seen == Counter(keys)
        assert len(lengths) == 1


def test_weighted_sources_have_exact_quotas_in_every_step(tmp_path: Path) -> None:
    write_pairs(tmp_path / "large", num_shards=4, per_shard=20)
    write_pairs(tmp_path / "small", num_shards=1, per_shard=6, first=900)
    train = [
        Shards(urls=str(tmp_path / "large"), weight=3.0),
        Shards(urls=str(tmp_path / "small"), weight=1.0),
    ]
    data = open_pairs(train=train, batch_size=16)
    report = data.describe()
    assert "large: 12 of 16 rows" in report
    assert "small: 4 of 16 rows" in report
    loader = data.train_dataloader()
    for batch in loader:
        assert batch["source"].bincount().tolist() == [12, 4]
        assert [int(name) >= 900 for name in names(batch)] == (batch["source"] == 1).tolist()


def test_labelled_images_are_normalised_after_the_transfer(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards
    data = ImageLabelShards(
        4,
        train=Shards(urls=str(folder)),
        image_size=32,
        batch_size=8,
        num_workers=0,
        mean=(0.5, 0.5, 0.5),
        std=(1, 1, 1),
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready["image"].dtype == torch.float32
    # Of the arithmetic in float32.
    np.testing.assert_allclose(ready["image"], batch["image"].float() / 255 - 0.5, atol=1e-6)
    assert ready["label"].equal(batch["label"])


class Recorder(LightningModule):
    """Trains nothing, and keeps the types of the images that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.dtypes.add(batch["image"].dtype)
        return (batch["image"].mean((0, 2, 3)) * self.weight).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_images_come_in_the_precision_of_training(
    shards: tuple[Path, list[str]], precision: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = ImageLabelShards(4, train=Shards(urls=str(shards[0])), image_size=32, batch_size=8, num_workers=0)
    module = Recorder()
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert module.dtypes == {dtype}


def test_labelled_images_without_texts_have_loaders_of_their_own(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", num_shards=1, per_shard=10)
    write_pairs(tmp_path / "labelled", num_shards=1, per_shard=7, changed={n: {"txt": None} for n in range(7)})
    data = open_pairs(
        val=Shards(urls=str(tmp_path / "pairs")),
        zero_shot=Shards(urls=str(tmp_path / "labelled")),
        class_names=NAMES,
        batch_size=4,
    )
    loaders = data.val_dataloader()
    assert isinstance(loaders, list)
    pairs, labelled = (list(loader) for loader in loaders)
    assert sum(int(batch["valid"].sum()) for batch in pairs) == 10
    assert all("text" in batch for batch in pairs)
    assert all("text" not in batch for batch in labelled)
    labels = [label for batch in labelled for label in batch["label"][batch["valid"]].tolist()]
    assert labels == [number % len(NAMES) for number in range(7)]
    with pytest.raises(ValueError, match="class_names"):
        open_pairs(zero_shot=Shards(urls=str(tmp_path / "labelled")), val=Shards(urls=str(tmp_path / "pairs")))

"""The promises of the datamodule over shards, by key: order, resume, pixels, mixing, bad samples, evaluation."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from shard_files import NAMES, sample, square, write_pairs, write_tar
from torch import Tensor

from datamodules.webdataset.dataset import BadShardsError
from datamodules.webdataset.image_label import ImageLabelShards
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.ledger import Ledger
from datamodules.webdataset.loader import ShardLoader
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.settings import Access, Shuffling
from datamodules.webdataset.sources import Shards

SMALL = Shuffling(lanes=4, window_shards=2)


@dataclass
class Ranks:
    """What a datamodule asks its trainer for."""

    rank: int = 0
    num_replicas: int = 1
    accumulate_grad_batches: int = 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"rank": self.rank, "num_replicas": self.num_replicas}


def open_pairs(ranks: Ranks | None = None, **options: Any) -> ImageTextShards:
    data = ImageTextShards(**{"image_size": 32, "num_workers": 0, "shuffling": SMALL, **options})
    data.prepare_data()
    data.trainer = ranks or Ranks()  # type: ignore[assignment]  # all that is asked of one
    return data


def names(batch: Any) -> list[str]:
    return [key.rpartition("/")[2] for key in batch["key"]]


def endless(loader: ShardLoader) -> Iterator[Any]:
    while True:
        yield from loader


def global_batches(
    folder: Path, num_batches: int, *, world: int, accumulation: int, num_workers: int
) -> list[list[str]]:
    """Return the keys of each optimizer step, put together from the loaders of all ranks."""
    loaders = [
        endless(
            open_pairs(
                Ranks(rank, world, accumulation),
                train=Shards(urls=str(folder)),
                batch_size=16 // world // accumulation,
                num_workers=num_workers,
            ).train_dataloader()
        )
        for rank in range(world)
    ]
    steps = []
    for _ in range(num_batches):
        rows = [[name for _ in range(accumulation) for name in names(next(loader))] for loader in loaders]
        steps.append([name for part in rows for name in part])
    return steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, write_pairs(folder, num_shards=6, per_shard=11)


@pytest.mark.parametrize(
    ("world", "accumulation", "num_workers"), [(2, 1, 0), (4, 1, 0), (1, 2, 0), (2, 4, 0), (1, 1, 2)]
)
def test_a_step_sees_the_same_samples_however_it_is_split(
    shards: tuple[Path, list[str]], world: int, accumulation: int, num_workers: int
) -> None:
    folder, _ = shards
    # Two epochs of 4 steps, and one step more.
    expected = global_batches(folder, 9, world=1, accumulation=1, num_workers=0)
    assert global_batches(folder, 9, world=world, accumulation=accumulation, num_workers=num_workers) == expected


def test_an_epoch_has_each_sample_at_most_once_and_the_next_another_order(shards: tuple[Path, list[str]]) -> None:
    folder, keys = shards
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    epochs = [[name for batch in loader for name in names(batch)] for _ in range(2)]
    assert len(loader) == 4
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 64
        assert set(epoch) <= set(keys)
    assert epochs[0] != epochs[1]


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


# Hands out batches with two workers alive, says after each what a checkpoint would hold, and is killed.
KILLED = """
import json, os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_shard_data import endless, open_pairs
from datamodules.webdataset.sources import Shards

loader = open_pairs(train=Shards(urls=sys.argv[1]), batch_size=16, num_workers=2).train_dataloader()
stream = endless(loader)
for _ in range(6):
    next(stream)
    print(json.dumps(loader.state_dict()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def states(shards: tuple[Path, list[str]]) -> list[str]:
    root = Path(__file__).parents[3]
    paths = [str(path) for path in (root, root / "tests/golden", Path(__file__).parent)]
    command = [sys.executable, "-c", KILLED, str(shards[0]), *paths]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    return killed.stdout.splitlines()


@pytest.mark.parametrize(("world", "num_workers", "stopped"), [(1, 0, 2), (2, 0, 3), (4, 0, 5), (1, 2, 6)])
def test_a_run_goes_on_with_the_next_sample_on_other_ranks_and_workers(
    shards: tuple[Path, list[str]], states: list[str], world: int, num_workers: int, stopped: int
) -> None:
    folder, _ = shards
    uninterrupted = global_batches(folder, 9, world=1, accumulation=1, num_workers=0)
    state = states[stopped - 1]
    assert len(state) < 1024
    parts = []
    for rank in range(world):
        options = {"batch_size": 16 // world, "num_workers": num_workers}
        data = open_pairs(Ranks(rank, world), train=Shards(urls=str(folder)), **options)
        loader = data.train_dataloader()
        loader.load_state_dict(json.loads(state))
        parts.append(names(next(iter(loader))))
    assert [name for part in parts for name in part] == uninterrupted[stopped]


# Workers make batches of which nobody takes any, until the pipe is full; then the process is killed.
FULL = """
import os, signal, sys, time
sys.path[:0] = sys.argv[2:]
from test_shard_data import open_pairs
from datamodules.webdataset.sources import Shards

options = {"batch_size": 1, "num_workers": 2, "prefetch_factor": 40}
loader = open_pairs(train=Shards(urls=sys.argv[1]), **options).train_dataloader()
iterator = iter(loader)
next(iterator)
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_that_trains(shards: tuple[Path, list[str]]) -> None:
    root = Path(__file__).parents[3]
    paths = [str(path) for path in (root, root / "tests/golden", Path(__file__).parent)]
    # The workers hold the other end of the pipe: it is read to its end when they are gone.
    killed = subprocess.run(
        [sys.executable, "-c", FULL, str(shards[0]), *paths], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL


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


def bad_parts() -> dict[int, dict[str, bytes | None]]:
    """Return one sample for each way in which one can be bad while its archive is whole."""
    return {
        3: {"jpg": square(3)[:300]},
        14: {"jpg": b"<html>not found</html>"},
        17: {"txt": None},
        25: {"txt": b"\xff\xfe\xfa"},
        26: {"txt": b"  "},
        31: {"jpg": None},
        40: {"cls": b"99"},
    }


CAUSES = {3: "decode", 14: "decode", 17: "text", 25: "text", 26: "text", 31: "parts", 40: "label"}


def test_bad_samples_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path / "shards", num_shards=6, per_shard=11, changed=bad_parts())
    shards = Shards(urls=str(tmp_path / "shards"), name="squares")

    def run(**options: Any) -> tuple[list[list[str]], Meter]:
        data = open_pairs(train=shards, batch_size=22, class_names=NAMES, **options)
        loader = data.train_dataloader()
        batches = [names(batch) for batch in loader]
        meter, _ = loader.take_meter()
        assert meter is not None
        return batches, meter

    batches, meter = run()
    delivered = [name for batch in batches for name in batch]
    bad = {f"{number:06}" for number in CAUSES}
    assert len(delivered) == 66
    assert not bad & set(delivered)
    # Each of the others comes at its place, and seven of them once more.
    assert set(delivered) == set(keys) - bad
    # A bad sample may also be drawn as a replacement, and is counted again then.
    found = {int(entry.name.rpartition("/")[2]): entry.cause for entry in meter.entries}
    assert found == CAUSES
    assert meter.samples == {0: 66}
    assert sum(meter.bad.values()) == len(meter.entries) >= len(CAUSES)
    again, _ = run(num_workers=2)
    assert again == batches
    # Listed ones are not read again, and replaced the same way.
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(meter.entries)
    known, second = run(ledger=tmp_path / "ledger")
    assert known == batches
    assert second.entries == []
    assert second.bad == meter.bad


def test_evaluation_leaves_bad_samples_out(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path / "shards", num_shards=2, per_shard=25, changed=bad_parts())
    loader = open_pairs(val=Shards(urls=str(tmp_path / "shards")), batch_size=8, class_names=NAMES).val_dataloader()
    with pytest.warns(UserWarning, match="7 of 50 samples of shards are bad and left out"):
        batches = list(loader)
    valid = {name for batch in batches for name, ok in zip(names(batch), batch["valid"].tolist(), strict=True) if ok}
    assert valid == set(keys) - {f"{number:06}" for number in CAUSES}


def test_too_large_samples_are_bad_before_they_are_read(tmp_path: Path) -> None:
    write_pairs(tmp_path / "shards", num_shards=2, per_shard=20, changed={5: {"json": b" " * 1_000_000}})
    access = Access(max_sample_bytes=500_000)
    loader = open_pairs(train=Shards(urls=str(tmp_path / "shards")), batch_size=40, access=access).train_dataloader()
    list(loader)
    meter, _ = loader.take_meter()
    assert meter is not None
    assert set(meter.bad) == {(0, "size")}
    assert meter.storage["bytes"] < 500_000


def test_a_window_of_bad_samples_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "shards", num_shards=2, per_shard=10, changed={n: {"txt": None} for n in range(20)})
    loader = open_pairs(train=Shards(urls=str(tmp_path / "shards")), batch_size=4).train_dataloader()
    with pytest.raises(BadShardsError, match=r"10 samples in a row are bad at step 0 of epoch 0 .*text"):
        next(iter(loader))


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_pairs(folder, num_shards=2, per_shard=10)
    data = open_pairs(train=Shards(urls=str(folder)), batch_size=20)
    loader = data.train_dataloader()
    # The same size and the same numbers, in another order.
    numbers = [1, 0, *range(2, 10)]
    parts = {number: sample(number) for number in numbers}
    longest = {part: max(len(parts[n][part]) for n in (0, 1)) for part in ("jpg", "txt", "cls")}
    assert all(-(-longest[part] // 512) == -(-len(parts[n][part]) // 512) for n in (0, 1) for part in longest)
    write_tar(
        folder / "00000.tar",
        iter([(f"{number:06}.{part}", data) for number in numbers for part, data in parts[number].items()]),
    )
    list(loader)
    meter, _ = loader.take_meter()
    assert meter is not None
    assert meter.bad[0, "changed"] >= 2


def test_weighted_sources_have_exact_quotas_in_every_step(tmp_path: Path) -> None:
    write_pairs(tmp_path / "large", num_shards=4, per_shard=20)
    write_pairs(tmp_path / "small", num_shards=1, per_shard=6, first=900)
    train = [
        Shards(urls=str(tmp_path / "large"), weight=3.0),
        Shards(urls=str(tmp_path / "small"), weight=1.0),
    ]
    loader = open_pairs(train=train, batch_size=16).train_dataloader()
    for batch in loader:
        assert batch["source"].bincount().tolist() == [12, 4]
        assert [int(name) >= 900 for name in names(batch)] == (batch["source"] == 1).tolist()


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"seed": 7}, "seed"), ({"batch_size": 8}, "global_batch"), ({"shuffling": Shuffling(lanes=1)}, "lanes")],
)
def test_another_run_is_refused_by_name(shards: tuple[Path, list[str]], changes: dict[str, Any], field: str) -> None:
    folder, _ = shards
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    next(iter(loader))
    other = open_pairs(**{"train": Shards(urls=str(folder)), "batch_size": 16, **changes}).train_dataloader()
    with pytest.raises(ValueError, match=field):
        other.load_state_dict(loader.state_dict())


def test_other_shards_are_refused(shards: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = shards
    write_pairs(tmp_path / "pairs", num_shards=6, per_shard=12)
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    next(iter(loader))
    other = open_pairs(train=Shards(urls=str(tmp_path / "pairs")), batch_size=16).train_dataloader()
    with pytest.raises(ValueError, match="data"):
        other.load_state_dict(loader.state_dict())


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

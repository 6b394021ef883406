"""A datamodule over shards as one of several ranks has it, without a trainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.loader import ShardLoader
from datamodules.webdataset.settings import Shuffling
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

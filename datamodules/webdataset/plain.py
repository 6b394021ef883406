"""The same shards through webdataset's own pipeline, for who prefers the library to the indexed reader."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import webdataset

from datamodules.webdataset.urls import expand_shards

# One image under any suffix, as `to_tuple` reads it.
IMAGE = "jpg;jpeg;png;webp"


def as_webdataset(
    urls: str | Path | Sequence[str],
    *,
    parts: Sequence[str] | None = (IMAGE, "txt"),
    decode: str | None = "pil",
    shuffle: int = 0,
    seed: int = 0,
    resampled: bool = False,
    handler: Callable[[Exception], bool] = webdataset.reraise_exception,
) -> webdataset.WebDataset:
    """Return a `webdataset.WebDataset` with the settings that its version 1 needs spelled out.

    It streams: no index, no exact resume, an order that depends on ranks and workers, and nothing counts what
    `handler` drops, which can be the rest of a shard. What can be appended to a WebDataset can be appended to this one.

    Shards are split over ranks, then over workers. Ranks get whole shards, so unless all have equally many samples,
    their numbers of batches differ, and training on several ranks waits for ever at the end of the epoch: take
    `resampled=True` with `.with_epoch(samples per worker)` there. Give the DataLoader `persistent_workers=True`: each
    worker counts the epochs that decide its order, and new workers begin at the first.

    Args:
        urls: As `Shards.urls`.
        parts: What a sample is a tuple of: extensions, alternatives joined by a semicolon. None: it is a dict.
        decode: Image format of webdataset's decoder, such as `pil`, `rgb8` or `torchrgb`; None leaves bytes.
        shuffle: Samples in the shuffle buffer of each worker; shards are then shuffled too, anew in each epoch. 0 keeps
            their order.
        seed: Of both shuffles, and of resampling.
        resampled: Draw shards with replacement, without end.
        handler: What to do about errors, such as `webdataset.warn_and_continue`.

    Raises:
        ValueError: `shuffle` is negative.
    """
    if shuffle < 0:
        raise ValueError(f"as_webdataset: shuffle={shuffle}, expected the size of a buffer, or 0.")
    shards = expand_shards(urls)
    dataset: Any = webdataset.WebDataset(
        shards,
        handler=handler,
        resampled=resampled,
        # None warns, and True means 100 shards.
        shardshuffle=len(shards) if shuffle and not resampled else False,
        # The other shuffle repeats its first order in each epoch.
        detshuffle=True,
        # The default is an error as soon as there are two ranks.
        nodesplitter=None if resampled else webdataset.split_by_node,
        workersplitter=None if resampled else webdataset.split_by_worker,
        # That a worker has no shard is no error.
        empty_check=False,
        seed=seed,
    )
    if resampled:
        # WebDataset makes this stage without the seed, so that no two runs are alike.
        dataset.pipeline[0] = webdataset.ResampledShards(shards, seed=seed, deterministic=True)
    if shuffle:
        dataset = dataset.compose(webdataset.detshuffle(shuffle, initial=min(shuffle, 1000), seed=seed))
    if decode is not None:
        dataset = dataset.decode(decode, handler=handler)
    return dataset if parts is None else dataset.to_tuple(*parts, handler=handler)

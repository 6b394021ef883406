"""Settings of the datamodule over shards: in which order samples are taken, and how shards are reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.webdataset.cache import ShardCache
from datamodules.webdataset.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Shuffling:
    """In which order training takes the samples; with the seed, the epoch and the step it is all that decides.

    A global batch takes its rows from `lanes` places of the shuffled shards, and each lane draws from a window of
    `window_shards` shards at a time. A node keeps about `lanes * window_shards / nodes` shards open or cached.

    Args:
        lanes: At most so many; fewer where there are few shards or rows.
        window_shards: Shards among which the samples of a lane are shuffled.
        resampled: Draw shards with replacement: samples may come again or not at all in an epoch.
        epoch_samples: Samples of an epoch; None takes all of them once (with weights: as many as there are).

    Raises:
        ValueError: A number below 1.
    """

    lanes: int = 64
    window_shards: int = 8
    resampled: bool = False
    epoch_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("lanes", "window_shards", "epoch_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Shuffling: {name}={value}, expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How shards are reached.

    Args:
        cache: Folder for whole shards, shared by all processes of a node; None reads them where they are.
        cache_bytes: Limit of the folder.
        fill: `background` reads a shard that is not in the cache by range while a thread fetches it; `first` waits for
            it, as servers without ranges need.
        retries: Of a read that failed.
        timeout: Of an http(s) server, to answer or to send the next megabyte, seconds.
        mirrors: Pairs of the start of a URL and what takes its place when the URL cannot be reached.
        max_sample_bytes: Larger samples are bad, and nothing of them is read.

    Raises:
        ValueError: A number out of range.
    """

    cache: Path | None = None
    cache_bytes: int = 500_000_000_000
    fill: Literal["background", "first"] = "background"
    retries: int = 5
    timeout: float = 60.0
    mirrors: tuple[tuple[str, str], ...] = ()
    max_sample_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("retries", 0), ("max_sample_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Access: {name}={getattr(self, name)}, expected at least {least}.")
        if not self.timeout > 0:
            raise ValueError(f"Access: timeout={self.timeout}, expected more than 0 seconds.")

    def build(self) -> Storage:
        """Return what reads shards."""
        cache = None if self.cache is None else ShardCache(self.cache, self.cache_bytes, fill=self.fill)
        return Storage(cache, retries=self.retries, timeout=self.timeout, mirrors=self.mirrors)


# Defaults of the datamodules.
SHUFFLING = Shuffling()
DIRECT = Access()
